from dataclasses import replace

import pytest

from shadowtune.config.training import DataConfig, OptimizerConfig, TrainConfig
from shadowtune.errors import ConfigError
from shadowtune.training.trainer import training_arguments

CONFIG = TrainConfig(data=DataConfig(train="rows.jsonl"))


def test_warm_up_is_a_share_of_the_steps_that_are_really_taken(tmp_path):
    config = replace(CONFIG, optimizer=OptimizerConfig(warmup_ratio=0.1))
    assert training_arguments(config, tmp_path).get_warmup_steps(50) == 5
    config = replace(CONFIG, optimizer=OptimizerConfig(warmup_ratio=0.0))
    assert training_arguments(config, tmp_path).get_warmup_steps(50) == 0


def test_every_setting_arrives(tmp_path):
    optimizer = OptimizerConfig(0.5, weight_decay=0.25, schedule="constant", max_grad_norm=2.0)
    config = replace(
        CONFIG,
        data=DataConfig(train="rows.jsonl", validation="held-out.jsonl"),
        optimizer=optimizer,
        epochs=1.5,
        max_steps=7,
        batch_size=3,
        gradient_accumulation_steps=5,
        group_by_length=True,
        autocast=True,
        gradient_checkpointing="reentrant",
        compile=True,
        seed=11,
        logging_steps=13,
        save_steps=17,
        eval_steps=19,
    )
    found = training_arguments(config, tmp_path, quiet=True)
    assert found.output_dir == str(tmp_path)
    assert (found.learning_rate, found.weight_decay, found.max_grad_norm) == (0.5, 0.25, 2.0)
    assert found.lr_scheduler_type == "constant_with_warmup"
    assert (found.num_train_epochs, found.max_steps) == (1.5, 7)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (3, 5)
    assert found.train_sampling_strategy == "group_by_length"
    assert found.bf16
    assert found.activation_checkpointing
    assert found.activation_checkpointing_kwargs == {"use_reentrant": True}
    assert found.torch_compile
    assert (found.seed, found.logging_steps) == (11, 13)
    assert (found.save_strategy, found.save_steps) == ("steps", 17)
    assert (found.eval_strategy, found.eval_steps) == ("steps", 19)
    assert found.disable_tqdm
    assert found.report_to == []


def test_the_defaults_save_and_measure_after_each_epoch(tmp_path):
    found = training_arguments(CONFIG, tmp_path)
    assert (found.save_strategy, found.eval_strategy, found.max_steps) == ("epoch", "no", -1)
    assert not found.activation_checkpointing
    assert found.train_sampling_strategy == "random"
    with_validation = replace(CONFIG, data=DataConfig(train="a.jsonl", validation="b.jsonl"))
    assert training_arguments(with_validation, tmp_path).eval_strategy == "epoch"


def test_tensorboard_that_is_not_installed_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shadowtune\[tensorboard\]'"):
        training_arguments(replace(CONFIG, tensorboard=True), tmp_path)
    for name in ("wandb", "trackio", "mlflow"):
        with pytest.raises(ConfigError, match=f"^report_to={name} needs the package {name}: pip install {name}$"):
            training_arguments(replace(CONFIG, report_to=[name]), tmp_path)


def test_the_best_checkpoint_is_chosen_among_those_of_the_evaluations(tmp_path):
    config = replace(CONFIG, data=DataConfig(train="a.jsonl", validation="b.jsonl"), load_best_model_at_end=True)
    found = training_arguments(replace(config, eval_steps=7), tmp_path)
    assert (found.save_strategy, found.save_steps, found.eval_steps) == ("steps", 7, 7)
    assert (found.metric_for_best_model, found.greater_is_better) == ("loss", False)
    assert training_arguments(config, tmp_path).save_strategy == "epoch"
