"""Evaluation sets of calibrate and simulate, and the answers of edge and cloud to them, recorded in files."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.cli.command import ProgressBar
from shadowtune.cli.loading import is_run
from shadowtune.cli.source import detached_model, last_change, open_source
from shadowtune.config.data import parse_template
from shadowtune.config.serving import CloudConfig
from shadowtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from shadowtune.data.dataset import Dataset
    from shadowtune.data.sources import Row
    from shadowtune.serving.requests import Backend, GenerationRequest
    from shadowtune.serving.simulation.records import AnswerFile, RecordedAnswer

NAME = "model"
"""Model name in the requests to our own models."""
EXTRA_TOKENS = 2
"""Tokens that an answer may have beyond the longest correct one: the space before it, and its end."""


@dataclass(frozen=True)
class EvaluationExample:
    """One request with its correct answers."""

    prompt: list[int]
    """Token ids, exactly as in training."""
    text: str
    """The same as text."""
    messages: tuple[dict[str, Any], ...] | None
    """The chat messages that a user would send; None if the example is more than one text of a user."""
    references: list[str]
    """All correct answers."""


@dataclass(frozen=True)
class EvaluationSet:
    """Requests with their common metric, limit and tokenizer."""

    requests: list[EvaluationExample]
    metric: str
    """One of ``evaluation.scoring.METRICS``."""
    max_new_tokens: int
    tokenizer: Any

    @property
    def digest(self) -> str:
        """SHA-256 of the requests, the metric and the limit."""
        known = [[vars(request) for request in self.requests], self.metric, self.max_new_tokens]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def tokenize(self, answer: str) -> list[int]:
        """Return the token ids of an answer."""
        return list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def score(self, index: int, answer: str) -> float:
        """Return the score of an answer to one request, between 0 and 1."""
        from shadowtune.evaluation.scoring import score_answers

        return score_answers(self.metric, [answer.strip()], [self.requests[index].references])[0][0]


@dataclass(frozen=True)
class AnswerSource:
    """A model or a remote endpoint whose answers are recorded."""

    name: str
    """Name of its file, and in messages."""
    source: str
    """A run, a detached model's files, or a URL."""
    open: Callable[[], "Backend"]
    remote: bool = False
    """Whether it is asked in chat messages, where that is possible, rather than with token ids."""

    @property
    def stamp(self) -> int | None:
        """Latest modification time of its files in nanoseconds; None of a remote endpoint."""
        if self.remote:
            return None
        return last_change(self.source)


def read_evaluation_set(
    data: "Dataset", tokenizer: Any, source: str | None, split: str, limit: int | None
) -> EvaluationSet:
    """Read requests as ``Dataset.held_out`` does, from the run's own data or another source.

    Raises:
        DataError: if there are none, or one has no answer.
    """
    rows = data.held_out(split, source, limit)[:limit]
    prompts = data.encode_prompts(rows, tokenizer)
    texts = tokenizer.batch_decode([prompt.input_ids for prompt in prompts])
    references = data.references(rows, prompts)
    requests = [
        EvaluationExample(prompt.input_ids, text, _messages(data, row), correct)
        for prompt, text, row, correct in zip(prompts, texts, rows, references, strict=True)
    ]
    longest = max(len(tokenizer(prompt.target, add_special_tokens=False)["input_ids"]) for prompt in prompts)
    return EvaluationSet(requests, data.metric, data.max_new_tokens or longest + EXTRA_TOKENS, tokenizer)


def edge_source(path: str) -> AnswerSource:
    """Return the detached model of a run, or files of ``detach`` or ``export``; raises CheckpointError if missing."""
    if not Path(path).exists():
        raise CheckpointError(f"--edge {path} does not exist; name a run, a detached directory or a GGUF file")
    return AnswerSource("edge", path, partial(_open_edge, path))


def remote_source(name: str, cloud: CloudConfig) -> AnswerSource:
    """Return a server with OpenAI's API."""
    from shadowtune.serving.edge.remote import RemoteEndpoint

    return AnswerSource(name, cloud.url, partial(RemoteEndpoint, cloud), remote=True)


