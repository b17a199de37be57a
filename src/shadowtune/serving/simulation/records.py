"""What each side answered, how long it took and how sure it was: written once, replayed often."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shadowtune.config.checking import from_mapping
from shadowtune.errors import ConfigError, DataError
from shadowtune.serving.edge.signals import NOTHING, Signals

SCHEMA = 1


@dataclass(frozen=True)
class Answered:
    """One side's answer to one request, as measured with nothing else to do."""

    text: str
    score: float
    """Between 0, wrong, and 1, right."""
    seconds: float
    first_seconds: float
    """Seconds until the first token, which is how long it takes to read the prompt."""
    prompt_tokens: int
    completion_tokens: int
    tokens: list[int] = field(default_factory=list)
    """Ids of the answer's tokens, of one tokenizer on both sides."""
    signals: Signals = NOTHING
    """How sure an edge was."""


@dataclass(frozen=True)
class Record:
    """One request and what each side answered."""

    edge: Answered
    cloud: Answered
    lora: Answered | None = None
    """Of another model in the cloud's place."""
    request_bytes: int = 0
    """Length of the prompt as UTF-8."""


class Recording:
    """The answers of one side in a file of JSON lines, which grows while it answers.

    The first line says of what they are; what an interrupted recording has stays, and is gone on with.

    Args:
        file: made if it is missing.
        origin: plain values that name the model, the rows and whatever else the answers depend on.

    Raises:
        DataError: if the file holds answers of another origin, or is damaged.
    """

    def __init__(self, file: Path, origin: Mapping[str, Any]) -> None:
        self.file, self.origin = file, {"schema": SCHEMA, **origin}
        self.answers: list[Answered] = []
        if file.is_file() and file.stat().st_size:
            self._read()
        else:
            file.write_text(json.dumps(self.origin) + "\n", encoding="utf-8")

    def add(self, answered: Answered) -> None:
        """Keep the answer to the next request."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(answered)) + "\n")
        self.answers.append(answered)

    def _read(self) -> None:
        """Read the answers; a last line that was not finished is cut off."""
        whole, end, _ = self.file.read_bytes().rpartition(b"\n")
        first, *lines = (whole + end).decode("utf-8", "replace").splitlines() or [""]
        parsed = _parse(first, f"{self.file}, line 1")
        if parsed != self.origin:
            differing = ", ".join(_differences(parsed, self.origin))
            raise DataError(f"{self.file} was recorded with another {differing}; delete it, or name another --output")
        for number, line in enumerate(lines, start=2):
            place = f"{self.file}, line {number}"
            try:
                self.answers.append(from_mapping(Answered, _parse(line, place), where=""))
            except ConfigError as error:
                raise DataError(f"{place}: {error}; delete the file to record anew") from None
        with self.file.open("r+b") as kept:
            kept.truncate(len(whole + end))


def _parse(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise DataError(f"{place} is damaged; delete the file to record anew") from None


def _differences(found: Any, wanted: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(found, Mapping):
        yield "program"
        return
    yield from (name for name in wanted if found.get(name) != wanted[name])
