"""The other end of a worker: start its process, ask, and see to it that it ends."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from shadowtune.errors import ShadowtuneError


class WorkerProcess:
    """A worker in a process of its own. A context manager: at its end the process ends.

    Args:
        name: of what it works on, for messages.
        module: what runs there; it answers as ``shadowtune.benchmark.worker`` does.
        way_out: what a user can do where the process dies.
        environment: variables that it has beside or in place of this process's.
    """

    def __init__(
        self,
        name: str,
        module: str = "shadowtune.benchmark.worker",
        way_out: str = "try a smaller --batch, or other --peers",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._way_out = name, way_out
        self._errors = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the workers
        )

    def call(self, method: str, **arguments: Any) -> Any:
        """Ask the worker and wait for its answer.

        Raises:
            ShadowtuneError: if the worker says what is wrong, or has died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise ShadowtuneError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def _death(self) -> ShadowtuneError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        reason = "killed, perhaps for want of memory" if code == -9 else (lines[-1] if lines else f"exit code {code}")
        return ShadowtuneError(f"the process of {self.name} ended: {reason}; {self._way_out}")

    def kill(self) -> None:
        """End the process at once; who waits for its answer is told that it has died."""
        self._process.kill()

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()  # it holds nothing that is worth saving
        self._process.communicate()
        self._errors.close()
