"""The runs of a comparison: trials of the hyperparameter search, and the runs of the report at equal parameters."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shadowtune.comparison.job import EvaluationRequest, Job, PerplexityRequest, RowDigests
from shadowtune.comparison.sizes import ParameterCounter, Size, solve_sizes
from shadowtune.config.comparison import CompareConfig
from shadowtune.config.data import DataConfig
from shadowtune.config.sweep import SweepConfig, beyond, default_rates
from shadowtune.config.training import TrainConfig
from shadowtune.data.dataset import Dataset

RUNS = "runs"
"""Name of the directory of all run directories."""
Setting = dict[str, Any]
"""Values by dotted keys."""
Chosen = dict[tuple[str, str], Setting]
"""The best setting of the sweep by (task, method)."""


class Search:
    """Hyperparameter search of one method: the trials that are needed, given the results of earlier ones.

    1. Every setting of the grid, on each tuning task, with the first seed.
    2. While the best is at an edge of the grid, up to a limit: one more value beyond that edge.
    3. The best few settings with all seeds; the best mean over tasks and seeds wins.

    Args:
        sweep: its settings.
        grid: values by dotted key.
        settings: the grid's combinations.
        tasks: the tuning tasks; their validation examples decide.
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
        """Return the trials that are known to be needed by now; their results may add further ones."""
        return self._evaluate()[0]

    def chosen(self) -> Setting | None:
        """Return the best setting; None if trials are missing, or all failed."""
        return self._evaluate()[1]

    def _evaluate(self) -> tuple[list[Job], Setting | None]:
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
        """Return 1 or -1 if the best setting is the last or the first of those tried, else 0."""
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
        """Return the settings without a failed trial, the best first; of equals, the one nearest to the middle."""
        scores = {index: self._score(setting, seeds) for index, setting in enumerate(settings)}
        middle = (len(settings) - 1) / 2
        sound = sorted((index for index, score in scores.items() if score), key=lambda index: abs(index - middle))
        return [settings[index] for index in sorted(sound, key=lambda index: scores[index], reverse=True)]

    def _score(self, setting: Setting, seeds: Sequence[int]) -> tuple[float, ...]:
        """Return the selection criterion, means over tasks and seeds; empty if one of the trials failed."""
        rows = [self._job(task, setting, seed).result() for seed in seeds for task in self._tasks]
        assert all(row is not None for row in rows), "a trial has not been done"
        found = [row["evaluations"][0] for row in rows if row is not None and row["error"] is None]
        if len(found) < len(rows):
            return ()
        loss = -sum(each["loss"] for each in found) / len(found)
        accuracy = sum(each["accuracy"] for each in found) / len(found)
        return (accuracy, loss) if self._sweep.select == "accuracy" else (loss,)


