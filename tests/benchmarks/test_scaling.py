import pytest

from benchmarks.training import ScalingCandidate, ScalingSettings, draw_scaling, plan_scaling
from shadowtune.errors import ConfigError
from shadowtune.model.budget import is_equal

SMALL = {"model": "tiny", "batch": 2, "length": 8, "lengths": (8, 16), "depths": (2, 4), "ranks": (2, 64), "rank": 8}


def cases(**change):
    return {case.name: case.values for case in plan_scaling(ScalingSettings(**{**SMALL, **change})).cases}


def test_each_case_changes_one_axis_alone():
    made = cases()
    assert list(made) == ["tokens=8", "tokens=16", "depth=2", "depth=4", "rank=2", "rank=64"]
    seen = {name: (v["model"], v["length"], v["rank"]) for name, v in made.items()}
    assert seen == {
        "tokens=8": ("tiny", 8, 8),
        "tokens=16": ("tiny", 16, 8),
        "depth=2": ("tiny:2", 8, 8),
        "depth=4": ("tiny:4", 8, 8),
        "rank=2": ("tiny", 8, 2),
        "rank=64": ("tiny", 8, 64),
    }


def test_a_candidate_makes_its_model_anew_only_where_the_case_wants_another():
    one = ScalingCandidate(ScalingSettings(**SMALL), "shadow")
    made = cases()
    one.prepare(made["tokens=8"])
    first = one.model
    one.prepare(made["tokens=16"])
    assert one.model is first
    assert one.batch["input_ids"].shape == (2, 16)
    one.prepare(made["rank=64"])
    assert one.model is not first
    assert one.model.shadow.config.rank == 64
    one.prepare(made["depth=2"])
    assert len(one.model.base.model.layers) == 2
    assert one.measure() > 0


def test_a_baseline_trains_about_as_much_in_each_case():
    ours, baseline = (ScalingCandidate(ScalingSettings(**SMALL), name) for name in ("shadow", "lora"))
    for name in ("tokens=8", "rank=64", "depth=2"):
        for candidate in (ours, baseline):
            candidate.prepare(cases()[name])
        assert is_equal(ours.trainable_parameters, baseline.trainable_parameters), name


def row(case, steps, baseline_steps):
    return {
        "case": case,
        "candidate": "shadow",
        "baseline": "lora",
        "steps_per_second": steps,
        "baseline_steps_per_second": baseline_steps,
        "peak_memory_mb": 10.0,
        "baseline_peak_memory_mb": 20.0,
    }


def test_the_picture_has_a_column_for_each_axis(tmp_path):
    rows = [row("tokens=8", 4.0, 2.0), row("tokens=16", 2.0, 1.0), row("rank=2", 3.0, 1.0)]
    draw_scaling(rows, tmp_path / "one.png")
    draw_scaling([*rows, row("depth=2", 1.0, 1.0)], tmp_path / "two.png")
    widths = [int.from_bytes((tmp_path / name).read_bytes()[16:20], "big") for name in ("one.png", "two.png")]
    assert widths == [2 * 480, 3 * 480]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depths": (1,)}, "depths must be numbers of at least 2"),
        ({"ranks": (0,)}, "ranks must be"),
        ({"labelled": 2.0}, "labelled must be"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        ScalingSettings(**{**SMALL, **change})


def test_an_axis_may_be_left_out_but_not_all():
    assert list(cases(depths=(), ranks=())) == ["tokens=8", "tokens=16"]
    with pytest.raises(ConfigError, match="nothing to measure"):
        cases(lengths=(), depths=(), ranks=())


def test_a_base_that_is_not_deep_enough_is_refused():
    with pytest.raises(ConfigError, match="cannot be cut to 9"):
        cases(depths=(9,))
