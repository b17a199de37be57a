import contextlib
import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune import ShadowConfig
from shadowtune.config.loading import SHIPPED, dump_config, load_config, put, settings_file
from shadowtune.config.settings import settings, unknown_keys
from shadowtune.config.training import DataConfig, LoraConfig, OptimizerConfig, TrainConfig, merge
from shadowtune.errors import ConfigError
from tests.support.properties import property_test

MINIMAL = "data:\n  train: rows.jsonl\n"


@pytest.fixture
def write(tmp_path):
    def write_config(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_config


def load(path, *overrides):
    return load_config(TrainConfig, path, overrides)


def test_a_file_becomes_settings_and_the_rest_keeps_its_default(write):
    config = load(write(MINIMAL + "method: lora\nlora: {rank: 4}\noptimizer:\n  learning_rate: 1e-4\n"))
    expected = TrainConfig(
        data=DataConfig(train="rows.jsonl"),
        method="lora",
        lora=LoraConfig(rank=4),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    assert config == expected


def test_overrides_replace_add_and_reset(write):
    path = write(MINIMAL + "max_steps: 9\nshadow: {rank: 4, alpha: 0.5}\n")
    config = load(path, "shadow.rank=8", "optimizer.learning_rate=1e-3", "max_steps=", "data.limit=5", "epochs=3")
    assert config.shadow == ShadowConfig(rank=8, alpha=0.5)
    assert config.optimizer.learning_rate == 1e-3
    assert config.max_steps is None
    assert config.data == DataConfig(train="rows.jsonl", limit=5)
    assert config.epochs == 3.0


def test_the_last_override_wins(write):
    assert load(write(MINIMAL), "seed=1", "seed=2").seed == 2


def test_override_values_are_yaml_and_may_hold_equals_signs(write):
    config = load(write(MINIMAL), "lora.target_modules=[q_proj, v_proj]", 'data.template="a={x}\\nb="', "compile=true")
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.data.template == "a={x}\nb="
    assert config.compile is True


def test_an_override_fills_a_part_that_the_file_leaves_empty(write):
    assert load(write(MINIMAL + "shadow:\n"), "shadow.rank=3").shadow == ShadowConfig(rank=3)


@pytest.mark.parametrize("override", ["rank", "", "=3", "shadow..rank=3", ".seed=1", "seed.=1"])
def test_an_override_that_is_no_key_and_value_is_refused(write, override):
    with pytest.raises(ConfigError, match=r"is not of the form key=value, such as") as caught:
        load(write(MINIMAL), override)
    assert repr(override) in str(caught.value)


def test_an_override_inside_a_plain_value_is_refused(write):
    with pytest.raises(ConfigError, match=r"cannot set model\.name: model is 'gpt2' and has no parts"):
        load(write(MINIMAL + "model: gpt2\n"), "model.name=x")


def test_an_unknown_override_gets_the_nearest_name(write):
    with pytest.raises(ConfigError, match=r"unknown key shadow\.rnak \(did you mean rank\?\)"):
        load(write(MINIMAL), "shadow.rnak=8")


def test_a_malformed_override_names_itself(write):
    with pytest.raises(ConfigError, match=r"in 'lora\.target_modules=\[a'"):
        load(write(MINIMAL), "lora.target_modules=[a")


def test_off_is_a_word_and_dates_are_text(write):
    config = load(write(MINIMAL + "gradient_checkpointing: off\nrevision: 2024-01-02\n"))
    assert config.gradient_checkpointing == "off"
    assert config.revision == "2024-01-02"


def test_yes_is_no_boolean(write):
    with pytest.raises(ConfigError, match="compile must be bool, got 'yes'"):
        load(write(MINIMAL + "compile: yes\n"))


def test_all_wrong_keys_and_values_in_one_line_with_the_file(write):
    path = write(MINIMAL + "  max_lenght: 3\nmetod: lora\nseed: x\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: unknown key data.max_lenght (did you mean max_length?); unknown key metod (did you mean method?); "
        "seed must be int, got 'x'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "line 2: key 'seed' is given twice"),
        ("shadow:\n  rank: 1\n  alpha: 1\n  rank: 2\n", "line 4: key 'rank' is given twice"),
        ("seed: 1\nshadow: [1, 2\n", "line 3: while parsing a flow sequence, expected ',' or ']'"),
        ("seed: 1\n\tmodel: x\n", "line 2: .*cannot start any token"),
        ("a: 1\n---\nb: 2\n", "line 2: expected a single document"),
        ("seed: *nothing\n", "line 1: found undefined alias 'nothing'"),
        ("seed: 1\nmodel: !!python/object:os.system x\n", "line 2: could not determine a constructor"),
        ("seed: 1\nmodel: a\x07b\n", r"line 2: character U\+0007 is not allowed"),
        ("seed: 1\n? [a]\n: b\n", "line 2: .*unhashable key"),
        ("seed: !!bool maybe\n", "does not fit its YAML type"),
        ("seed: !!timestamp x\n", "does not fit its YAML type"),
        ("seed: " + "[" * 1000, "nested too deeply"),
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "key: value lines, not a list"),
        ("just text\n", "key: value lines, not a str"),
        (b"seed: 1\nmodel: caf\xe9\n", "line 2: not UTF-8 text"),
    ],
)
def test_bad_files_are_one_line_naming_file_and_line(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['"a\\nb": 1', "? |\n  a\n  b\n: 1", "seed: 'a\n\n  b'", "seed: |\n  a\n  b"])
def test_line_breaks_in_keys_and_values_do_not_break_the_line(write, text):
    with pytest.raises(ConfigError) as caught:
        load(write(text))
    assert "\n" not in str(caught.value)


