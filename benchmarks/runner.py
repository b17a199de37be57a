"""Run a benchmark: one process for each candidate, samples in turn, one result row for each pair and case."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.benchmark import Benchmark, BenchmarkPlan, Candidate, Settings
from benchmarks.methods import HINT
from benchmarks.result_files import Measurement, comparison
from shadowtune.comparison.worker_process import WorkerProcess
from shadowtune.model.budget import check_equal

Progress = Callable[[str, int, int], None]
"""Called with the current piece of work, the number of finished ones and their total."""
_candidates: dict[str, Candidate] = {}
"""The open candidate of a worker process, by name."""


def open_candidate(
    open_: Callable[..., Candidate], settings: Settings, name: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """In a worker: load a candidate and return its size."""
    gc.freeze()  # a collection that goes through the objects of all imported libraries takes longer than many a step
    _candidates[name] = open_(settings, name, **arguments)
    return _facts(name)


def prepare(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker: prepare a case; return the candidate's size and its peak memory in MB."""
    peak = _candidates[name].prepare(values)
    return {**_facts(name), "peak_memory_mb": peak}


def measure(name: str) -> float:
    """In a worker: take one sample."""
    return _candidates[name].measure()


def _facts(name: str) -> dict[str, Any]:
    candidate = _candidates[name]
    return {
        "size": candidate.size,
        "trainable_parameters": candidate.trainable_parameters,
        "facts": dict(candidate.facts),
    }


def run_benchmark(
    benchmark: Benchmark,
    settings: Settings,
    plan: BenchmarkPlan,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[list[dict[str, Any]]]:
    """Measure ours against each baseline; yield the rows of each case when it is done.

    The candidates take turns - A B C A B C ... - and the others are idle meanwhile.

    Raises:
        ConfigError: if the candidates, once loaded, do not train equally many parameters.
        ShadowtuneError: if a candidate cannot be loaded or measured.
    """
    ours, *baselines = plan.candidates
    context = {name: vars(settings)[name] for name in benchmark.context}
    hint = "try a smaller --batch, or other --baselines"
    with contextlib.ExitStack() as stack:
        count = _Counter(progress, len(plan.candidates) * (1 + len(plan.cases) * (1 + settings.repeats)))
        workers = {name: stack.enter_context(WorkerProcess(name, hint)) for name in plan.candidates}
        trained = {}
        for name, worker in workers.items():
            with count(f"load {name}"):
                facts = worker.call(open_candidate, benchmark.open, settings, name, plan.candidates[name])
            trained[name] = facts["trainable_parameters"]
        check_equal(ours, trained, HINT)
        for case in plan.cases:
            measured = {}
            for name, worker in workers.items():
                with count(f"{case.name}: warm up {name}"):
                    measured[name] = Measurement(name, **worker.call(prepare, name, dict(case.values)))
            check_equal(ours, {name: each.trainable_parameters for name, each in measured.items()}, HINT)
            for _ in range(settings.repeats):
                for name, worker in workers.items():
                    with count(f"{case.name}: {name}"):
                        measured[name].samples.append(worker.call(measure, name))
            yield [
                comparison(benchmark, case.name, measured[ours], measured[baseline], context) for baseline in baselines
            ]


class _Counter:
    """Reports each piece of work at its begin and end."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self.progress(what, self.done, self.total)
        yield
        self.done += 1
        self.progress(what, self.done, self.total)
