"""The work of one job, in a process of its own: train, evaluate, and write the result row into the run directory.

A separate process has a peak memory of its own and cannot be changed by other runs.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from shadowtune.comparison.job import EvaluationRequest, Job, PerplexityRequest, read_json, write_json
from shadowtune.config.training import TrainConfig
from shadowtune.evaluation.run import FinishedRun
from shadowtune.model.methods import load_base
from shadowtune.model.quantization import quantization_arguments
from shadowtune.provenance import provenance
from shadowtune.training.run import train
from shadowtune.training.training_data import load_tokenizer


@dataclass
class BareBase(FinishedRun):
    """An untrained base with the interface of a finished run."""

    @classmethod
    def load(cls, job: Job) -> "BareBase":
        """Load base and tokenizer; raises CheckpointError if they are missing."""
        config = job.config
        dtype = vars(torch)[config.base_dtype]
        kwargs: dict[str, Any] = {"dtype": dtype, **quantization_arguments(config.base_quantization, dtype)}
        if config.revision is not None:
            kwargs["revision"] = config.revision
        model: Any = load_base(config.model, config.task, **kwargs).eval()
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        return cls(job.path, config, model, load_tokenizer(config.model, config.revision))

    @property
    def modes(self) -> tuple[str, ...]:
        """The base alone."""
        return ("base",)

    @contextmanager
    def mode(self, mode: str) -> Iterator[Any]:
        """Yield the base."""
        yield self.model


def run(job: Job) -> None:
    """Train and evaluate, except for the parts of the job that are done already; write the result row.

    Raises:
        ShadowtuneError: if training or an evaluation fails.
    """
    start = time.perf_counter()
    summary = None
    if job.trains:
        settings = replace(job.config, output=str(job.path), samples=0)  # they would count as training time
        summary = train(settings, resume=True, quiet=True)
        for checkpoints in list(job.path.rglob("checkpoints")):  # as large as the model, and no longer needed
            shutil.rmtree(checkpoints, ignore_errors=True)
    evaluations = list(_evaluations(job))
    job.write(
        training=None if summary is None else asdict(summary),
        evaluations=evaluations,
        forgetting=None if job.text is None else _forgetting(job, job.text),
        seconds=time.perf_counter() - start,
        provenance=provenance(),
    )


def _evaluations(job: Job) -> Iterator[dict[str, Any]]:
    """Evaluate each request and write its result; results of an interrupted job are read instead."""
    opened: FinishedRun | None = None
    attached: dict[str, list[list[int]]] = {}
    for request in job.requests:
        file = job.path / request.file
        if not file.is_file():
            opened = opened or (FinishedRun.open(job.path) if job.trains else BareBase.load(job))
            write_json(file, _evaluate(opened, request, attached.get(request.task)))
        result = read_json(file)
        if request.mode == "attached":
            attached[request.task] = result["answers"]
        yield {name: value for name, value in result.items() if name not in ("predictions", "answers")}


def _evaluate(finished: FinishedRun, request: EvaluationRequest, attached: list[list[int]] | None) -> dict[str, Any]:
    config: TrainConfig = replace(finished.config, data=request.data)
    result = replace(finished, config=config).evaluate(
        request.mode,
        source=request.source,
        split=request.split,
        limit=request.limit,
        batch_size=request.batch_size,
        compare_with=attached,
    )
    where = {"task": request.task, "mode": request.mode, "split": request.split, "limit": request.limit}
    return {**asdict(result), **where}


def _forgetting(job: Job, request: PerplexityRequest) -> dict[str, Any]:
    """Measure the loss on a text before and after training, and write it."""
    file = job.path / request.file
    if not file.is_file():
        finished = FinishedRun.open(job.path)
        after, tokens = finished.text_loss("attached", request.data, request.limit, request.batch_size)
        before = finished if "base" in finished.modes else BareBase.load(job)
        loss, _ = before.text_loss("base", request.data, request.limit, request.batch_size)
        write_json(file, {"text": request.data.train, "tokens": tokens, "loss_before": loss, "loss": after})
    found: dict[str, Any] = read_json(file)
    return found
