"""Run a benchmark: a process for each subject, samples in turn, a row for each pair."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from shadowtune.benchmark.bench import Bench, Plan, Settings
from shadowtune.benchmark.peers import WAY_OUT
from shadowtune.benchmark.process import WorkerProcess
from shadowtune.benchmark.rows import Measured, comparison
from shadowtune.model.budget import check_equal

Progress = Callable[[str, int, int], None]
"""Called with what is done now, how many pieces of work are done, and how many there are."""


def run_bench(
    bench: Bench, settings: Settings, plan: Plan, progress: Progress = lambda what, done, total: None
) -> Iterator[list[dict[str, Any]]]:
    """Measure ours against each peer; yield the rows of each case when it is done.

    The subjects take turns - A B C A B C ... - and only the one whose turn it is works.

    Raises:
        ConfigError: if the subjects, once loaded, do not train equally many parameters.
        ShadowtuneError: if a subject cannot be loaded or measured.
    """
    ours, *peers = plan.subjects
    context = {name: vars(settings)[name] for name in bench.context}
    with contextlib.ExitStack() as stack:
        count = _Counter(progress, len(plan.subjects) * (1 + len(plan.cases) * (1 + settings.repeats)))
        workers = {name: stack.enter_context(WorkerProcess(name)) for name in plan.subjects}
        trained = {}
        for name, worker in workers.items():
            with count(f"load {name}"):
                facts = worker.call(
                    "open", bench=bench.name, settings=asdict(settings), name=name, arguments=plan.subjects[name]
                )
            trained[name] = facts["trainable_parameters"]
        check_equal(ours, trained, WAY_OUT)
        for case in plan.cases:
            measured = {}
            for name, worker in workers.items():
                with count(f"{case.name}: warm up {name}"):
                    measured[name] = Measured(name, **worker.call("prepare", values=dict(case.values)))
            check_equal(ours, {name: subject.trainable_parameters for name, subject in measured.items()}, WAY_OUT)
            for _ in range(settings.repeats):
                for name, worker in workers.items():
                    with count(f"{case.name}: {name}"):
                        measured[name].samples.append(worker.call("measure"))
            yield [comparison(bench, case.name, measured[ours], measured[peer], context) for peer in peers]


class _Counter:
    """Reports each piece of work when it begins and when it is done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self.progress(what, self.done, self.total)
        yield
        self.done += 1
        self.progress(what, self.done, self.total)
