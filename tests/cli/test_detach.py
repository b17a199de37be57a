import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowtune.cli.main import main
from shadowtune.data.prompt_format import PromptFormat


def test_a_run_becomes_a_plain_model(shadow_run, tmp_path, capsys):
    assert main(["detach", str(shadow_run), "--out", str(tmp_path / "small")]) == 0
    said = capsys.readouterr()
    assert "LlamaForCausalLM" in said.out
    assert "checked" in said.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert model.config.num_hidden_layers == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "small").chat_template
    assert "rows.jsonl" in (tmp_path / "small" / "README.md").read_text()


def test_what_stands_around_a_users_words_goes_along(shadow_run, tmp_path):
    config = shadow_run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("template: null", 'template: "Q {prompt}"', 1))
    try:
        assert main(["detach", str(shadow_run), "--out", str(tmp_path / "small")]) == 0
    finally:
        config.write_text(before)
    assert PromptFormat.load(tmp_path / "small") == PromptFormat("Q {prompt}", True)
    command = ["export", str(tmp_path / "small"), "--to", "safetensors", "--out", str(tmp_path / "f16")]
    assert main([*command, "--max-new-tokens", "2"]) == 0
    assert PromptFormat.load(tmp_path / "f16") == PromptFormat("Q {prompt}", True)


def test_a_saved_shadow_becomes_a_plain_model_in_another_dtype(shadow_run, tmp_path):
    command = ["detach", str(shadow_run / "model"), "--out", str(tmp_path / "small"), "--dtype", "bfloat16"]
    assert main(command) == 0
    assert str(AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype) == "torch.bfloat16"


def test_the_accuracy_that_was_measured_is_in_the_card(shadow_run, tmp_path):
    report = shadow_run / "evaluation-detached-4.json"
    report.write_text('{"rows": [{"rows": 4, "accuracy": 0.5, "accuracy_low": 0.1, "accuracy_high": 0.9}]}')
    try:
        assert main(["detach", str(shadow_run), "--out", str(tmp_path / "small")]) == 0
    finally:
        report.unlink()
    assert "accuracy, detached | 0.500 on 4 rows" in (tmp_path / "small" / "README.md").read_text()


def test_what_cannot_be_detached_is_one_line(shadow_run, lora_run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for run, out, said in (
        (tmp_path / "none", tmp_path / "a", "there is no"),
        (lora_run, tmp_path / "a", "lora run"),
        (tmp_path / "full", tmp_path / "a", "config.json"),
        (shadow_run, tmp_path / "full", "exists already"),
        (shadow_run, tmp_path / "full" / "file" / "a", "is a file"),
    ):
        assert main(["detach", str(run), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("arguments", [["x"], ["x", "--out", "y", "--dtype", "int8"]])
def test_arguments_are_checked(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["detach", *arguments])
    assert stopped.value.code == 2
