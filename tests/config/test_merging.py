import pytest

from shadowtune.config.merging import merge, put, unknown_keys
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError


def test_the_last_layer_wins_and_nested_mappings_are_merged():
    below = {"a": 1, "b": {"x": 1, "y": 2}}
    assert merge(below, {"b": {"y": 3}}, {"a": None}) == {"a": None, "b": {"x": 1, "y": 3}}
    assert below == {"a": 1, "b": {"x": 1, "y": 2}}


def test_what_is_merged_shares_no_mapping_with_its_layers():
    layer = {"b": {"x": 1}}
    put(merge(layer), "b.x", 2)
    assert layer == {"b": {"x": 1}}


def test_a_mapping_replaces_a_value_that_has_no_parts():
    assert merge({"a": None}, {"a": {"x": 1}}) == {"a": {"x": 1}}


def test_a_dotted_key_makes_the_mappings_that_are_missing():
    values = {"a": None}
    put(values, "a.b.c", 5)
    assert values == {"a": {"b": {"c": 5}}}


def test_a_part_of_a_value_cannot_be_set():
    with pytest.raises(ConfigError, match=r"cannot set a.b.c: a.b is 3 and has no parts"):
        put({"a": {"b": 3}}, "a.b.c", 5)


def test_unknown_keys_are_found_at_every_depth_and_missing_ones_are_fine():
    values = {"epocs": 1, "shadow": {"rnak": 2, "alpha": 1}, "peft": {"anything": 1}, "data": {"limit": 3}}
    assert unknown_keys(TrainConfig, values, "common") == [
        "unknown key common.epocs (did you mean epochs?)",
        "unknown key common.shadow.rnak (did you mean rank?)",
    ]
