"""Model cards: what the Hub reads, and code that runs as it is written."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from shadowtune.cli.main import main
from shadowtune.config.training import DataConfig, LoraConfig
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.export.card import Card, describe_prompt, measured_accuracy, read_card
from shadowtune.training.run import train
from tests.support.runs import run_config
from tests.support.tokenizers import tiny_tokenizer


def metadata(card):
    return yaml.safe_load(card.read_text().split("---\n")[1])


def example(card, here):
    """Run the card's code where a reader would, and return what it prints."""
    (code,) = re.findall(r"^```python\n(.*?)^```", card.read_text(), re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("method", "task", "library", "relation"),
    [
        ("shadow", "causal_lm", "shadowtune", "adapter"),
        ("shadow", "classification", "shadowtune", "adapter"),
        ("lora", "causal_lm", "peft", "adapter"),
        ("lora", "classification", "peft", "adapter"),
        ("full", "causal_lm", "transformers", "finetune"),
    ],
)
def test_a_run_leaves_a_card_whose_code_runs(method, task, library, relation, tmp_path):
    config = run_config(tmp_path, task, method=method, lora=LoraConfig(rank=2), max_steps=2)
    summary = train(config, quiet=True)
    card = tmp_path / "run" / "model" / "README.md"
    found = metadata(card)
    assert found["library_name"] == library
    assert (found["base_model"], found["base_model_relation"]) == (config.model, relation)
    assert "shadowtune" in found["tags"]
    assert found["pipeline_tag"] == {"causal_lm": "text-generation", "classification": "text-classification"}[task]
    text = card.read_text()
    assert f"| training loss | {summary.final_loss:.4g}, at the end |" in text
    assert re.search(
        r"^Measured on .*threads, shadowtune \S+, torch \S+, transformers \S+, .*20\d\d-", text, re.MULTILINE
    )
    assert ("<|im_start|>user\nyour text<|im_end|>\n<|im_start|>assistant\n" in text) == (task == "causal_lm")
    printed = example(card, tmp_path / "run")
    assert printed.endswith("\n")
    assert (printed.strip() in {"LABEL_0", "LABEL_1", "LABEL_2"}) == (task == "classification")


@pytest.fixture(scope="module")
def detached(tmp_path_factory):
    """A run with a measured accuracy, and its detached model."""
    path = tmp_path_factory.mktemp("card")
    config = run_config(path, max_steps=2)
    train(replace(config, data=DataConfig(train=config.data.train, template="Sum: {prompt}")), quiet=True)
    row = {"rows": 4, "accuracy": 0.5, "accuracy_low": 0.2, "accuracy_high": 0.8}
    provenance = {"date": "2030-01-02", "processor": "a chip", "threads": 3, "versions": {"torch": "9.9"}}
    report = json.dumps({"rows": [row], "provenance": provenance})
    (path / "run" / "evaluation-detached-4.json").write_text(report)
    assert main(["detach", str(path / "run"), "--out", str(path / "small")]) == 0
    return path, config


def test_a_detached_model_has_the_same_facts_and_code_of_its_own(detached):
    path, config = detached
    card = path / "small" / "README.md"
    assert metadata(card)["library_name"] == "transformers"
    assert metadata(card)["base_model"] == config.model
    assert "shadowtune" not in re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[0]
    assert "| accuracy, detached | 0.500 on 4 rows (95 % interval 0.200 to 0.800); a chip, 3 threads, torch 9.9, " in (
        card.read_text()
    )
    example(card, path)


@pytest.mark.parametrize(("to", "library"), [("onnx", "onnxruntime"), ("safetensors", "transformers")])
def test_every_export_goes_on_with_the_card_of_what_it_was_made_from(to, library, detached, tmp_path):
    pytest.importorskip({"onnx": "onnxruntime", "safetensors": "torch"}[to])
    path, config = detached
    out = tmp_path / "small"
    assert main(["export", str(path / "small"), "--to", to, "--out", str(out)]) == 0
    card = out / "README.md"
    assert (metadata(card)["library_name"], metadata(card)["base_model"]) == (library, config.model)
    before, after = read_card(path / "small"), card.read_text()
    assert before.measured.keys() >= {"accuracy, detached", "training loss"}
    for name, value in (*before.training.items(), *before.measured.items()):
        assert f"| {name} | {value} |" in after
    assert f"Measured on {before.conditions}." in after
    example(card, tmp_path)


def test_names_with_quotes_and_bars_stay_what_they_are(tmp_path):
    card = Card('a "b": |c', training={"data | more": "x | y"}, measured={"m": "1"}, conditions="here", prompt="as is")
    (tmp_path / "README.md").write_text(card.text(12, 'it"s', "detached"))
    assert metadata(tmp_path / "README.md")["base_model"] == 'a "b": |c'
    assert read_card(tmp_path) == replace(card, prompt="")
    assert "from_pretrained('it\"s')" in (tmp_path / "README.md").read_text()
    assert "## Prompt\n\nas is\n" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("text", [None, "", "---\nbase_model: other\n---\n", "\x00"])
def test_a_card_of_others_or_none_is_an_empty_one(text, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == Card("")


def test_the_prompt_is_shown_as_the_model_saw_it():
    tokenizer = tiny_tokenizer()
    template = PromptFormat("Sum: {prompt} is", chat_template=False)
    assert "```text\nSum: your text is\n```" in describe_prompt(template, tokenizer)
    assert "<|im_start|>user\nyour text<|im_end|>" in describe_prompt(PromptFormat(), tokenizer)
    assert "{a}, {b}" in describe_prompt(PromptFormat("{a}, {b}"), tokenizer)


def test_a_damaged_report_gives_no_figure():
    for text in ("{", "[]", "{}", '{"rows": [{}]}', "[" * 100_000):
        assert measured_accuracy("detached", text) == {}


def test_cards_are_files_of_the_directory_and_no_part_of_the_weights(detached):
    names = {path.name for path in Path(detached[0] / "run" / "model").iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_a_gguf_file_has_its_card_in_the_metadata(tmp_path):
    import gguf

    from shadowtune.export.exporting import export
    from shadowtune.export.gguf_file import CARD
    from tests.support.shadows import perturbed_model

    model = perturbed_model(shadow_loss_weight=1.0).detached()
    out = tmp_path / "small.gguf"
    export((model, tiny_tokenizer()), "gguf", "f32", out, [[5, 6, 7]], 4, card=Card("org/base", training={"seed": "1"}))
    fields = gguf.GGUFReader(out).fields
    card = fields[CARD].contents()
    assert fields["general.base_model.0.name"].contents() == "org/base"
    assert "shadowtune" in fields["general.tags"].contents()
    assert "| seed | 1 |" in card and "## Prompt" in card
    said, monkey = [], card.split("```python")[1].split("```")[0]
    exec(monkey.replace("'small.gguf'", repr(str(out))), {"print": said.append})
    assert len(said) == 1
