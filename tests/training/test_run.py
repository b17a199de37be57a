import json
from dataclasses import replace

import pytest
import torch

from shadowtune.config.loading import load_config
from shadowtune.config.training import DataConfig, LoraConfig, TrainConfig
from shadowtune.errors import CheckpointError, ConfigError, DataError, TrainingError
from shadowtune.model.methods import load_trained
from shadowtune.training import run as run_module
from shadowtune.training.run import build_model, train
from tests.support.runs import model_directory, run_config
from tests.support.shadows import tokens


@pytest.fixture
def trained(monkeypatch):
    """The models that ``train`` builds, in their order."""
    models = []

    def build(*args):
        models.append(build_model(*args))
        return models[-1]

    monkeypatch.setattr(run_module, "build_model", build)
    return models


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
@pytest.mark.parametrize("method", ["shadow", "lora", "dora", "full"])
def test_every_method_trains_and_loads_back_with_equal_logits(method, task, trained, tmp_path):
    base = model_directory(tmp_path / "base", pad_token_id=None)  # a causal LM: no head for classes, no padding
    config = run_config(tmp_path, task, method=method, model=base, lora=LoraConfig(rank=2))
    start = [p.detach().clone() for p in build_model(config, 3).parameters() if p.requires_grad]
    summary = train(config, quiet=True)
    model = trained[0].eval()
    after = [p for p in model.parameters() if p.requires_grad]
    assert summary.trainable_parameters == sum(p.numel() for p in after) == sum(p.numel() for p in start)
    assert any(not torch.equal(p, q) for p, q in zip(start, after, strict=True))
    loaded = load_trained(tmp_path / "run" / "model", method, task, config.model)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_run_leaves_its_settings_environment_metrics_and_summary(tmp_path):
    config = run_config(tmp_path, tensorboard=True)
    config = replace(config, data=replace(config.data, validation=config.data.train))
    summary = train(config, quiet=True)
    run = tmp_path / "run"
    assert load_config(TrainConfig, run / "config.yaml", []) == config
    environment = json.loads((run / "environment.json").read_text())
    assert {"commit", "date", "versions", "processor", "cores"} <= environment.keys()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] == pytest.approx(line["base_loss"] + 0.05 * line["shadow_loss"]) for line in losses)
    assert all("learning_rate" in line and "grad_norm" in line for line in losses)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert json.loads((run / "summary.json").read_text()) == vars(summary)
    assert (summary.steps, summary.final_loss) == (6, losses[-1]["loss"])
    assert summary.tokens_per_second == pytest.approx(2 * 395 / summary.train_seconds)
    assert {"loss", "shadow_loss"} <= tensorboard_scalars(run / "tensorboard").keys()
    assert not list(run.rglob(".saving*"))