def test_missing_files_and_directories_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load(tmp_path)


@property_test
@given(text=st.text() | st.text(alphabet=":-{}[]&*!|>#'\"%@ \n\tab1.e~?,<="), override=st.text(max_size=12))
def test_no_text_ends_in_anything_but_settings_or_a_config_error(write, text, override):
    path = write(text.encode(errors="replace"))
    for overrides in ([], [override], [f"seed={override}"], [f"data.{override}"]):
        with contextlib.suppress(ConfigError):
            load(path, *overrides)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("template=Say: {a}", "Say: {a}"),
        ("template= # {a}: [b ", " # {a}: [b "),
        ("template=*{a}", "*{a}"),
        ('template="{a}\\n"', "{a}\n"),
        ("template='{a}'", "{a}"),
        ("template='{a}' or {b}", "'{a}' or {b}"),
        ("template={a}", "{a}"),
        ("train=123", "123"),
        ("train=[x].jsonl", "[x].jsonl"),
        ("text_field=true", "true"),
        ("text_field=", None),
        ("text_field=null", None),
        ("text_field=~", None),
    ],
)
def test_the_value_of_a_text_setting_needs_no_quotes(write, override, value):
    path = write(b"data: {train: rows.jsonl}")
    assert vars(load(path, f"data.{override}").data)[override.partition("=")[0]] == value


def test_a_setting_that_may_be_text_or_a_list_is_either(write):
    path = write(b"data: {train: rows.jsonl}\nmethod: lora")
    for typed, value in (("[q, v]", ["q", "v"]), ("q: v", "q: v"), ("7", "7"), ("all-linear", "all-linear")):
        assert load(path, f"lora.target_modules={typed}").lora.target_modules == value


