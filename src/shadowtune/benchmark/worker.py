"""The process of one subject: reads requests from standard input, a line of JSON each, and answers each with a line.

A request is ``[method, {arguments}]``, an answer ``{"result": ...}`` or ``{"error": "one line"}``. Between requests the
process waits and uses no processor, so that the others are measured alone.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

from shadowtune.benchmark.bench import Subject
from shadowtune.benchmark.registry import BENCHES
from shadowtune.config.checking import from_mapping
from shadowtune.errors import ShadowtuneError


class Service:
    """What can be asked of a worker, by the name of the method."""

    def __init__(self) -> None:
        self._subject: Subject | None = None

    def open(self, bench: str, settings: dict[str, Any], name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Load a subject and say how large it is."""
        definition = BENCHES[bench]
        self._subject = definition.open(from_mapping(definition.settings, settings, where=""), name, **arguments)
        return self._facts()

    def prepare(self, values: dict[str, Any]) -> dict[str, Any]:
        """Make the subject ready for a case; say how large it is now, and its peak memory in MB."""
        assert self._subject is not None
        peak = self._subject.prepare(values)
        return {**self._facts(), "peak_memory_mb": peak}

    def measure(self) -> float:
        """Take one sample."""
        assert self._subject is not None
        return self._subject.measure()

    def _facts(self) -> dict[str, Any]:
        assert self._subject is not None
        return {
            "size": self._subject.size,
            "trainable_parameters": self._subject.trainable_parameters,
            "facts": dict(self._subject.facts),
        }


Methods = Mapping[str, Callable[..., Any]]
"""What can be asked, by name."""


def methods_of(service: Service) -> Methods:
    """Return what can be asked of a service."""
    return {"open": service.open, "prepare": service.prepare, "measure": service.measure}


def serve(methods: Methods, requests: Iterable[str], answers: IO[str]) -> None:
    """Answer requests until there are no more. An error that no user can cause ends the process, as it should."""
    for line in requests:
        method, arguments = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"result": methods[method](**arguments)}
        except ShadowtuneError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def serve_standard_streams(methods: Methods, requests: Iterable[str] = sys.stdin) -> None:
    """Serve; what libraries print goes to standard error, out of the way of the answers."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(methods, requests, answers)


def main() -> None:
    """Serve one subject."""
    gc.freeze()  # the libraries' objects stay: to go through them in each collection takes longer than many a step
    try:
        serve_standard_streams(methods_of(Service()))
    finally:
        gc.unfreeze()  # else some of them complain, below the error, of what was not taken down


if __name__ == "__main__":
    main()
