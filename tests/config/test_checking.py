from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from shadowtune.config.checking import check_choices, check_range, from_mapping, nearest
from shadowtune.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rate: float | None = None

    def __post_init__(self):
        check_range(self, width=(1, 10), rate=(0, 1))


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    mode: Literal["fast", "slow"] = "fast"
    size: int | None = None
    scale: float = 1.0
    flag: bool = False
    targets: str | list[str] = "all"
    numbers: list[int] = field(default_factory=list)
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


def test_range_reports_all_faults_together():
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


def test_all_faults_of_all_levels_in_one_message():
    with pytest.raises(ConfigError) as caught:
        from_mapping(Outer, {"inner": {"widht": 3}, "mod": 1, "flag": 1}, where="")
    assert str(caught.value) == (
        "unknown key inner.widht (did you mean width?); unknown key mod (did you mean mode?); "
        "flag must be bool, got 1; missing key name"
    )


def test_range_faults_of_a_part_name_the_part():
    with pytest.raises(ConfigError, match="inner: width must be at least 1 and below 10, got 0"):
        build(inner={"width": 0})


def test_where_stands_before_every_place():
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


def test_items_of_lists_are_named_by_their_place():
    with pytest.raises(ConfigError, match=r"numbers\[1\] must be int, got 'b'"):
        build(numbers=[1, "b"])