def test_text_or_a_tuple_is_written_as_a_list(write):
    @settings
    class Sources:
        train: str | tuple[str, ...] | None = None

    for typed, value in (("[a, b]", ("a", "b")), ("a, b", "a, b"), ("a: b", "a: b"), ("", None)):
        assert load_config(Sources, write("{}"), [f"train={typed}"]).train == value


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("learning_rate=1", "unknown key learning_rate (did you mean optimizer.learning_rate?)"),
        ("shadow.learning_rate=1", "unknown key shadow.learning_rate (did you mean optimizer.learning_rate?)"),
        ("rank=4", "unknown key rank (did you mean shadow.rank or lora.rank?)"),
        ("data.epochs=4", "unknown key data.epochs (did you mean epochs?)"),
        ("warmup_ration=1", "unknown key warmup_ration (did you mean optimizer.warmup_ratio?)"),
        ("xyzzy=1", "unknown key xyzzy"),
    ],
)
def test_a_name_without_its_section_is_found(write, override, hint):
    with pytest.raises(ConfigError) as raised:
        load(write(b"data: {train: rows.jsonl}"), override)
    assert str(raised.value).endswith(hint)


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
rates = st.floats(0, 1e6, allow_nan=False)


@property_test
@given(
    data=st.builds(DataConfig, train=words, validation=st.none() | words, completion_field=st.none() | words),
    model=words,
    output=words | st.sampled_from(["off", "1e-3", "2024-01-02", "null", "~", "yes", "12:30", "0x10", "- a", "a: b"]),
    optimizer=st.builds(OptimizerConfig, learning_rate=rates, weight_decay=rates),
    lora=st.builds(LoraConfig, target_modules=words | st.lists(words)),
    epochs=st.floats(1e-300, 1e300),
    max_steps=st.none() | st.integers(1),
)
def test_dumped_settings_load_as_equal_ones(tmp_path, **values):
    config = TrainConfig(gradient_checkpointing="off", **values)
    dump_config(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_every_setting_survives_a_dump(tmp_path):
    config = TrainConfig(
        data=DataConfig(train="a", template="{x}\n: {{y}}", overlong="drop", limit=3, chat_template=False),
        shadow=ShadowConfig(rank=2, hidden_size=8, depth_sharing="full"),
        task="classification",
        num_labels=4,
        autocast=True,
    )
    dump_config(config, tmp_path / "config.yaml")
    assert dataclasses.asdict(load(tmp_path / "config.yaml")) == dataclasses.asdict(config)


def test_a_dump_replaces_the_file_at_once_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    with path.open() as reader:
        dump_config(TrainConfig(data=DataConfig(train="other")), path)
        assert reader.read() == MINIMAL, "who reads the old file reads it whole"
    assert load(path).data.train == "other"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_dump_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write .*config\.yaml: No space left on device"):
        dump_config(TrainConfig(data=DataConfig(train="a")), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_dump_into_a_missing_directory_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write .*: No such file or directory"):
        dump_config(TrainConfig(data=DataConfig(train="a")), tmp_path / "none" / "config.yaml")


@pytest.mark.parametrize("name", ["configs/tiny_cpu.yaml", "tiny_cpu.yaml", "tiny_cpu", "configs/tiny_cpu"])
def test_settings_that_come_with_the_package_are_found_in_any_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert settings_file(name) == SHIPPED / "tiny_cpu.yaml"
    assert load_config(TrainConfig, name, []).output == "runs/tiny"
    assert settings_file("compare/quick").is_file()


def test_a_file_of_ones_own_comes_before_one_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / "tiny_cpu.yaml"
    own.parent.mkdir()
    own.write_text("output: mine\ndata: {train: x}\nmodel: y\n")
    assert load_config(TrainConfig, "configs/tiny_cpu.yaml", []).output == "mine"


@pytest.mark.parametrize("name", ["../tiny_cpu.yaml", "/tiny_cpu.yaml", "runs/tiny_cpu.yaml"])
def test_only_plain_names_are_looked_up_in_the_package(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"No such file or directory$"):
        load_config(TrainConfig, name, [])


@pytest.mark.parametrize("name", ["tiny", "configs/tiny.yaml"])
def test_a_name_that_the_package_does_not_know_is_answered_with_those_it_knows(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"No such file.*with the package come configs/chat\.yaml, configs/cl"):
        load_config(TrainConfig, name, [])


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
