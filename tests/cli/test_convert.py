import json

import pytest

from shadowtune import ShadowForCausalLM
from shadowtune.cli.main import main
from tests.model.formats.third_party import assert_same, load_shadow_peft, ours
from tests.support.bases import tiny_base
from tests.support.shadows import perturbed_model


@pytest.fixture
def saved(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    perturbed_model().save_pretrained(tmp_path / "ours")
    return str(tmp_path / "ours"), str(tmp_path / "base")


def test_it_says_what_was_written_and_what_is_not_kept(saved, tmp_path, capsys):
    source, base = saved
    target = tmp_path / "theirs"
    command = ["convert", source, str(target), "--format", "shadow-peft", "--base", base]
    assert main([*command, "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert f"wrote {target} (shadow-peft): shadow_adapter.safetensors, shadow_config.json" in out
    assert "shadow_loss_weight=0.05" in out
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["files"] == ["shadow_adapter.safetensors", "shadow_config.json"]
    assert_same(load_shadow_peft(target), ours(perturbed_model()))


@pytest.mark.parametrize("theirs", ["shadow-peft", "shadowtune-peft"])
def test_there_and_back_and_plain(theirs, saved, tmp_path):
    source, base = saved
    steps = [
        (source, "a", theirs),
        (str(tmp_path / "a"), "b", "shadowtune"),
        (str(tmp_path / "b"), "c", "plain"),
    ]
    for start, end, form in steps:
        extra = ["--base", base] if end != "c" else []
        assert main(["convert", start, str(tmp_path / end), "--format", form, *extra]) == 0
    assert_same(ours(ShadowForCausalLM.from_pretrained(tmp_path / "b")), ours(perturbed_model()))
    assert (tmp_path / "c" / "config.json").is_file()


def test_a_run_directory_is_converted(shadow_run, tmp_path):
    assert main(["convert", str(shadow_run), str(tmp_path / "a"), "--format", "shadow-peft"]) == 0
    assert (tmp_path / "a" / "shadow_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "out", "--format", "peft"], "nowhere"),
        (["{ours}", "out", "--format", "peft", "--base", "{base}"], "update_norm"),
        (["{ours}", "{ours}", "--format", "shadow-peft", "--base", "{base}"], "not an empty directory"),
        (["{ours}", "out", "--format", "peft", "--base", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_converted_is_one_line(arguments, said, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = dict(zip(("ours", "base"), saved, strict=True))
    assert main(["convert", *(word.format(**places) for word in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert said in line
    assert not list((tmp_path / "out").glob("*"))


def test_an_unknown_format_is_refused(saved, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["convert", saved[0], str(tmp_path / "out"), "--format", "gguf"])
    assert left.value.code == 2
    assert "gguf" in capsys.readouterr().err
