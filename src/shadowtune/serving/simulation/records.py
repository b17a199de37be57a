"""Recorded answers: measured once, kept in a file for each side, replayed by the simulator."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shadowtune.config.serving import TOKEN_SIGNALS
from shadowtune.config.settings import from_mapping
from shadowtune.errors import ConfigError, DataError
from shadowtune.serving.edge.confidence import NO_SIGNALS, Signals, token_confidence
from shadowtune.serving.edge.local import LocalStream
from shadowtune.serving.requests import Backend, GenerationRequest, Usage

SCHEMA = 1


@dataclass(frozen=True)
class RecordedAnswer:
    """One side's answer to one request, measured on an idle machine."""

    text: str
    score: float
    """From 0, wrong, to 1, right."""
    seconds: float
    first_seconds: float
    """Seconds to the first token, which is how long the prompt takes."""
    prompt_tokens: int
    completion_tokens: int
    tokens: list[int] = field(default_factory=list)
    """Token ids of the answer, by the same tokenizer on both sides."""
    signals: Signals = NO_SIGNALS
    """Confidence signals of the edge's model."""
    token_confidences: dict[str, list[float]] = field(default_factory=dict)
    """Confidence of each token of the edge's answer and of its end, by signal."""


@dataclass(frozen=True)
class RequestRecord:
    """One request with the recorded answer of each side."""

    edge: RecordedAnswer
    cloud: RecordedAnswer
    lora: RecordedAnswer | None = None
    """Of another model in place of the cloud."""
    request_bytes: int = 0
    """Length of the prompt as UTF-8."""


class AnswerFile:
    """The answers of one side as JSON lines, appended while it answers, so that an interrupted recording continues.

    The first line holds the origin.

    Args:
        file: created if it is missing.
        origin: plain values that identify the model, the examples and whatever else the answers depend on.

    Raises:
        DataError: if the file holds answers of another origin, or is damaged.
    """

    def __init__(self, file: Path, origin: Mapping[str, Any]) -> None:
        self.file, self.origin = file, {"schema": SCHEMA, **origin}
        self.answers: list[RecordedAnswer] = []
        if file.is_file() and file.stat().st_size:
            self._read()
        else:
            file.write_text(json.dumps(self.origin) + "\n", encoding="utf-8")

    def add(self, answer: RecordedAnswer) -> None:
        """Append the answer to the next request."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(answer)) + "\n")
        self.answers.append(answer)

    def _read(self) -> None:
        """Read the answers; an unfinished last line is cut off."""
        whole, end, _ = self.file.read_bytes().rpartition(b"\n")
        first, *lines = (whole + end).decode("utf-8", "replace").splitlines() or [""]
        origin = _parse(first, f"{self.file}, line 1")
        if origin != self.origin:
            differing = ", ".join(_differences(origin, self.origin))
            raise DataError(f"{self.file} was recorded with another {differing}; delete it, or name another --output")
        for number, line in enumerate(lines, start=2):
            where = f"{self.file}, line {number}"
            try:
                self.answers.append(from_mapping(RecordedAnswer, _parse(line, where), where=""))
            except ConfigError as error:
                raise DataError(f"{where}: {error}; delete the file to record anew") from None
        with self.file.open("r+b") as kept:
            kept.truncate(len(whole + end))


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise DataError(f"{where} is damaged; delete the file to record anew") from None


def _differences(found: Any, wanted: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(found, Mapping):
        yield "program"
        return
    yield from (name for name in wanted if found.get(name) != wanted[name])


def _confidences(stream: LocalStream) -> tuple[Signals, dict[str, list[float]]]:
    """Return the signals of an answer, and of its tokens."""
    known = [name for name in TOKEN_SIGNALS if name != "agreement" or stream.signals.agreement is not None]
    return stream.signals, {name: [token_confidence(token, name) for token in stream.statistics] for name in known}


async def measure(
    backend: Backend,
    request: GenerationRequest,
    score: Callable[[str], float],
    tokenize: Callable[[str], list[int]],
    clock: Callable[[], float] = time.perf_counter,
) -> RecordedAnswer:
    """Send one request to an idle backend and record the complete answer.

    Args:
        backend: answers it.
        request: the request.
        score: scores an answer's text from 0 to 1.
        tokenize: the same for both sides, so that their answers can be compared token by token.
        clock: returns seconds.

    Raises:
        RequestError: if it cannot be answered.
    """
    begun = clock()
    stream = await backend.generate(request)
    first, text, usage = None, "", Usage(0, 0)
    async for chunk in stream:
        first = clock() if first is None else first
        text += chunk.text
        usage = chunk.usage or usage
    ended = clock()
    return RecordedAnswer(
        text,
        score(text),
        ended - begun,
        (ended if first is None else first) - begun,
        usage.prompt_tokens,
        usage.completion_tokens,
        tokenize(text),
        *(_confidences(stream) if isinstance(stream, LocalStream) else ()),
    )
