"""From rows of results to what they say: a mean with its interval for each method, and differences between methods."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shadowtune.comparison.budgets import COLUMNS
from shadowtune.comparison.statistics import Sample, bootstrap, mean_of
from shadowtune.config.comparison import CompareConfig

ALL_TASKS = "all tasks"
SMALL = 300
"""With fewer test rows than so many, an interval is wider than most differences between methods."""
Row = Mapping[str, Any]


@dataclass(frozen=True, order=True)
class Place:
    """Where scores belong: a model trained on one task, tested on the same or another."""

    trained: str
    tested: str

    def __str__(self) -> str:
        return self.tested if self.trained == self.tested else f"{self.trained} -> {self.tested}"


class Analysis:
    """Everything that a report says of one column: runs at equal parameters and steps, at equal time or equal memory.

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
    def scores(self) -> dict[tuple[Place, str, str], dict[int, Tensor]]:
        """Scores (N,) of each example by (place, method, mode) and seed, in the order of the settings."""
        found: dict[tuple[Place, str, str], dict[int, Tensor]] = {}
        for row in self.rows:
            for each in row["evaluations"]:
                key = (Place(row["task"], each["task"]), row["method"], each["mode"])
                found.setdefault(key, {})[row["seed"]] = torch.tensor(each["scores"], dtype=torch.float64)
        return found

    @property
    def places(self) -> list[Place]:
        """Where there are scores, in the order of the settings."""
        return list(dict.fromkeys(place for place, _, _ in self.scores))

    def summary(self) -> list[dict[str, Any]]:
        """Return a flat row for each place, method and mode: accuracy with its interval, and what it cost."""
        tasks, methods = list(self.config.tasks), list(self.config.methods)

        def order(key: tuple[Place, str, str]) -> tuple[int, int, int, str]:
            place, method, mode = key
            return tasks.index(place.trained), self.places.index(place), methods.index(method), mode

        return [self._summary(place, method, mode) for place, method, mode in sorted(self.scores, key=order)]

    def differences(self) -> list[dict[str, Any]]:
        """Return a flat row for each other method, mode and place: the reference minus the method, in points."""
        found = []
        for mode, method in [(mode, method) for mode in ("attached", "detached") for method in self.others]:
            pairs = {place: pair for place in self.places if (pair := self._pair(place, method, mode))}
            entries = {str(place): ours.minus(theirs) for place, (ours, theirs) in pairs.items()}
            if len(entries) > 1:
                entries[ALL_TASKS] = mean_of(list(entries.values()))
            for place, sample in entries.items():
                found.append({"task": place, "mode": mode, "against": method, **_points(sample)})
        return found

    def against_best(self) -> list[dict[str, Any]]:
        """Return a flat row for each place: the reference minus the best of the other kinds there, in points.

        Which is best is read off the same test rows, which is to the others' advantage.
        """
        kind = self.config.kind(self.reference)
        rivals = [method for method in self.others if self.config.kind(method) not in (kind, "base")]
        rivals = [method for method in rivals if method not in self.unequal()]
        found, samples = [], []
        for place in self.places:
            pairs = {method: pair for method in rivals if (pair := self._pair(place, method, "attached")) is not None}
            if pairs:
                best = max(pairs, key=lambda method: pairs[method][1].mean)
                samples.append(pairs[best][0].minus(pairs[best][1]))
                found.append({"task": str(place), "against": best, **_points(samples[-1])})
        if len(found) > 1:
            found.append({"task": ALL_TASKS, "against": "the best of each", **_points(mean_of(samples))})
        return found

    def unequal(self) -> dict[str, int]:
        """Return the methods of this column that do not train as many parameters as the others, and how many.

        They have no size to choose. Without a budget of parameters, and in the other columns, there are none.
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

        The mean is over the tasks that both have; which is best is read off the same test rows.
        """
        tested = {method for _, method, mode in self.scores if mode == "attached"} - self.unequal().keys()
        methods = [name for name in self.config.trained_methods if name in tested]
        found = []
        for method in methods:
            differences = {}
            for other in methods:
                pairs = [pair for place in self.places if (pair := self._pair(place, other, "attached", method))]
                if other != method and pairs:
                    differences[other] = (mean_of([ours.minus(theirs) for ours, theirs in pairs]), len(pairs))
            if differences:
                rival = min(differences, key=lambda name: differences[name][0].mean)
                sample, tasks = differences[rival]
                found.append({"method": method, "against": rival, "tasks": tasks, **_points(sample)})
        return found

    def costs(self) -> list[dict[str, Any]]:
        """Return a flat row for each run of a column of equal cost: its cost over that of the method aimed at."""
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
        """Return the places with few test rows, and how many."""
        counts = {str(place): len(next(iter(seeds.values()))) for (place, _, _), seeds in self.scores.items()}
        return {place: count for place, count in counts.items() if count < SMALL}

    def _summary(self, place: Place, method: str, mode: str) -> dict[str, Any]:
        by_seed = self.scores[place, method, mode]
        estimate = self._sample(place, by_seed, sorted(by_seed)).estimate()
        rows = [row for row in self.rows if row["task"] == place.trained and row["method"] == method]
        tests = [e for row in rows for e in row["evaluations"] if e["task"] == place.tested and e["mode"] == mode]
        trainings = [row["training"] for row in rows if row["training"] is not None]
        found = {
            "task": str(place),
            "method": method,
            "mode": mode,
            "accuracy": estimate.mean,
            "accuracy_low": estimate.low,
            "accuracy_high": estimate.high,
            "loss": _mean([test["loss"] for test in tests]),
            "agreement": _mean([test["agreement"] for test in tests if test["agreement"] is not None]),
            "of_attached": self._of_attached(place, method, estimate.mean) if mode == "detached" else None,
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

    def _of_attached(self, place: Place, method: str, detached: float) -> float | None:
        """Return a detached accuracy over the attached one; None where that is 0 or was not measured."""
        attached = self.scores.get((place, method, "attached"))
        mean = float(torch.stack(list(attached.values())).mean()) if attached else 0.0
        return detached / mean if mean else None

    def _pair(self, place: Place, method: str, mode: str, reference: str | None = None) -> tuple[Sample, Sample] | None:
        """Samples of the reference and another method, over the seeds of both; None if one of them has no scores."""
        theirs_mode = "base" if self.config.kind(method) == "base" else mode
        ours = self.scores.get((place, reference or self.reference, mode), {})
        theirs = self.scores.get((place, method, theirs_mode), {})
        if theirs_mode == "base" and theirs:  # one model, whatever the seed
            theirs = dict.fromkeys(ours, next(iter(theirs.values())))
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            return None
        return self._sample(place, ours, seeds), self._sample(place, theirs, seeds)

    def _sample(self, place: Place, by_seed: Mapping[int, Tensor], seeds: Sequence[int]) -> Sample:
        stream = zlib.crc32(place.tested.encode())  # tasks are drawn independently, methods alike
        return bootstrap(torch.stack([by_seed[seed] for seed in seeds]), stream)


def _points(sample: Sample) -> dict[str, Any]:
    estimate = sample.estimate()
    return {
        "points": 100 * estimate.mean,
        "points_low": 100 * estimate.low,
        "points_high": 100 * estimate.high,
        "verdict": estimate.verdict,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