def run_source(name: str, path: str) -> AnswerSource:
    """Return a run's whole model; raises CheckpointError or ConfigError if it is no run that generates."""
    from shadowtune.evaluation.run import read_run_config

    if read_run_config(Path(path)).task != "causal_lm":
        raise ConfigError(f"--{name} {path} is a classification run; it predicts classes and generates no answers")
    return AnswerSource(name, path, partial(_open_run, path))


def evaluation_set_of(
    edge: AnswerSource, cloud: AnswerSource, source: str | None, split: str, limit: int | None
) -> EvaluationSet:
    """Read the requests with the cloud's run, else with the edge's, else with the prompt format of the edge's files.

    Raises:
        ConfigError: if neither is a run, and there is no other source.
    """
    from shadowtune.evaluation.run import read_run_config, run_dataset
    from shadowtune.export.exporting import read_tokenizer

    own = [Path(each.source) for each in (cloud, edge) if not each.remote]
    run = next(filter(is_run, own), None)
    if run is not None:
        data = run_dataset(run, read_run_config(run))
        return read_evaluation_set(data, read_tokenizer(str(run / "model")), source, split, limit)
    if source is None:
        raise ConfigError("neither side is a run with rows of its own; name a file of requests")
    from shadowtune.evaluation.trained_model import data_of_format

    opened = open_source(edge.source)
    data = data_of_format(opened.prompt_format, source)
    return read_evaluation_set(data, opened.tokenizer, source, split, limit)


def record_answers(
    source: AnswerSource, evaluation_set: EvaluationSet, directory: Path, quiet: bool = False
) -> "list[RecordedAnswer]":
    """Return the answers of a source: those in its file, and new ones for the requests after them.

    Raises:
        DataError: if the file holds answers of another model or to other requests.
        RequestError: if the source does not answer.
    """
    from shadowtune.serving.simulation.records import AnswerFile

    origin = {
        "model": source.source,
        "version of the model": source.stamp,
        "set of requests": evaluation_set.digest,
    }
    recorded = AnswerFile(directory / f"{source.name}.jsonl", origin)
    if len(recorded.answers) < len(evaluation_set.requests):
        with ProgressBar(quiet) as bar:
            show = partial(bar.show, f"{source.name}: {source.source}")
            asyncio.run(_record(source, evaluation_set, recorded, show))
    return recorded.answers


async def _record(
    source: AnswerSource, evaluation_set: EvaluationSet, recorded: "AnswerFile", show: Callable[[int, int], None]
) -> None:
    """Send the requests without an answer, one after the other."""
    from shadowtune.serving.simulation.records import measure

    backend = source.open()
    total = len(evaluation_set.requests)

    async def ask(index: int) -> "RecordedAnswer":
        request = _request(evaluation_set.requests[index], evaluation_set.max_new_tokens, source.remote)
        return await measure(backend, request, partial(evaluation_set.score, index), evaluation_set.tokenize)

    try:
        await ask(len(recorded.answers))  # warm-up, not recorded
        for index in range(len(recorded.answers), total):
            recorded.add(await ask(index))
            show(index + 1, total)
    finally:
        await backend.aclose()


def _request(request: EvaluationExample, max_new_tokens: int, remote: bool) -> "GenerationRequest":
    from shadowtune.serving.requests import GenerationRequest, SamplingParams

    words: dict[str, Any] = {"prompt": request.prompt}
    if remote and request.messages is not None:
        words = {"messages": request.messages}
    return GenerationRequest(NAME, **words, max_tokens=max_new_tokens, sampling=SamplingParams(temperature=0))


def _messages(data: "Dataset", row: "Row") -> tuple[dict[str, Any], ...] | None:
    """Return a user's text as a chat message, if the example has one field of it."""
    if data.task is not None or row.get("tools") or row.get("chat_template_kwargs"):
        return None
    template_parts = [("", data.fields.prompt or "prompt")] if data.template is None else parse_template(data.template)
    fields = [name for _, name in template_parts if name is not None]
    text = row.get(fields[0]) if len(fields) == 1 else None
    return ({"role": "user", "content": text},) if isinstance(text, str) else None


def _open_edge(source: str) -> "Backend":
    from shadowtune.serving.edge.local import LocalModel

    return LocalModel(detached_model(open_source(source)), NAME)


def _open_run(path: str) -> "Backend":
    from shadowtune.serving.edge.local import LocalModel

    with open_source(path).loaded("attached") as opened:  # the mode in which a model is loaded
        return LocalModel(opened, NAME)
