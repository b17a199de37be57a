import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from shadowtune.errors import CheckpointError, ConfigError, TrainingError
from shadowtune.training.run import train
from shadowtune.training.run_directory import DIGESTS_FILE, InputDigests, base_digest, tokenizer_digest
from shadowtune.training.trainer import ShadowTrainer
from tests.support.bases import tiny_base
from tests.support.runs import model_directory, rows_file, run_config
from tests.support.tokenizers import CHATML, tiny_tokenizer


def stopped(config, monkeypatch, step=3):
    """Train up to a step, with a checkpoint after each."""
    train_step = ShadowTrainer.training_step

    def step_or_stop(trainer, *args, **kwargs):
        if trainer.state.global_step == step and trainer.args.output_dir.startswith(config.output):
            raise TrainingError("stopped")
        return train_step(trainer, *args, **kwargs)

    monkeypatch.setattr(ShadowTrainer, "training_step", step_or_stop)
    with pytest.raises(TrainingError, match="stopped"):
        train(config, quiet=True)
    monkeypatch.undo()


def another_row(config):
    rows_file(Path(config.data.train), count=11)


def rows_in_another_order(config):
    lines = Path(config.data.train).read_text().splitlines(keepends=True)
    Path(config.data.train).write_text("".join(reversed(lines)))


def another_validation_row(config):
    rows_file(Path(config.data.validation), count=3)


def other_weights(config):
    model_directory(Path(config.model), seed=3)


def one_other_number(config):
    """Between those that the base's fingerprint looks at."""
    file = Path(config.model) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][1, 1] += 1.0
    save_file(tensors, file, {"format": "pt"})


def another_base_of_rotations(config):
    file = Path(config.model) / "config.json"
    content = json.loads(file.read_text())
    content["rope_parameters"]["rope_theta"] = 5e5
    file.write_text(json.dumps(content))


def another_chat_template(config):
    tiny_tokenizer("{{ 'x' }}" + CHATML).save_pretrained(config.model)


def another_special_token(config):
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.unk_token = tokenizer.pad_token
    tokenizer.save_pretrained(config.model)


CHANGES = {
    another_row: "the training rows changed",
    rows_in_another_order: "the training rows changed",
    another_validation_row: "the validation rows changed",
    other_weights: "the base's weights or config changed",
    one_other_number: "the base's weights or config changed",
    another_base_of_rotations: "the base's weights or config changed",
    another_chat_template: "the tokenizer changed",
    another_special_token: "the tokenizer changed",
}


@pytest.fixture
def config(tmp_path):
    config = run_config(tmp_path, save_steps=1)
    return replace(config, data=replace(config.data, validation=rows_file(tmp_path / "validation.jsonl", count=4)))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_run_is_not_resumed_with_anything_else_under_the_same_path(change, config, monkeypatch):
    stopped(config, monkeypatch)
    change(config)
    with pytest.raises(ConfigError, match=f"since it began, {CHANGES[change]}; put back what was there") as caught:
        train(config, resume=True, quiet=True)
    assert "\n" not in str(caught.value)
    assert (Path(config.output) / "checkpoints" / "checkpoint-3").is_dir()


def test_what_was_put_back_is_resumed(config, monkeypatch, tmp_path):
    shutil.copytree(config.model, tmp_path / "kept")
    stopped(config, monkeypatch)
    other_weights(config)
    with pytest.raises(ConfigError):
        train(config, resume=True, quiet=True)
    shutil.rmtree(config.model)
    shutil.copytree(tmp_path / "kept", config.model)
    assert train(config, resume=True, quiet=True).steps == 6


@pytest.mark.parametrize(("change", "words"), [(another_row, "training rows"), (other_weights, "base's weights")])
def test_a_shadow_that_learned_alone_is_not_joined_with_anything_else(change, words, config, monkeypatch):
    config = replace(config, shadow_epochs=1.0)
    step = ShadowTrainer.training_step

    def only_alone(trainer, *args, **kwargs):
        if "shadow" not in Path(trainer.args.output_dir).parts[-2]:
            raise TrainingError("stopped")
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(ShadowTrainer, "training_step", only_alone)
    with pytest.raises(TrainingError, match="stopped"):
        train(config, quiet=True)
    monkeypatch.undo()
    change(config)
    with pytest.raises(ConfigError, match=rf"cannot resume .*shadow: since it began, the {words}"):
        train(config, resume=True, quiet=True)


@pytest.mark.parametrize(("content", "words"), [(None, f"has no {DIGESTS_FILE}"), ("{", "damaged"), ("[]", "damaged")])
def test_a_run_without_a_whole_record_is_not_resumed(content, words, config, monkeypatch):
    stopped(config, monkeypatch)
    file = Path(config.output) / DIGESTS_FILE
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(CheckpointError, match=words):
        train(config, resume=True, quiet=True)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "progress.json"]
)
def test_a_run_is_not_resumed_without_a_part_of_its_checkpoint(name, config, monkeypatch):
    stopped(config, monkeypatch)
    (Path(config.output) / "checkpoints" / "checkpoint-3" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"checkpoint-3/{name} is missing; delete .*checkpoint-3 to resume"):
        train(config, resume=True, quiet=True)
    shutil.rmtree(Path(config.output) / "checkpoints" / "checkpoint-3")
    assert train(config, resume=True, quiet=True).steps == 6


def test_a_classification_run_records_its_rows_too(tmp_path):
    config = run_config(tmp_path, "classification", max_steps=1)
    train(config, quiet=True)
    recorded = json.loads((tmp_path / "run" / DIGESTS_FILE).read_text())
    assert recorded.keys() == {"base", "tokenizer", "train", "validation"}
    rows = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    rows[0]["label"] = 2
    Path(config.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="the training rows changed"):
        train(replace(config, max_steps=2), resume=True, quiet=True)


def test_digests_are_of_contents():
    first, again, other = tiny_base(), tiny_base(), tiny_base(seed=1)
    assert base_digest(first) == base_digest(again) != base_digest(other)
    assert base_digest(first.to(torch.bfloat16)) != base_digest(again)
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(tiny_tokenizer())
    assert tokenizer_digest(tiny_tokenizer(add_bos=True)) != before


def test_a_quantized_base_has_a_digest_of_what_is_stored():
    torchao = pytest.importorskip("torchao.quantization")
    digests = []
    for seed in (0, 0, 1):
        base = tiny_base(seed=seed)
        torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
        digests.append(base_digest(base))
    assert digests[0] == digests[1] != digests[2]


def test_inputs_are_compared_field_by_field(tmp_path):
    inputs = InputDigests("a", "b", "c", None)
    inputs.save(tmp_path)
    inputs.check(tmp_path)
    with pytest.raises(ConfigError, match="the base's weights or config and the training rows changed"):
        InputDigests("x", "b", "x", None).check(tmp_path)
