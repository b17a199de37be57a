import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Lt
from pydantic import StrictBool, StrictInt

from shadowtune.config.settings import (
    RENAMED_VALUES,
    Float,
    Fraction,
    check_choices,
    check_range,
    current_names,
    from_mapping,
    nearest,
    settings,
)
from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.sweep import SweepConfig
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError


@settings
class Inner:
    width: Annotated[StrictInt, Ge(1), Lt(10)] = 4
    rate: Fraction | None = None


@settings
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    mode: Literal["fast", "slow"] = "fast"
    size: StrictInt | None = None
    scale: Float = 1.0
    flag: StrictBool = False
    targets: str | list[str] = "all"
    numbers: list[StrictInt] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    anything: Any = None


def build(**values):
    return from_mapping(Outer, {"name": "x", **values}, where="")


@dataclass
class Plain:
    value: Any
    other: Any = 0.0


@pytest.mark.parametrize("value", [0, 0.5, 0.999, None])
def test_range_includes_its_low_end_and_leaves_none_alone(value):
    check_range(Plain(value), value=(0, 1))


@pytest.mark.parametrize("value", [-0.001, 1, float("nan"), float("inf"), -float("inf"), True, "0.5", [0.5]])
def test_range_refuses_its_high_end_and_what_is_no_finite_number(value):
    with pytest.raises(ConfigError, match="value must be") as caught:
        check_range(Plain(value), value=(0, 1))
    assert repr(value) in str(caught.value)


def test_range_without_high_end_takes_large_values():
    check_range(Plain(10**12), value=(1, None))


def test_range_reports_all_errors_together():
    with pytest.raises(ConfigError, match=r"^value must be at least 1, got 0; other must be at least 0 and below 1"):
        check_range(Plain(0, 2.0), value=(1, None), other=(0, 1))


def test_choices_name_the_allowed_words_and_the_nearest():
    check_choices(Plain("cosine"), value=("linear", "cosine"))
    with pytest.raises(ConfigError, match=r"one of linear, cosine, got 'cosin' \(did you mean cosine\?\)"):
        check_choices(Plain("cosin"), value=("linear", "cosine"))


def test_nearest_word_or_nothing():
    assert nearest("shaddow", ["lora", "shadow"]) == " (did you mean shadow?)"
    assert nearest("xyz", ["lora", "shadow"]) == ""
    assert nearest(1, ["lora"]) == ""


def test_nested_values_reach_their_fields_and_the_rest_keeps_its_default():
    built = build(inner={"width": 7}, mode="slow", targets=["a", "b"])
    assert built == Outer(name="x", inner=Inner(width=7), mode="slow", targets=["a", "b"])


def test_a_dataclass_in_the_mapping_is_taken_as_it_is():
    inner = Inner(width=3)
    assert build(inner=inner).inner is inner


def test_all_errors_of_all_levels_in_one_message():
    with pytest.raises(ConfigError) as caught:
        from_mapping(Outer, {"inner": {"widht": 3}, "mod": 1, "flag": 1}, where="")
    assert str(caught.value) == (
        "unknown key inner.widht (did you mean width?); unknown key mod (did you mean mode?); "
        "flag must be bool, got 1; missing key name"
    )


def test_range_errors_of_a_part_name_the_part():
    with pytest.raises(ConfigError, match=r"^inner\.width must be at least 1 and below 10, got 0$"):
        build(inner={"width": 0})


def test_where_precedes_every_key():
    with pytest.raises(ConfigError, match=r"unknown key shadow\.x; missing key shadow\.name"):
        from_mapping(Outer, {"x": 1}, where="shadow")


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_anything_but_a_mapping_is_refused(values):
    with pytest.raises(ConfigError, match="the config must be a mapping"):
        from_mapping(Outer, values, where="")
    with pytest.raises(ConfigError, match="inner must be a mapping"):
        build(inner=values)