def tensorboard_scalars(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {name.removeprefix("train/"): events.Scalars(name) for name in events.Tags()["scalars"]}


def test_without_tensorboard_no_such_files_are_written_and_nothing_is_printed(tmp_path, capsys):
    lines = []
    train(run_config(tmp_path), report=lines.append, quiet=True)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert capsys.readouterr().out == ""
    assert lines[0] == "read as prompt and completion: 12 examples"
    assert lines[1].startswith("data: 12 examples, 395 tokens (35 labelled)")
    assert [line.split(":")[1].strip() for line in lines[2:]] == ["base", "shadow backbone", "shadow boundaries"]
    assert "of which trainable 0" in lines[2]


def test_full_fine_tuning_of_a_model_with_tied_embeddings(trained, tmp_path):
    model_directory(tmp_path / "tied", tie_word_embeddings=True)
    config = run_config(tmp_path, model=str(tmp_path / "tied"), method="full", save_steps=3)
    train(config, quiet=True)
    model = trained[0].eval()
    loaded = load_trained(tmp_path / "run" / "model", "full", "causal_lm", config.model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.use_cache
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    longer = replace(config, epochs=3.0)
    assert train(longer, resume=True, quiet=True).steps == 9


def test_bfloat16_base_with_autocast(trained, tmp_path):
    config = run_config(tmp_path, base_dtype="bfloat16", autocast=True, gradient_checkpointing="non_reentrant")
    summary = train(config, quiet=True)
    assert summary.final_loss < 6
    assert {p.dtype for p in trained[0].parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trained[0].parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_are_trained_in_the_precision_that_was_chosen(method, trained, tmp_path):
    train(run_config(tmp_path, method=method, trainable_dtype="bfloat16", max_steps=1), quiet=True)
    assert {p.dtype for p in trained[0].parameters() if p.requires_grad} == {torch.bfloat16}


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    losses = []
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = run_config(tmp_path, seed=seed, output=str(tmp_path / output))
        losses.append(train(config, quiet=True).final_loss)
    assert losses[0] == losses[1] != losses[2]


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = run_config(tmp_path)
    first = train(config, quiet=True)
    metrics = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert train(config, resume=True, quiet=True) == first
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == metrics


def test_a_finished_run_can_be_trained_longer_but_not_otherwise(tmp_path):
    config = run_config(tmp_path)
    first = train(config, quiet=True)
    with pytest.raises(TrainingError, match="holds a run already; pass --resume, --overwrite or another output"):
        train(config, quiet=True)
    with pytest.raises(ConfigError, match="other settings: batch_size, seed changed"):
        train(replace(config, batch_size=2, seed=1), resume=True, quiet=True)
    longer = train(replace(config, epochs=3.0), resume=True, quiet=True)
    assert longer.steps == 9
    assert longer.train_seconds > first.train_seconds
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))


def test_overwriting_starts_anew(tmp_path):
    config = run_config(tmp_path)
    train(config, quiet=True)
    shorter = replace(config, max_steps=2, seed=7)
    assert train(shorter, overwrite=True, quiet=True).steps == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert load_config(TrainConfig, tmp_path / "run" / "config.yaml", []) == shorter


def test_bad_data_leaves_the_run_that_is_there(tmp_path):
    config = run_config(tmp_path)
    train(config, quiet=True)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    bad = replace(config, data=DataConfig(train=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError):
        train(bad, overwrite=True, quiet=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


def test_a_run_that_failed_its_checks_can_be_started_again_as_it_is(tmp_path):
    config = run_config(tmp_path)
    with pytest.raises(DataError):
        train(replace(config, data=DataConfig(train=str(tmp_path / "none.jsonl"))), quiet=True)
    assert train(config, quiet=True).steps == 6


def test_a_row_beyond_the_models_positions_or_vocabulary_is_found_before_training(tmp_path):
    config = run_config(tmp_path)
    short = model_directory(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(DataError, match="positions"):
        train(replace(config, model=short), quiet=True)
    small = model_directory(tmp_path / "small", vocab_size=50)
    with pytest.raises(DataError, match="vocabulary"):
        train(replace(config, model=small), quiet=True)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_class_beyond_num_labels_names_its_row(tmp_path):
    config = run_config(tmp_path, "classification", num_labels=2)
    with pytest.raises(DataError, match="row 3 has class 2, but num_labels=2 allows only 0 to 1"):
        train(config, quiet=True)


def test_classes_are_counted_over_both_splits(tmp_path):
    config = run_config(tmp_path, "classification")
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "add 1", "label": 6}\n')
    train(replace(config, data=replace(config.data, validation=str(more))), quiet=True)
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert len(saved["id2label"]) == 7


def test_a_model_that_does_not_exist_is_one_line(tmp_path):
    config = run_config(tmp_path, model=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="nowhere") as caught:
        train(config, quiet=True)
    assert "\n" not in str(caught.value)


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def full_disk_of_tokenizers(*args, **kwargs):
    raise Exception("No space left on device (os error 28)")  # as the package tokenizers raises it


WRITES = {
    "weights": ("shadowtune.model.checkpoint.save_file", full_disk, CheckpointError),
    "tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", full_disk_of_tokenizers, CheckpointError),
    "optimizer": ("torch.save", full_disk, CheckpointError),
    "state": ("transformers.TrainerState.save_to_json", full_disk, CheckpointError),
    "flushing": ("shadowtune.model.files.flush", full_disk, CheckpointError),
    "log": ("shadowtune.training.callbacks.json.dumps", full_disk, TrainingError),
}


@pytest.mark.parametrize("part", WRITES)
def test_a_full_disk_after_a_checkpoint_is_one_line_that_names_it_and_leaves_no_rubbish(part, tmp_path, monkeypatch):
    name, fail, error = WRITES[part]
    config = run_config(tmp_path, save_steps=2)
    step = run_module.ShadowTrainer.training_step

    def fill(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            monkeypatch.setattr(name, fail)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(run_module.ShadowTrainer, "training_step", fill)
    with pytest.raises(error, match=r"No space left on device; .*--resume goes on from .*checkpoint-2$") as caught:
        train(config, quiet=True)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "run").rglob("*") if "saving" in path.name]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert train(config, resume=True, quiet=True).steps == 6