def run_path(config: CompareConfig, run: str = "") -> Path:
    """Return the directory of a run by its name, or that of all runs."""
    return Path(config.output) / RUNS / run


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison, with every size chosen."""

    config: CompareConfig
    sizes: dict[str, dict[str, Size]]
    """By task and method."""
    counter: ParameterCounter = field(default_factory=ParameterCounter)
    digests: RowDigests = field(default_factory=RowDigests)

    @classmethod
    def of(cls, config: CompareConfig) -> "Plan":
        """Choose the sizes; raises ShadowtuneError if that is not possible, or a task is unknown."""
        for task in config.tasks:
            Dataset.open(config.train_config(task, config.best_of()).data)
        counter = ParameterCounter()
        tasks = dict.fromkeys([*config.chosen_tasks, *config.tuning_tasks])
        return cls(config, {task: solve_sizes(config, task, counter) for task in tasks}, counter)

    def searches(self) -> dict[tuple[tuple[str, ...], str], Search]:
        """Return the search of each method by (its tasks, method); none without a sweep."""
        config, sweep = self.config, self.config.sweep
        if sweep is None:
            return {}
        groups = [(task,) for task in config.chosen_tasks] if sweep.tasks is None else [tuple(config.chosen_tasks)]
        found = {}
        for tasks, method in itertools.product(groups, config.trained_methods):
            tuned = list(tasks) if sweep.tasks is None else sweep.tasks
            if any(self.sizes[task][method].refused for task in tuned):
                continue

            def make(task: str, setting: Setting, seed: int, method: str = method) -> Job:
                return self.job("trial", task, method, seed, setting, sweep.settings)

            grid = sweep.grid_of(method, default_rates(config.baseline(method)))
            seeds = sweep.seeds or config.seeds
            found[tasks, method] = Search(sweep, grid, config.trials(method), tuned, seeds, make)
        return found

    def trials(self) -> list[Job]:
        """Return the trials of all searches that are known to be needed by now."""
        return [job for search in self.searches().values() for job in search.trials()]

    def finals(self, chosen: Chosen | None = None) -> list[Job]:
        """Return the runs of the report, all methods of a seed before the next, the base's first.

        Args:
            chosen: the best settings of the sweep; a (task, method) without one is left out. None without a sweep.
        """
        config, jobs = self.config, []
        for task in config.chosen_tasks:
            bases = [method for method in config.chosen_methods if config.kind(method) == "base"]
            jobs += [self.job("final", task, method, config.seeds[0]) for method in bases]
            for seed, method in itertools.product(config.seeds, config.trained_methods):
                able = not self.sizes[task][method].refused
                if able and (chosen is None or (task, method) in chosen):
                    jobs.append(self.job("final", task, method, seed, (chosen or {}).get((task, method))))
        return jobs

    def refused(self) -> list[dict[str, Any]]:
        """Return a row for each method that cannot be compared on a task: task, method and reason."""
        return [
            {"task": task, "method": method, "why": size.refused}
            for task in self.config.chosen_tasks
            for method in self.config.chosen_methods
            if (size := self.sizes[task][method]).refused
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat row for each method on each task: trainable parameters, size, numbers of trials and runs."""
        config = self.config
        found = []
        for task in config.chosen_tasks:
            for method in config.chosen_methods:
                size = self.sizes[task][method]
                trained = method in config.trained_methods and not size.refused
                row: dict[str, Any] = {"task": task, "method": method, "trainable_parameters": size.parameters}
                row["size"] = size.refused or str(size)
                row["trials"] = self._count_trials(method) if trained and task in config.tuning_tasks else 0
                runs = len(config.seeds) if trained else 0 if size.refused else 1
                found.append({**row, "runs": runs})
        return found

    def _count_trials(self, method: str) -> int:
        """Number of trials of a method on a tuning task, without those beyond its grid."""
        sweep, grid = self.config.sweep, len(self.config.trials(method))
        if sweep is None or sweep.finalists == 1:
            return grid
        return grid + (len(sweep.seeds or self.config.seeds) - 1) * min(sweep.finalists, grid)

    def job(
        self,
        stage: Literal["trial", "final"],
        task: str,
        method: str,
        seed: int,
        setting: Setting | None = None,
        more: Mapping[str, Any] | None = None,
        size: Size | None = None,
    ) -> Job:
        """Return a run of a method on a task.

        Args:
            stage: "trial" or "final".
            task: its name.
            method: its name.
            seed: of the run.
            setting: settings that the sweep tries or chose.
            more: further settings by dotted keys, which ``setting`` replaces.
            size: replaces the one chosen for equal parameters.
        """
        config, size = self.config, size or self.sizes[task][method]
        trains = config.kind(method) != "base"
        given = {**size.changes, **self._shared_rows(stage, task, method), **(more or {}), **(setting or {})}
        settings = config.train_config(task, method, given)
        settings = replace(settings, output=str(run_path(config)), seed=seed if trains else settings.seed)
        tested = [task] if stage == "trial" else config.task_options(task).test_tasks or [task]
        modes = ["base"] if not trains else ["attached"]
        if stage == "final" and settings.leaves_shadow and trains:
            modes.append("detached")
        requests = tuple(self._request(stage, other, method, mode) for other in tested for mode in modes)
        text = self._text(settings) if stage == "final" and trains else None
        training, selection = self._training_rows(settings) if trains else (("", 0), ("", 0))
        limits = {
            "training": settings.data.limit,
            "validation": settings.data.validation_limit if selection[1] else None,
        }
        return Job(
            stage,
            task,
            method,
            seed,
            settings,
            trains,
            requests,
            setting or {},
            str(size) or None,
            text=text,
            rows=" ".join(filter(None, (training[0], selection[0]))),
            row_counts=(training[1], selection[1]),
            asked={name: limit for name, limit in limits.items() if limit is not None and trains},
        )

    def _training_rows(self, settings: TrainConfig) -> tuple[tuple[str, int], tuple[str, int]]:
        """Digests and numbers of the training examples, and of the validation examples that training selects by."""
        learned = self.digests.training(settings.data)
        if not settings.reads_validation or settings.data.learn_validation:
            return learned, ("", 0)
        return learned, self.digests.validation(settings.data)

    def _shared_rows(self, stage: str, task: str, method: str) -> dict[str, Any]:
        """Settings that train a method on the validation examples that others select by, if the config asks for it.

        The others are all methods of the config: a piece of a comparison learns from the rows that the whole does.
        """
        config = self.config
        if config.validation_rows != "all" or stage == "trial" or config.kind(method) == "base":
            return {}
        trained = (name for name in config.methods if config.kind(name) != "base")
        readers = [run for name in trained if (run := config.train_config(task, name)).reads_validation]
        if not readers or config.train_config(task, method).reads_validation:
            return {}
        data = readers[0].data
        names = ("validation", *(["validation_split"] if data.task is None else []), "validation_limit")
        return {**{f"data.{name}": vars(data)[name] for name in names}, "data.learn_validation": True}

    def _request(self, stage: str, task: str, method: str, mode: str) -> EvaluationRequest:
        """Request validation examples in a trial, and test examples in a run of the report."""
        options = self.config.task_options(task)
        data = self.config.train_config(task, method).data
        where: dict[str, Any] = {"split": options.test_split, "source": options.test, "limit": options.test_limit}
        if stage != "final":
            rows = None if data.task is not None else data.validation
            where = {"split": data.validation_split, "source": rows, "limit": options.validation_limit}
        digest = self.digests.held_out(data, **where)[0]
        size = self.config.test_batch_size
        return EvaluationRequest(task=task, mode=mode, batch_size=size, data=data, rows=digest, **where)

    def _text(self, settings: TrainConfig) -> PerplexityRequest | None:
        """Request the perplexity on the text that forgetting is measured on."""
        wanted = self.config.forgetting
        if wanted is None or settings.task != "causal_lm":
            return None
        folder = Path(self.config.directory or "") / wanted.text
        text = str(folder) if self.config.directory is not None and folder.is_dir() else wanted.text
        data = DataConfig(train=text, train_split=wanted.split, block_size=wanted.length)
        digest = self.digests.training(data)[0]
        return PerplexityRequest(data, wanted.limit, self.config.test_batch_size, digest)
