"""The process of one run: trains, evaluates, and leaves the row of results in the run directory.

A process each, so that its peak memory is its own, and nothing it does can change another run.
"""

import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from shadowtune.benchmark.worker import serve_standard_streams
from shadowtune.comparison.job import Job, Request, TextRequest, read_json, write_json
from shadowtune.config.checking import from_mapping
from shadowtune.config.training import TrainConfig
from shadowtune.evaluation.run import FinishedRun
from shadowtune.model.methods import load_base, quantization_arguments
from shadowtune.provenance import provenance
from shadowtune.training.run import train
from shadowtune.training.training_data import load_tokenizer


@dataclass
class BareBase(FinishedRun):
    """A base that nobody trained, in the place of a finished run."""

    @classmethod
    def load(cls, job: Job) -> "BareBase":
        """Load base and tokenizer; raises CheckpointError if they are missing."""
        config = job.config
        dtype = vars(torch)[config.base_dtype]
        kwargs: dict[str, Any] = {"dtype": dtype, **quantization_arguments(config.base_quantization, dtype)}
        if config.revision is not None:
            kwargs["revision"] = config.revision
        model: Any = load_base(config.model, config.task, **kwargs).eval()
        if torch.cuda.is_available():
            model.to("cuda")
        return cls(job.path, config, model, load_tokenizer(config.model, config.revision))

    @property
    def modes(self) -> tuple[str, ...]:
        """The base alone."""
        return ("base",)

    @contextmanager
    def mode(self, mode: str) -> Iterator[Any]:
        """Give the base."""
        yield self.model


def run(job: dict[str, Any]) -> None:
    """Do what of a job is not done yet.

    Args:
        job: the fields of a ``Job``.

    Raises:
        ShadowtuneError: one of its kinds, with one line that says what is wrong.
    """
    wanted = from_mapping(Job, job, where="")
    start = time.perf_counter()
    summary = None
    if wanted.trains:
        summary = train(replace(wanted.config, output=str(wanted.path)), resume=True, quiet=True)
        for checkpoints in list(wanted.path.rglob("checkpoints")):  # as large as the model, and done with
            shutil.rmtree(checkpoints, ignore_errors=True)
    evaluations = list(_evaluations(wanted))
    forgetting = None if wanted.text is None else _forgetting(wanted, wanted.text)
    wanted.write(
        training=None if summary is None else asdict(summary),
        evaluations=evaluations,
        forgetting=forgetting,
        seconds=time.perf_counter() - start,
        provenance=provenance(),
    )


def _evaluations(job: Job) -> Iterator[dict[str, Any]]:
    """Evaluate as asked for, and keep each result; what an interrupted job has left is taken as it is."""
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


def _forgetting(job: Job, request: TextRequest) -> dict[str, Any]:
    """Measure the perplexity of a text before and after training, and keep it."""
    file = job.path / request.file
    if not file.is_file():
        finished = FinishedRun.open(job.path)
        after, tokens = finished.text_loss("attached", request.data, request.limit, request.batch_size)
        before = finished if "base" in finished.modes else BareBase.load(job)
        loss, _ = before.text_loss("base", request.data, request.limit, request.batch_size)
        write_json(file, {"text": request.data.train, "tokens": tokens, "loss_before": loss, "loss": after})
    found: dict[str, Any] = read_json(file)
    return found


def _evaluate(finished: FinishedRun, request: Request, attached: list[list[int]] | None) -> dict[str, Any]:
    config: TrainConfig = replace(finished.config, data=request.data)
    result = replace(finished, config=config).evaluate(
        request.mode,
        source=request.source,
        split=request.split,
        limit=request.limit,
        batch_size=request.batch_size,
        said=attached,
    )
    where = {"task": request.task, "mode": request.mode, "split": request.split, "limit": request.limit}
    return {**asdict(result), **where}


def lines_while_parent_lives(lines: Iterable[str]) -> Iterator[str]:
    """Pass lines on, and end this process at once where they end: nobody waits for it any more.

    Checkpoints and results are whole or absent, so nothing is lost but the steps since the last one.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            waiting.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()


if __name__ == "__main__":
    serve_standard_streams({"run": run}, lines_while_parent_lives(sys.stdin))
