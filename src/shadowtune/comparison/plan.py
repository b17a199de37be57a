"""From the settings of a comparison to its single runs."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shadowtune.comparison.job import Job, Request
from shadowtune.comparison.sizes import ParameterCounter, Size, solve_sizes
from shadowtune.config.comparison import CompareConfig
from shadowtune.data.dataset import Dataset

RUNS = "runs"
"""Directory of the run directories in that of the comparison."""


def run_path(config: CompareConfig, run: str = "") -> Path:
    """Return the directory of a run of a comparison by its name, or that of all runs."""
    return Path(config.output) / RUNS / run


@dataclass(frozen=True)
class Plan:
    """A comparison with every size chosen."""

    config: CompareConfig
    sizes: dict[str, dict[str, Size]]
    """By task and method."""

    @classmethod
    def of(cls, config: CompareConfig) -> "Plan":
        """Choose the sizes; raises ShadowtuneError if that is not possible, or there is no task of a name."""
        for task in config.tasks:
            Dataset.open(config.train_config(task, config.best_of()).data)
        counter = ParameterCounter()
        return cls(config, {task: solve_sizes(config, task, counter) for task in config.chosen_tasks})

    def trials(self) -> list[Job]:
        """Return the runs of the sweep, in the order in which they are done."""
        sweep = self.config.sweep
        if sweep is None:
            return []
        return [
            self._job("trial", task, method, self.config.seeds[0], setting, sweep.settings)
            for task in self.config.chosen_tasks
            for method in self._trained()
            for setting in sweep.trials(method)
        ]

    def finals(self, chosen: dict[tuple[str, str], dict[str, Any]] | None = None) -> list[Job]:
        """Return the runs that count, all methods of a seed before the next, the base's first.

        Args:
            chosen: the best setting of the sweep by (task, method), what is not in it being left out; None takes the
                settings as they are.
        """
        config, jobs = self.config, []
        for task in config.chosen_tasks:
            bases = [method for method in config.chosen_methods if config.kind(method) == "base"]
            jobs += [self._job("final", task, method, config.seeds[0]) for method in bases]
            for seed, method in itertools.product(config.seeds, self._trained()):
                if chosen is None or (task, method) in chosen:
                    jobs.append(self._job("final", task, method, seed, (chosen or {}).get((task, method))))
        return jobs

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat row for each method on each task: what it trains, how it was sized, how often it runs."""
        sweep, config = self.config.sweep, self.config
        found = []
        for task in config.chosen_tasks:
            for method in config.chosen_methods:
                trained, size = method in self._trained(), self.sizes[task][method]
                row = {"task": task, "method": method, "trainable_parameters": size.parameters, "size": str(size)}
                row["trials"] = len(sweep.trials(method)) if sweep is not None and trained else 0
                found.append({**row, "runs": len(config.seeds) if trained else 1})
        return found

    def _trained(self) -> list[str]:
        return [method for method in self.config.chosen_methods if self.config.kind(method) != "base"]

    def _job(
        self,
        stage: Any,
        task: str,
        method: str,
        seed: int,
        setting: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> Job:
        config, size = self.config, self.sizes[task][method]
        trains = config.kind(method) != "base"
        settings = config.train_config(task, method, {**size.changes, **(more or {}), **(setting or {})})
        settings = replace(settings, output=str(run_path(config)), seed=seed if trains else settings.seed)
        tested = [task] if stage == "trial" else config.task_options(task).test_tasks or [task]
        modes = ["base"] if not trains else ["attached"]
        if stage == "final" and settings.leaves_shadow and trains:
            modes.append("detached")
        requests = tuple(self._request(stage, other, method, mode) for other in tested for mode in modes)
        return Job(stage, task, method, seed, settings, trains, requests, setting or {}, str(size) or None)

    def _request(self, stage: str, task: str, method: str, mode: str) -> Request:
        """Ask for validation rows in a trial, and for test rows in a run that counts."""
        options = self.config.task_options(task)
        data = self.config.train_config(task, method).data
        if stage == "final":
            where: dict[str, Any] = {"split": options.test_split, "source": options.test, "limit": options.test_limit}
        else:
            rows = None if data.task is not None else data.validation
            where = {"split": data.validation_split, "source": rows, "limit": options.validation_limit}
        return Request(task=task, mode=mode, batch_size=self.config.test_batch_size, data=data, **where)