@pytest.mark.parametrize(("value", "number"), [(3, 3.0), ("1e-3", 1e-3), ("2", 2.0), (0.5, 0.5)])
def test_floats_may_be_whole_numbers_or_scientific_text(value, number):
    built = build(scale=value).scale
    assert built == number
    assert type(built) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", "fast"),
        ("scale", True),
        ("scale", None),
        ("size", 1.0),
        ("size", "1"),
        ("size", True),
        ("flag", 1),
        ("flag", "true"),
        ("name", 3),
        ("mode", "medium"),
        ("mode", ["fast"]),
        ("targets", 3),
        ("targets", ["a", 3]),
        ("numbers", [1, "2"]),
        ("numbers", 1),
        ("extra", [1]),
    ],
)
def test_wrong_types_are_refused_with_name_and_value(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}") as caught:
        from_mapping(Outer, {"name": "x", name: value}, where="")
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", None), ("size", 3), ("targets", "x"), ("targets", ["x"]), ("numbers", [1, 2]), ("extra", {"a": [1]})],
)
def test_right_types_are_kept(name, value):
    assert vars(build(**{name: value}))[name] == value


def test_fields_of_any_type_take_anything():
    thing = object()
    assert build(anything=thing).anything is thing


def test_items_of_lists_are_named_by_their_index():
    with pytest.raises(ConfigError, match=r"numbers\[1\] must be int, got 'b'"):
        build(numbers=[1, "b"])


def test_keywords_in_python_are_checked_like_a_mapping():
    with pytest.raises(ConfigError, match=r"^unknown key widht \(did you mean width\?\); rate must be float, got 'x'$"):
        Inner(widht=3, rate="x")
    with pytest.raises(ConfigError, match=r"^width must be .* below 10, got 10; rate must be .* below 1, got 1$"):
        Inner(width=10, rate=1)
    with pytest.raises(ConfigError, match=r"^inner\.width must be int, got '3'; missing key name$"):
        Outer(inner={"width": "3"})


def test_values_out_of_range_and_unknown_keys_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        build(inner={"width": 0, "rat": 1}, mode="slwo", numbers=[1, 2.5])
    assert str(caught.value) == (
        "unknown key inner.rat (did you mean rate?); inner.width must be at least 1 and below 10, got 0; "
        "mode must be one of fast, slow, got 'slwo' (did you mean slow?); numbers[1] must be int, got 2.5"
    )


def test_alternatives_of_a_setting_are_named_together():
    with pytest.raises(ConfigError, match=r"^targets must be str or a list, got \['a', 3\]$"):
        build(targets=["a", 3])


def test_plain_dataclasses_can_be_read_too():
    @dataclass(frozen=True)
    class Point:
        inner: Inner
        numbers: tuple[int, ...] = ()

    assert from_mapping(Point, {"inner": {"width": 2}, "numbers": [1]}) == Point(Inner(width=2), (1,))
    with pytest.raises(ConfigError, match=r"^unknown key point\.inner\.with .*; point\.numbers\[0\] must be int"):
        from_mapping(Point, {"inner": {"with": 2}, "numbers": ["x"]}, "point")


def test_names_of_the_last_release_are_read_with_a_warning():
    with pytest.warns(FutureWarning, match="the setting head_mixing is now called logit_interpolation"):
        assert ShadowConfig(head_mixing=0.3) == ShadowConfig(logit_interpolation=0.3)
    values = {"data": {"train": "x", "validation": "y"}, "fit_head_mixing": True, "shadow": {"head_mixing": 0.3}}
    with pytest.warns(FutureWarning) as caught:
        read = from_mapping(TrainConfig, values)
    assert (read.fit_logit_interpolation, read.shadow.logit_interpolation) == (True, 0.3)
    assert len(caught) == 2
    grid = {"shadow.head_mixing": [0.1, 0.2]}
    with pytest.warns(FutureWarning):
        swept = from_mapping(SweepConfig, {"grid": grid})
    assert swept.trials("shadow") == [{"shadow.logit_interpolation": 0.1}, {"shadow.logit_interpolation": 0.2}]


def test_a_saved_adapter_of_the_last_release_is_read_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ShadowConfig.from_dict({"head_mixing": 0.3, "rank": 4}).logit_interpolation == 0.3


@pytest.mark.parametrize(("name", "old"), sorted(RENAMED_VALUES))
def test_an_old_value_of_a_setting_is_read_with_a_warning(name, old):
    with pytest.warns(FutureWarning, match=f"{name} {old} is now called {RENAMED_VALUES[name, old]}"):
        assert current_names({"a": [{name: old}]}) == {"a": [{name: RENAMED_VALUES[name, old]}]}
    assert current_names({f"data.{name}": old}, warn=False) == {f"data.{name}": RENAMED_VALUES[name, old]}
    assert current_names({"other": old}) == {"other": old}
