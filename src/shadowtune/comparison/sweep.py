"""The search for settings of one method: which trials there are, as far as the results of earlier ones tell.

1. Every setting of the grid, on each tuning task, with the first seed.
2. While the best is at an edge of the grid, and not more often than the limit allows: one more value beyond that edge.
3. The best few settings with all seeds; the best mean over tasks and seeds wins.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shadowtune.comparison.job import Job
from shadowtune.config.sweep import SweepConfig, beyond

Setting = dict[str, Any]


class Search:
    """The trials of a method on the tasks that it is tuned on.

    Args:
        sweep: its settings.
        grid: values to try, by dotted key.
        settings: the grid's combinations.
        tasks: whose validation rows decide.
        seeds: of the trials.
        make: makes a trial of a task, a setting and a seed.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        grid: Mapping[str, Sequence[Any]],
        settings: Sequence[Setting],
        tasks: Sequence[str],
        seeds: Sequence[int],
        make: Callable[[str, Setting, int], Job],
    ) -> None:
        self._sweep, self._grid, self._settings = sweep, grid, list(settings)
        self._tasks, self._seeds, self._make = tasks, seeds, make
        self._jobs: dict[tuple[str, str, int], Job] = {}

    def trials(self) -> list[Job]:
        """Return the trials that are known to be needed by now; there may be more once these are done."""
        return self._look()[0]

    def chosen(self) -> Setting | None:
        """Return the best setting; None if there are trials to do, or every one failed."""
        return self._look()[1]

    def is_done(self) -> bool:
        """Whether every trial has been done, or has failed."""
        return all(job.result() is not None for job in self.trials())

    def _look(self) -> tuple[list[Job], Setting | None]:
        settings, first = list(self._settings), self._seeds[:1]
        extensions = {1: 0, -1: 0}
        for _ in range(self._sweep.extend + 1):
            jobs = self._trials(settings, first)
            if any(job.result() is None for job in jobs):
                return jobs, None
            best = self._ranked(settings, first)[:1]
            side = self._edge(settings, best[0]) if best else 0
            if not side or sum(extensions.values()) == self._sweep.extend:
                break
            extensions[side] += 1
            ((key, values),) = self._grid.items()
            further = {key: beyond(values, side * extensions[side])}
            settings = [*settings, further] if side > 0 else [further, *settings]
        ranked = self._ranked(settings, first)
        if self._sweep.finalists == 1 or len(self._seeds) == 1 or len(ranked) < 2:
            return jobs, ranked[0] if ranked else None
        finalists = ranked[: self._sweep.finalists]
        more = self._trials(finalists, self._seeds[1:])
        if any(job.result() is None for job in more):
            return [*jobs, *more], None
        last = self._ranked(finalists, self._seeds) or finalists
        return [*jobs, *more], last[0]

    def _edge(self, settings: Sequence[Setting], best: Setting) -> int:
        """Return 1 or -1 if the best setting is at the upper or lower edge of what was tried, else 0."""
        if not self._sweep.extend or len(settings) < 3:
            return 0
        return 1 if best == settings[-1] else -1 if best == settings[0] else 0

    def _trials(self, settings: Sequence[Setting], seeds: Sequence[int]) -> list[Job]:
        return [self._job(task, setting, seed) for seed in seeds for task in self._tasks for setting in settings]

    def _job(self, task: str, setting: Setting, seed: int) -> Job:
        key = (task, repr(setting), seed)
        if key not in self._jobs:
            self._jobs[key] = self._make(task, setting, seed)
        return self._jobs[key]

    def _ranked(self, settings: Sequence[Setting], seeds: Sequence[int]) -> list[Setting]:
        """Return the settings of which no trial failed, the best first; of equals, the one nearest to the middle."""
        merits = {index: self._merit(setting, seeds) for index, setting in enumerate(settings)}
        middle = (len(settings) - 1) / 2
        sound = sorted((index for index, merit in merits.items() if merit), key=lambda index: abs(index - middle))
        return [settings[index] for index in sorted(sound, key=lambda index: merits[index], reverse=True)]

    def _merit(self, setting: Setting, seeds: Sequence[int]) -> tuple[float, ...]:
        """Return what the setting is judged by, means over tasks and seeds; nothing if one of its trials failed."""
        rows = [self._job(task, setting, seed).result() for seed in seeds for task in self._tasks]
        assert all(row is not None for row in rows), "a trial has not been done"
        found = [row["evaluations"][0] for row in rows if row is not None and row["error"] is None]
        if len(found) < len(rows):
            return ()
        loss = -sum(each["loss"] for each in found) / len(found)
        accuracy = sum(each["accuracy"] for each in found) / len(found)
        return (accuracy, loss) if self._sweep.select == "accuracy" else (loss,)
