"""A worker process: runs functions in a process of its own, and ends with its parent."""

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from shadowtune.errors import ShadowtuneError

T = TypeVar("T")
_starting = threading.Lock()
"""Held while the variables of a new process are set in this one."""


class WorkerProcess:
    """A process of its own that runs functions one after the other; a context manager that ends the process.

    It is started by ``spawn``, so it shares nothing with this process, and it ends when this process ends. Ctrl-C
    does not reach it. What it prints is dropped, except for the last line if it dies.

    Args:
        name: what it works on, for error messages.
        hint: what a user can do if the process dies.
        environment: variables set in it, in addition to this process's.
    """

    def __init__(self, name: str, hint: str, environment: Mapping[str, str] | None = None) -> None:
        self.name, self._hint = name, hint
        descriptor, log = tempfile.mkstemp(suffix=".log")
        os.close(descriptor)
        self._log = Path(log)
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, log))
        with _environment(environment or {}):
            self._process.start()
        other_end.close()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function of a module in the process and return its result; both must be picklable.

        Raises:
            ShadowtuneError: if the function raises one, or the process has died.
        """
        try:
            self._connection.send((function, arguments))
            result, error = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if error is not None:
            raise ShadowtuneError(f"{self.name}: {error}")
        return result

    def _death(self) -> ShadowtuneError:
        self._process.join()
        code = self._process.exitcode
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {code}"
        reason = "killed, perhaps for want of memory" if code == -9 else last
        return ShadowtuneError(f"the process of {self.name} ended: {reason}; {self._hint}")

    def kill(self) -> None:
        """End the process at once; a pending ``call`` raises."""
        self._process.kill()

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()  # it holds nothing that must be saved
        self._process.join()
        self._connection.close()
        self._log.unlink(missing_ok=True)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the length of the context: a new process reads some before any of our code."""
    with _starting:
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            yield
        finally:
            for name in variables:
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]


def _serve(connection: Connection, log: str) -> None:
    """Main function of a worker process: run the functions that the connection delivers."""
    if sys.platform != "win32":
        os.setsid()  # Ctrl-C reaches the parent process alone, which then ends its workers
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*arguments), None))
        except ShadowtuneError as error:
            connection.send((None, str(error)))


def _exit_with_parent() -> None:
    """End this process when its parent ends: checkpoints and results are atomic, so only some steps are lost."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
