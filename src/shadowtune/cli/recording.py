"""Both sides' answers to labelled requests: measured once, kept in files, one for each side."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.cli.labelled import Labelled, LabelledSet, data_of_format, read_labelled
from shadowtune.cli.output import ProgressBar
from shadowtune.cli.trained import is_run
from shadowtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from shadowtune.config.cloud import CloudConfig
    from shadowtune.serving.requests import Backend, GenerationRequest
    from shadowtune.serving.simulation.records import AnswerFile, RecordedAnswer

NAME = "model"
"""What a model of ours is asked for by, while it is measured."""


@dataclass(frozen=True)
class Side:
    """Someone whose answers are to be recorded."""

    name: str
    """Of the file, and in messages."""
    source: str
    """A run, a detached model's files, or an address."""
    open: Callable[[], "Backend"]
    far: bool = False
    """Whether it is asked in messages, as users do, where that is possible."""

    @property
    def stamp(self) -> int | None:
        """When its files were written last, in nanoseconds; None of a far server."""
        if self.far:
            return None
        path = Path(self.source)
        place = path / "model" if is_run(path) else path
        return max((file.stat().st_mtime_ns for file in place.rglob("*")), default=place.stat().st_mtime_ns)


def edge_side(source: str) -> Side:
    """The detached model: a run, or what ``detach`` and ``export`` write; raises CheckpointError if it is neither."""
    if not Path(source).exists():
        raise CheckpointError(f"--edge {source} does not exist; name a run, a detached directory or a GGUF file")
    return Side("edge", source, partial(_open_edge, Path(source)))


def far_side(name: str, cloud: "CloudConfig") -> Side:
    """A server with OpenAI's API."""
    from shadowtune.serving.edge.remote import RemoteEndpoint

    return Side(name, cloud.url, partial(RemoteEndpoint, cloud), far=True)


def run_side(name: str, source: str) -> Side:
    """A run's model, with all that was trained; raises CheckpointError if it is no run that generates."""
    from shadowtune.evaluation.run import read_run_config

    if read_run_config(Path(source)).task != "causal_lm":
        raise ConfigError(f"--{name} {source} is a classification run; it has classes to tell, and no answers")
    return Side(name, source, partial(_open_run, Path(source), detached=False))


def labelled_of(edge: Side, cloud: Side, source: str | None, split: str, limit: int | None) -> LabelledSet:
    """Read the requests as the cloud would if it is a run, else as the edge's files say.

    Raises:
        ConfigError: if no side is a run, and there is no other source.
    """
    from shadowtune.evaluation.run import read_run_config, run_dataset
    from shadowtune.export.exporting import read_tokenizer

    run = next((Path(side.source) for side in (cloud, edge) if not side.far and is_run(Path(side.source))), None)
    if run is not None:
        data = run_dataset(run, read_run_config(run))
        return read_labelled(data, read_tokenizer(str(run / "model")), source, split, limit)
    if source is None:
        raise ConfigError("neither side is a run with rows of its own; name a file of requests")
    from shadowtune.export.loading import load_model

    opened = load_model(Path(edge.source))
    return read_labelled(data_of_format(opened.prompt_format, source), opened.tokenizer, source, split, limit)


def record(side: Side, labelled: LabelledSet, directory: Path, quiet: bool = False) -> "list[RecordedAnswer]":
    """Return a side's answers: those in its file, and from where they end on the ones it gives now.

    Raises:
        DataError: if the file holds answers of another model or to other requests.
        RequestError: if the side does not answer.
    """
    from shadowtune.serving.simulation.records import AnswerFile

    origin = {"model": side.source, "version of the model": side.stamp, "set of requests": labelled.digest}
    recording = AnswerFile(directory / f"{side.name}.jsonl", origin)
    if len(recording.answers) < len(labelled.requests):
        with ProgressBar(quiet) as bar:
            show = partial(bar.show, f"{side.name}: {side.source}")
            asyncio.run(_answer(side, labelled, recording, show))
    return recording.answers


async def _answer(side: Side, labelled: LabelledSet, recording: "AnswerFile", show: Callable[[int, int], None]) -> None:
    """Ask what has not been answered yet, one after the other."""
    from shadowtune.serving.simulation.records import measure

    backend = side.open()

    async def ask(number: int) -> "RecordedAnswer":
        asked = _request(labelled.requests[number], labelled.max_new_tokens, side.far)
        return await measure(backend, asked, partial(labelled.score, number), labelled.tokenize)

    try:
        todo = range(len(recording.answers), len(labelled.requests))
        await ask(todo[0])  # and forget: the first time everything is slower
        for number in todo:
            recording.add(await ask(number))
            show(number + 1, len(labelled.requests))
    finally:
        await backend.aclose()


def _request(asked: Labelled, max_new_tokens: int, far: bool) -> "GenerationRequest":
    from shadowtune.serving.requests import GenerationRequest, SamplingParams

    words: dict[str, Any] = {"prompt": asked.prompt}
    if far and asked.messages is not None:
        words = {"messages": asked.messages}
    return GenerationRequest(NAME, **words, max_tokens=max_new_tokens, sampling=SamplingParams(temperature=0))


def _open_edge(path: Path) -> "Backend":
    from shadowtune.export.loading import load_model
    from shadowtune.serving.edge.local import LocalModel

    return _open_run(path, detached=True) if is_run(path) else LocalModel(load_model(path), NAME)


def _open_run(path: Path, detached: bool) -> "Backend":
    from shadowtune.evaluation.run import FinishedRun
    from shadowtune.export.loading import wrap_model
    from shadowtune.serving.edge.local import LocalModel

    run = FinishedRun.open(path)
    if detached:
        if not run.config.leaves_shadow:
            raise ConfigError(f"{path} is a {run.config.method} run; only a shadow runs alone at the edge")
        model = run.model.detached()
    elif run.config.leaves_shadow or run.config.method == "full":
        model = run.model
    else:
        model = run.model.get_base_model()  # its layers are the adapted ones
    return LocalModel(wrap_model(model, run.tokenizer, run.prompt_format), NAME)
