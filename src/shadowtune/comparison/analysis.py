"""Analysis of result rows: means with intervals of each method, and paired differences between methods."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shadowtune.comparison.budgets import COLUMNS
from shadowtune.comparison.statistics import BootstrapSample, bootstrap, mean_of
from shadowtune.config.comparison import CompareConfig

ALL_TASKS = "all tasks"
SMALL = 300
"""With fewer test examples an interval is wider than most differences between methods."""
Row = Mapping[str, Any]


@dataclass(frozen=True, order=True)
class TaskTransfer:
    """The task that a model was trained on, and the task that it was tested on."""

    trained: str
    tested: str

    def __str__(self) -> str:
        return self.tested if self.trained == self.tested else f"{self.trained} -> {self.tested}"


class Analysis:
    """Statistics of one column of the report: runs at equal parameters and steps, at equal time or at equal memory.

    Args:
        config: the comparison.
        rows: rows of ``results.jsonl``.
        column: one of ``budgets.COLUMNS``.
    """

    def __init__(self, config: CompareConfig, rows: Sequence[Row], column: str = "parameters") -> None:
        self.config, self.column = config, column
        self.all_rows = rows
        self.trials = [row for row in rows if row["stage"] == "trial"]
        finals = [row for row in rows if row["stage"] == "final" and not row["error"]]
        self.rows = [row for row in finals if column in row.get("columns", ["parameters"]) or row["training"] is None]
        self.failed = [row for row in rows if row["error"]]
        self.reference = config.best_of()
        self.others = [method for method in config.methods if method != self.reference]

    def at(self, column: str) -> "Analysis":
        """Return the analysis of another column of the same rows."""
        return Analysis(self.config, self.all_rows, column)

    @property
    def columns(self) -> list[str]:
        """The columns that have runs."""
        found = {
            column
            for row in self.all_rows
            if row["stage"] == "final" and row["training"]
            for column in row.get("columns", ["parameters"])
        }
        return [column for column in COLUMNS if column in found]

    @cached_property
    def scores(self) -> dict[tuple[TaskTransfer, str, str], dict[int, Tensor]]:
        """Scores (N,) of the examples by (task transfer, method, mode) and seed, in the order of the settings."""
        found: dict[tuple[TaskTransfer, str, str], dict[int, Tensor]] = {}
        for row in self.rows:
            for each in row["evaluations"]:
                key = (TaskTransfer(row["task"], each["task"]), row["method"], each["mode"])
                found.setdefault(key, {})[row["seed"]] = torch.tensor(each["scores"], dtype=torch.float64)
        return found

    @property
    def transfers(self) -> list[TaskTransfer]:
        """The task transfers with scores, in the order of the settings."""
        return list(dict.fromkeys(transfer for transfer, _, _ in self.scores))

    def summary(self) -> list[dict[str, Any]]:
        """Return a flat row for each task transfer, method and mode: accuracy with its interval, and costs."""
        tasks, methods = list(self.config.tasks), list(self.config.methods)

        def order(key: tuple[TaskTransfer, str, str]) -> tuple[int, int, int, str]:
            transfer, method, mode = key
            return tasks.index(transfer.trained), self.transfers.index(transfer), methods.index(method), mode

        return [self._summary(transfer, method, mode) for transfer, method, mode in sorted(self.scores, key=order)]

    def differences(self) -> list[dict[str, Any]]:
        """Return a flat row for each other method, mode and transfer: the reference minus the method, in points."""
        found = []
        for mode, method in [(mode, method) for mode in ("attached", "detached") for method in self.others]:
            samples = {transfer: both for transfer in self.transfers if (both := self._samples(transfer, method, mode))}
            entries = {str(transfer): ours.minus(theirs) for transfer, (ours, theirs) in samples.items()}
            if len(entries) > 1:
                entries[ALL_TASKS] = mean_of(list(entries.values()))
            for name, sample in entries.items():
                found.append({"task": name, "mode": mode, "against": method, **_points(sample)})
        return found

    def against_best(self) -> list[dict[str, Any]]:
        """Return a flat row for each task transfer: the reference minus the best method of other kinds, in points.

        The best is selected on the same test examples, to the advantage of the others.
        """
        kind = self.config.kind(self.reference)
        rivals = [method for method in self.others if self.config.kind(method) not in (kind, "base")]
        rivals = [method for method in rivals if method not in self.unequal()]
        found, differences = [], []
        for transfer in self.transfers:
            samples = {
                method: both for method in rivals if (both := self._samples(transfer, method, "attached")) is not None
            }
            if samples:
                best = max(samples, key=lambda method: samples[method][1].mean)
                differences.append(samples[best][0].minus(samples[best][1]))
                found.append({"task": str(transfer), "against": best, **_points(differences[-1])})
        if len(found) > 1:
            found.append({"task": ALL_TASKS, "against": "the best of each", **_points(mean_of(differences))})
        return found

    def unequal(self) -> dict[str, int]:
        """Return the methods without a size to choose whose number of trainable parameters differs, with that number.

        Without a budget of parameters, and in the other columns, there are none.
        """
        budget = self.config.budget
        if budget is None or not budget.equal_parameters or self.column != "parameters":
            return {}
        counts = {row["method"]: row["training"]["trainable_parameters"] for row in self.rows if row["training"]}
        sized = [count for name, count in counts.items() if self.config.size_key(name) is not None]
        return {
            name: count
            for name, count in counts.items()
            if self.config.size_key(name) is None and sized and abs(count - sized[0]) > budget.tolerance * sized[0]
        }

    def standings(self) -> list[dict[str, Any]]:
        """Return a flat row for each trained method: its mean over tasks minus that of the best other one, in points.

        The mean is over the tasks that both have; the best is selected on the same test examples.
        """
        tested = {method for _, method, mode in self.scores if mode == "attached"} - self.unequal().keys()
        methods = [name for name in self.config.trained_methods if name in tested]
        found = []
        for method in methods:
            differences = {}
            for other in methods:
                found_both = (self._samples(transfer, other, "attached", method) for transfer in self.transfers)
                samples = [both[0].minus(both[1]) for both in found_both if both is not None]
                if other != method and samples:
                    differences[other] = (mean_of(samples), len(samples))
            if differences:
                rival = min(differences, key=lambda name: differences[name][0].mean)
                sample, tasks = differences[rival]
                found.append({"method": method, "against": rival, "tasks": tasks, **_points(sample)})
        return found

    def costs(self) -> list[dict[str, Any]]:
        """Return a flat row for each method of a column of equal cost: its cost over that of the reference method."""
        budget, key = self.config.budget, {"time": "train_seconds", "memory": "peak_memory_mb"}.get(self.column)
        if budget is None or key is None:
            return []
        like, means = vars(budget)[self.column], {}
        for task, method in dict.fromkeys((row["task"], row["method"]) for row in self.rows if row["training"]):
            rows = [row for row in self.rows if (row["task"], row["method"]) == (task, method)]
            means[task, method] = _mean([row["training"][key] for row in rows]) or 0.0
        return [
            {"task": task, "method": method, "ratio": mean / means[task, like]}
            for (task, method), mean in means.items()
            if means.get((task, like))
        ]

    def small(self) -> dict[str, int]:
        """Return the task transfers with few test examples, with their number."""
        counts = {str(transfer): len(next(iter(seeds.values()))) for (transfer, _, _), seeds in self.scores.items()}
        return {transfer: count for transfer, count in counts.items() if count < SMALL}

    def _summary(self, transfer: TaskTransfer, method: str, mode: str) -> dict[str, Any]:
        by_seed = self.scores[transfer, method, mode]
        estimate = self._sample(transfer, by_seed, sorted(by_seed)).estimate()
        rows = [row for row in self.rows if row["task"] == transfer.trained and row["method"] == method]
        tests = [e for row in rows for e in row["evaluations"] if e["task"] == transfer.tested and e["mode"] == mode]
        trainings = [row["training"] for row in rows if row["training"] is not None]
        found = {
            "task": str(transfer),
            "method": method,
            "mode": mode,
            "accuracy": estimate.mean,
            "accuracy_low": estimate.low,
            "accuracy_high": estimate.high,
            "loss": _mean([test["loss"] for test in tests]),
            "agreement": _mean([test["agreement"] for test in tests if test["agreement"] is not None]),
            "of_attached": self._of_attached(transfer, method, estimate.mean) if mode == "detached" else None,
            "test_rows": tests[0]["rows"],
            "seeds": len(by_seed),
            "answer_tokens_per_second": _mean([test["tokens_per_second"] for test in tests]),
            "answer_seconds": _mean([test["evaluate_seconds"] / test["rows"] for test in tests]),
        }
        for name in ("trainable_parameters", "steps", "train_seconds", "tokens_per_second", "peak_memory_mb"):
            found[name] = _mean([training[name] for training in trainings])
        others = [test["other_scores"] for test in tests]
        found |= {name: _mean([other[name] for other in others]) for name in others[0]}
        texts = [row["forgetting"] for row in rows if row.get("forgetting")] if mode == "attached" else []
        found["text_loss_before"] = _mean([text["loss_before"] for text in texts])
        found["text_loss"] = _mean([text["loss"] for text in texts])
        return found

    def _of_attached(self, transfer: TaskTransfer, method: str, detached: float) -> float | None:
        """Return the detached accuracy over the attached one; None if that is 0 or was not measured."""
        attached = self.scores.get((transfer, method, "attached"))
        mean = float(torch.stack(list(attached.values())).mean()) if attached else 0.0
        return detached / mean if mean else None

    def _samples(
        self, transfer: TaskTransfer, method: str, mode: str, reference: str | None = None
    ) -> tuple[BootstrapSample, BootstrapSample] | None:
        """Samples of the reference and another method, over the seeds of both; None if one of them has no scores."""
        theirs_mode = "base" if self.config.kind(method) == "base" else mode
        ours = self.scores.get((transfer, reference or self.reference, mode), {})
        theirs = self.scores.get((transfer, method, theirs_mode), {})
        if theirs_mode == "base" and theirs:  # one model, whatever the seed
            theirs = dict.fromkeys(ours, next(iter(theirs.values())))
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            return None
        return self._sample(transfer, ours, seeds), self._sample(transfer, theirs, seeds)

    def _sample(self, transfer: TaskTransfer, by_seed: Mapping[int, Tensor], seeds: Sequence[int]) -> BootstrapSample:
        stream = zlib.crc32(transfer.tested.encode())  # tasks are drawn independently, methods alike
        return bootstrap(torch.stack([by_seed[seed] for seed in seeds]), stream)


def _points(sample: BootstrapSample) -> dict[str, Any]:
    estimate = sample.estimate()
    return {
        "points": 100 * estimate.mean,
        "points_low": 100 * estimate.low,
        "points_high": 100 * estimate.high,
        "outcome": estimate.outcome,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
