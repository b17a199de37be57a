import pytest

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


@pytest.mark.parametrize("other", ["prompt_field", "text_field"])
def test_a_template_and_the_field_it_replaces_do_not_go_together(other):
    with pytest.raises(ConfigError, match="template replaces prompt_field and text_field"):
        DataConfig(train="rows.jsonl", template="{text}", **{other: "question"})
    assert DataConfig(train="rows.jsonl", template="{text}", completion_field="answer").template == "{text}"


def test_a_malformed_template_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"template 'Request: \{text'"):
        DataConfig(train="rows.jsonl", template="Request: {text")


@pytest.mark.parametrize("other", ["template", "prompt_field", "completion_field"])
def test_blocks_are_of_plain_text(other):
    with pytest.raises(ConfigError, match=f"block_size=8 joins plain texts, which have no {other}"):
        DataConfig(train="rows.jsonl", block_size=8, **{other: "{question}"})
    assert DataConfig(train="rows.jsonl", block_size=8, text_field="story").block_size == 8


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
