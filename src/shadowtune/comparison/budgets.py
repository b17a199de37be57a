"""Further runs at equal time and at equal memory; their steps or sizes follow from the costs of the first runs.

The cost of a method is that of its run at equal parameters with the first seed. One factor scales every stage of a run,
so a recipe keeps its proportions; time that does not depend on the steps (fitting a weight) is not scaled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shadowtune.comparison.job import Job
from shadowtune.comparison.plan import Chosen, Plan
from shadowtune.comparison.sizes import Size, changes_for, growth_in
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ShadowtuneError

COLUMNS = {
    "parameters": "equal parameters and steps",
    "time": "equal wall time",
    "memory": "equal peak memory",
}
"""Headings by the names of the columns in result rows."""
SAME = 0.03
"""A cost that differs by less needs no further run: clocks and allocators vary as much."""
BYTES = {"float32": 16, "bfloat16": 8}
"""Bytes of training per parameter, by precision: the parameter, its gradient and AdamW's two moments."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Unmet:
    """A method without a run at equal time or memory, and the reason."""

    column: str
    task: str
    method: str
    why: str


class EqualCosts:
    """Plans the runs of the columns "time" and "memory".

    Args:
        plan: the comparison.
        chosen: the best settings of the sweep; None without one.
        finals: the runs at equal parameters, those of the first seed done or failed.
    """

    def __init__(self, plan: Plan, chosen: Chosen | None, finals: list[Job]) -> None:
        self._plan, self._chosen = plan, chosen
        self._finals = {(job.task, job.method, job.seed): job for job in finals}
        self.unmet: list[Unmet] = []

    def jobs(self) -> list[Job]:
        """Return all runs of both columns; a run that is equal already is one of ``finals`` with another column."""
        config, found = self._plan.config, []
        for column in self.columns():
            for task in config.chosen_tasks:
                for method in config.trained_methods:
                    found += self._column(column, task, method)
        return found

    def columns(self) -> list[str]:
        """Return the columns that the budget asks for, besides equal parameters."""
        budget = self._plan.config.budget
        return [name for name in ("time", "memory") if budget is not None and vars(budget)[name] is not None]

    def _column(self, column: str, task: str, method: str) -> list[Job]:
        config = self._plan.config
        like = vars(config.budget)[column]
        mine, theirs = self._first(task, method), self._first(task, like)
        for name, row in ((like, theirs), (method, mine)):
            if row is None:
                why = f"{name} has no finished run at equal parameters on {task}, seed {config.seeds[0]}"
                self.unmet.append(Unmet(column, task, method, why))
                return []
        assert mine is not None and theirs is not None
        solve = self._time if column == "time" else self._memory
        solved = {} if method == like else solve(task, method, mine, theirs)
        if isinstance(solved, str) and self._is_within_tolerance(column, mine, theirs):
            solved = {}
        if isinstance(solved, str):
            self.unmet.append(Unmet(column, task, method, solved))
            return []
        return [self._job(column, task, method, seed, solved) for seed in config.seeds]

    def _is_within_tolerance(self, column: str, mine: Row, theirs: Row) -> bool:
        """Whether the cost of a method's first run is within the tolerance of further runs."""
        key, budget = {"time": "train_seconds", "memory": "peak_memory_mb"}[column], self._plan.config.budget
        assert budget is not None
        ratio: float = mine["training"][key] / theirs["training"][key]
        return abs(ratio - 1) <= budget.measured_tolerance

    def _first(self, task: str, method: str) -> Row | None:
        """Result of the method's run at equal parameters with the first seed; None if there is none or it failed."""
        job = self._finals.get((task, method, self._plan.config.seeds[0]))
        row = None if job is None else job.result()
        return None if row is None or row["error"] else row

    def _job(self, column: str, task: str, method: str, seed: int, changes: dict[str, Any]) -> Job:
        if not changes:
            return replace(self._finals[task, method, seed], columns=(column,))
        size = self._plan.sizes[task][method]
        setting = None if self._chosen is None else self._chosen[task, method]
        changed = Size(size.parameters, {**size.changes, **changes})
        return replace(self._plan.job("final", task, method, seed, setting, size=changed), columns=(column,))

    def _time(self, task: str, method: str, mine: Row, theirs: Row) -> dict[str, Any] | str:
        """Return the settings with which a method takes the other's seconds, or the reason why there are none."""
        seconds, wanted = (row["training"]["train_seconds"] for row in (mine, theirs))
        fixed = mine["training"].get("fit_seconds") or 0.0
        if abs(seconds - wanted) <= SAME * wanted:
            return {}
        job = self._finals[task, method, self._plan.config.seeds[0]]
        factor = (wanted - fixed) / (seconds - fixed)
        steps = mine["training"]["steps"]
        if factor * steps < 1:
            return (
                f"not one of {method}'s {steps} steps fits into {wanted:.1f} s, the time of {theirs['method']} "
                f"({seconds:.1f} s for all, {fixed:.1f} s of them to fit a weight)"
            )
        return scaled(job.config, factor)

    def _memory(self, task: str, method: str, mine: Row, theirs: Row) -> dict[str, Any] | str:
        """Return the size at which a method should need the other's memory, or the reason why there is none."""
        needs, wanted = (row["training"]["peak_memory_mb"] for row in (mine, theirs))
        if abs(needs - wanted) <= SAME * wanted:
            return {}
        config, key = self._plan.config, self._plan.config.size_key(method)
        costs = f"{method} needs {needs:,.0f} MB, {theirs['method']} {wanted:,.0f} MB"
        if key is None:
            return f"{costs}, and {method} has no size to choose"
        train = self._finals[task, method, config.seeds[0]].config

        def count(changes: Mapping[str, Any]) -> int:
            return self._plan.counter.count(method, config.train_config(task, method, changes))

        growth = growth_in(key, train, count)
        now = self._plan.sizes[task][method].parameters
        aim = now + round((wanted - needs) * 2**20 / BYTES[train.trainable_dtype])
        if aim < growth.count(growth.step):
            fewest = needs - (now - growth.count(growth.step)) * BYTES[train.trainable_dtype] / 2**20
            return f"{costs}, and at its smallest size it still needs about {fewest:,.0f} MB"
        changes = changes_for(key, growth.nearest(aim), train)
        try:
            count(changes)
        except ShadowtuneError as error:  # the method does not support this size
            return f"{costs}; {error}"
        return changes


def scaled(config: TrainConfig, factor: float) -> dict[str, Any]:
    """Return the settings, by dotted keys, with which every stage of a run takes ``factor`` times as many passes."""
    found: dict[str, Any] = {}
    if config.max_steps is not None:
        found["max_steps"] = max(1, round(factor * config.max_steps))
    else:
        found["epochs"] = _rounded(factor * config.epochs)
    for name in ("shadow_epochs", "drafting_epochs"):
        if vars(config)[name]:
            found[name] = _rounded(factor * vars(config)[name])
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def merged(jobs: list[Job]) -> list[Job]:
    """Return each run once, in the order of its first appearance, with all of its columns."""
    found: dict[str, Job] = {}
    for job in jobs:
        key = str(job.result_file)
        if key in found:
            columns = dict.fromkeys([*found[key].columns, *job.columns])
            job = replace(found[key], columns=tuple(columns))
        found[key] = job
    return list(found.values())
