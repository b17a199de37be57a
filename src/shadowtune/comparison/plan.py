"""From the settings of a comparison to its single runs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shadowtune.comparison.data_digests import RowDigests
from shadowtune.comparison.job import Job, Request, TextRequest
from shadowtune.comparison.sizes import ParameterCounter, Size, solve_sizes
from shadowtune.comparison.sweep import Search, Setting
from shadowtune.config.baselines import default_rates
from shadowtune.config.comparison import CompareConfig
from shadowtune.config.data import DataConfig
from shadowtune.config.training import TrainConfig
from shadowtune.data.dataset import Dataset

RUNS = "runs"
"""Directory of the run directories in that of the comparison."""
Chosen = dict[tuple[str, str], Setting]
"""The best setting of the sweep by (task, method)."""


def run_path(config: CompareConfig, run: str = "") -> Path:
    """Return the directory of a run of a comparison by its name, or that of all runs."""
    return Path(config.output) / RUNS / run


@dataclass(frozen=True)
class Plan:
    """A comparison with every size chosen."""

    config: CompareConfig
    sizes: dict[str, dict[str, Size]]
    """By task and method."""
    counter: ParameterCounter = field(default_factory=ParameterCounter)
    digests: RowDigests = field(default_factory=RowDigests)

    @classmethod
    def of(cls, config: CompareConfig) -> "Plan":
        """Choose the sizes; raises ShadowtuneError if that is not possible, or there is no task of a name."""
        for task in config.tasks:
            Dataset.open(config.train_config(task, config.best_of()).data)
        counter = ParameterCounter()
        tasks = dict.fromkeys([*config.chosen_tasks, *config.tuning_tasks])
        return cls(config, {task: solve_sizes(config, task, counter) for task in tasks}, counter)

    def searches(self) -> dict[tuple[tuple[str, ...], str], Search]:
        """Return the search of each method by (the tasks that it is for, method); none without a sweep."""
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
        """Return the runs of the sweep that are known by now, in the order in which they are done."""
        return [job for search in self.searches().values() for job in search.trials()]

    def finals(self, chosen: Chosen | None = None) -> list[Job]:
        """Return the runs that count, all methods of a seed before the next, the base's first.

        Args:
            chosen: the best setting of the sweep by (task, method), what is not in it being left out; None takes the
                settings as they are.
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
        """Return a row for each method that cannot be compared on a task: task, method and why."""
        return [
            {"task": task, "method": method, "why": size.refused}
            for task in self.config.chosen_tasks
            for method in self.config.chosen_methods
            if (size := self.sizes[task][method]).refused
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat row for each method on each task: what it trains, how it was sized, how often it runs."""
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
        """How many trials a method has on a tuning task, those beyond its grid left out."""
        sweep, grid = self.config.sweep, len(self.config.trials(method))
        if sweep is None or sweep.finalists == 1:
            return grid
        return grid + (len(sweep.seeds or self.config.seeds) - 1) * min(sweep.finalists, grid)

    def job(
        self,
        stage: Any,
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
            setting: what the sweep tries or chose, by dotted keys.
            more: further settings by dotted keys, which ``setting`` replaces.
            size: in place of what was chosen for equal parameters.
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
        learned, chooses = self._learned(settings) if trains else (("", 0), ("", 0))
        limits = {"training": settings.data.limit, "validation": settings.data.validation_limit if chooses[1] else None}
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
            rows=" ".join(filter(None, (learned[0], chooses[0]))),
            row_counts=(learned[1], chooses[1]),
            asked={name: limit for name, limit in limits.items() if limit is not None and trains},
        )

    def _learned(self, settings: TrainConfig) -> tuple[tuple[str, int], tuple[str, int]]:
        """Digests and numbers of the training rows, and of the validation rows that training chooses by."""
        learned = self.digests.training(settings.data)
        if not settings.reads_validation or settings.data.learn_validation:
            return learned, ("", 0)
        return learned, self.digests.validation(settings.data)

    def _shared_rows(self, stage: str, task: str, method: str) -> dict[str, Any]:
        """Settings by which a method learns the validation rows that another one chooses by, where it is asked for."""
        config = self.config
        if config.validation_rows != "all" or stage == "trial" or config.kind(method) == "base":
            return {}
        readers = [run for name in config.trained_methods if (run := config.train_config(task, name)).reads_validation]
        if not readers or config.train_config(task, method).reads_validation:
            return {}
        data = readers[0].data
        names = ("validation", *(["validation_split"] if data.task is None else []), "validation_limit")
        return {**{f"data.{name}": vars(data)[name] for name in names}, "data.learn_validation": True}

    def _request(self, stage: str, task: str, method: str, mode: str) -> Request:
        """Ask for validation rows in a trial, and for test rows in a run that counts."""
        options = self.config.task_options(task)
        data = self.config.train_config(task, method).data
        where: dict[str, Any] = {"split": options.test_split, "source": options.test, "limit": options.test_limit}
        if stage != "final":
            rows = None if data.task is not None else data.validation
            where = {"split": data.validation_split, "source": rows, "limit": options.validation_limit}
        digest = self.digests.held_out(data, **where)[0]
        size = self.config.test_batch_size
        return Request(task=task, mode=mode, batch_size=size, data=data, rows=digest, **where)

    def _text(self, settings: TrainConfig) -> TextRequest | None:
        """Ask for the perplexity on the text that forgetting is measured on."""
        wanted = self.config.forgetting
        if wanted is None or settings.task != "causal_lm":
            return None
        folder = Path(self.config.directory or "") / wanted.text
        text = str(folder) if self.config.directory is not None and folder.is_dir() else wanted.text
        data = DataConfig(train=text, train_split=wanted.split, block_size=wanted.length)
        digest = self.digests.training(data)[0]
        return TextRequest(data, wanted.limit, self.config.test_batch_size, digest)
