from dataclasses import replace

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.result_files import Measurement, comparison, readable, title

TRAIN = BENCHMARKS["train"]
CONTEXT = {"model": "m", "device": "cpu", "dtype": "float32", "batch": 4, "length": 256, "warm_up": 1}
OURS = Measurement("shadow", 1_000, "intermediate_size 8", 30.0, [10.0, 40.0, 20.0])
LORA = Measurement("lora", 1_010, "rank 3", 60.0, [5.0, 10.0, 20.0])


def test_a_row_holds_ratios_medians_memory_and_budgets():
    row = comparison(TRAIN, "labelled=1", OURS, LORA, CONTEXT)
    assert row == {
        "bench": "train",
        "case": "labelled=1",
        "candidate": "shadow",
        "baseline": "lora",
        "ratio": 2.0,
        "ratio_low": pytest.approx(1.2),
        "ratio_high": pytest.approx(3.6),
        "n": 3,
        "unit": "tokens_per_second",
        "tokens_per_second": 20.0,
        "baseline_tokens_per_second": 10.0,
        "memory_ratio": 0.5,
        "peak_memory_mb": 30.0,
        "baseline_peak_memory_mb": 60.0,
        "trainable_parameters": 1_000,
        "baseline_trainable_parameters": 1_010,
        "size": "intermediate_size 8",
        "baseline_size": "rank 3",
        **CONTEXT,
    }
    assert list(row)[:8] == ["bench", "case", "candidate", "baseline", "ratio", "ratio_low", "ratio_high", "n"]


def test_a_baseline_without_measurable_memory_has_no_memory_ratio():
    base = Measurement("base", 0, None, 0.0, [1.0, 1.0, 1.0])
    assert comparison(TRAIN, "labelled=1", OURS, base, CONTEXT)["memory_ratio"] is None


def test_facts_of_both_sides_stand_before_the_settings():
    bench = replace(TRAIN, facts=("disk_mb",))
    row = comparison(bench, "a", replace(OURS, facts={"disk_mb": 3.0}), replace(LORA, facts={"disk_mb": 5.0}), CONTEXT)
    keys = list(comparison(TRAIN, "a", OURS, LORA, CONTEXT))
    place = keys.index("baseline_size") + 1
    assert list(row) == [*keys[:place], "disk_mb", "baseline_disk_mb", *keys[place:]]
    shown = readable(bench, [row])[0]
    assert (shown["our disk MB"], shown["their disk MB"]) == (3.0, 5.0)


def test_settings_that_are_not_set_are_not_told():
    row = comparison(TRAIN, "a", OURS, LORA, {**CONTEXT, "model": None})
    assert title(TRAIN, [row]).startswith("train (device cpu")


def test_readers_get_the_ratio_its_spread_and_both_sides():
    rows = [comparison(TRAIN, "labelled=1", OURS, LORA, CONTEXT)]
    shown = readable(TRAIN, rows)[0]
    assert (shown["baseline"], shown["ratio"], shown["10-90 %"]) == ("lora", 2.0, "1.20-3.60")
    assert (shown["ours"], shown["theirs"], shown["our MB"], shown["their MB"]) == (20.0, 10.0, 30.0, 60.0)
    assert title(TRAIN, rows) == (
        "train (model m, device cpu, dtype float32, batch 4, length 256, warm-up 1): tokens per second, median of 3; "
        "we train 1,000 parameters"
    )
