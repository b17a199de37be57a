import pytest

from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import DataConfig, LoraConfig, OptimizerConfig, TrainConfig
from shadowtune.errors import ConfigError

DATA = DataConfig(train="rows.jsonl")


@pytest.mark.parametrize(
    ("kind", "name", "bad", "good"),
    [
        (DataConfig, "max_length", 1, 2),
        (DataConfig, "limit", 0, 1),
        (DataConfig, "block_size", 1, 2),
        (LoraConfig, "rank", 0, 1),
        (LoraConfig, "alpha", -1.0, 0.0),
        (LoraConfig, "dropout", 1.0, 0.0),
        (OptimizerConfig, "learning_rate", -1e-3, 0.0),
        (OptimizerConfig, "learning_rate", float("nan"), 1.0),
        (OptimizerConfig, "backbone_learning_rate", -1e-3, None),
        (OptimizerConfig, "weight_decay", -0.1, 0.0),
        (OptimizerConfig, "warmup_ratio", 1.0, 0.5),
        (OptimizerConfig, "max_grad_norm", -1.0, 0.0),
        (TrainConfig, "max_steps", 0, 1),
        (TrainConfig, "batch_size", 0, 1),
        (TrainConfig, "gradient_accumulation_steps", 0, 1),
        (TrainConfig, "logging_steps", 0, 1),
        (TrainConfig, "save_steps", 0, None),
        (TrainConfig, "eval_steps", 0, None),
        (TrainConfig, "keep_checkpoints", 0, 1),
        (TrainConfig, "projection_steps", -1, 0),
        (TrainConfig, "seed", -1, 0),
        (TrainConfig, "seed", 2**32, 2**32 - 1),
        (TrainConfig, "epochs", 0.0, 0.01),
        (TrainConfig, "epochs", float("nan"), 1.0),
        (TrainConfig, "epochs", float("inf"), 100.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(kind, name, bad, good):
    required = {DataConfig: {"train": "rows.jsonl"}, TrainConfig: {"data": DATA}}.get(kind, {})
    with pytest.raises(ConfigError, match=rf"^{name} must be"):
        kind(**required, **{name: bad})
    assert vars(kind(**required, **{name: good}))[name] == good


def test_num_labels_needs_classification():
    with pytest.raises(ConfigError, match="num_labels is set to 3, but task is causal_lm; set task=classification"):
        TrainConfig(data=DATA, num_labels=3)
    assert TrainConfig(data=DATA, num_labels=3, task="classification").num_labels == 3
    with pytest.raises(ConfigError, match="num_labels must be at least 1"):
        TrainConfig(data=DATA, num_labels=0, task="classification")


def test_padding_free_needs_a_language_model():
    with pytest.raises(ConfigError, match="padding_free=true needs task=causal_lm, but task is classification"):
        TrainConfig(data=DATA, task="classification", padding_free=True)
    assert TrainConfig(data=DATA, padding_free=True).padding_free


def test_blocks_need_a_language_model():
    with pytest.raises(ConfigError, match=r"data\.block_size=8 needs task=causal_lm, but task is classification"):
        TrainConfig(data=DataConfig(train="rows.jsonl", block_size=8), task="classification")


@pytest.mark.parametrize(("name", "value"), [("method", "lora"), ("method", "full"), ("task", "classification")])
def test_pretraining_needs_a_shadow_that_is_a_language_model(name, value):
    with pytest.raises(ConfigError, match=f"^stage=pretrain .*{name} is {value}"):
        TrainConfig(data=DATA, stage="pretrain", **{name: value})
    assert TrainConfig(data=DATA, stage="pretrain").stage == "pretrain"


def test_projections_come_first_only_in_pretraining():
    with pytest.raises(ConfigError, match="projection_steps=2 needs stage=pretrain: run shadowtune pretrain"):
        TrainConfig(data=DATA, projection_steps=2)
    with pytest.raises(ConfigError, match="set gradient_checkpointing=non_reentrant"):
        TrainConfig(data=DATA, stage="pretrain", projection_steps=2, gradient_checkpointing="reentrant")
    settings = {"stage": "pretrain", "projection_steps": 2, "gradient_checkpointing": "non_reentrant"}
    assert TrainConfig(data=DATA, **settings).projection_steps == 2


TAUGHT = {"distillation_weight": 0.5, "distillation_top_k": 8}


@pytest.mark.parametrize(
    ("stage", "shadow", "message"),
    [
        ("task", TAUGHT, "keeps what the bare base predicts, which only stage=pretrain asks for; leave it out"),
        ("pretrain", {"distillation_weight": 0.5}, "set shadow.distillation_top_k, for instance to 32"),
        ("pretrain", {"distillation_top_k": 8}, "shadow.distillation_weight above 0, or leave it out"),
        ("pretrain", {**TAUGHT, "matching_weight": 0.1}, r"while shadow\.matching_weight=0\.1 needs its hidden states"),
    ],
)
def test_a_cache_of_the_teacher_needs_top_tokens_that_are_all_it_teaches(stage, shadow, message):
    with pytest.raises(ConfigError, match=f"^distillation_cache=kept .*{message}"):
        TrainConfig(data=DATA, stage=stage, shadow=ShadowConfig(**shadow), distillation_cache="kept")
    good = TrainConfig(data=DATA, stage="pretrain", shadow=ShadowConfig(**TAUGHT), distillation_cache="kept")
    assert good.distillation_cache == "kept"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "ensemble"}, "set shadow_epochs above 0, and data.validation"),
        ({"method": "shadow", "optimizer": {"lora_plus_ratio": 16.0}}, "is for LoRA's two matrices"),
        ({"optimizer": {"lora_plus_ratio": -1.0}, "method": "lora"}, "lora_plus_ratio must be at least 0"),
        (
            {"data": {"train": "x", "validation": "y", "learn_validation": True}, "fit_head_mixing": True},
            "leaves no validation rows to choose by",
        ),
    ],
)
def test_settings_of_baselines_that_contradict_each_other_are_one_line(settings, said):
    from shadowtune.config.checking import from_mapping

    with pytest.raises(ConfigError, match=said):
        from_mapping(TrainConfig, {"data": {"train": "x"}, **settings}, "")
