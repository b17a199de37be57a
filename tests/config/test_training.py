import pytest

from shadowtune.config.comparison import CompareConfig
from shadowtune.config.loading import dump_config, load_config
from shadowtune.config.settings import from_mapping
from shadowtune.config.shadow import ShadowConfig
from shadowtune.config.training import PRESETS, DataConfig, LoraConfig, OptimizerConfig, TrainConfig, merge
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
        (TrainConfig, "keep_checkpoints", -1, 0),
        (TrainConfig, "early_stopping_patience", 0, None),
        (TrainConfig, "samples", -1, 0),
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
            {"data": {"train": "x", "validation": "y", "learn_validation": True}, "fit_logit_interpolation": True},
            "leaves no validation rows to choose by",
        ),
    ],
)
def test_settings_of_baselines_that_contradict_each_other_are_one_line(settings, said):
    from shadowtune.config.settings import from_mapping

    with pytest.raises(ConfigError, match=said):
        from_mapping(TrainConfig, {"data": {"train": "x"}, **settings}, "")


VALUES = {"data": {"train": "rows.jsonl"}}


def read(**values) -> TrainConfig:
    return from_mapping(TrainConfig, {**VALUES, **values}, where="")


def test_without_a_preset_and_with_the_papers_nothing_changes():
    assert read().shadow == read(preset="paper").shadow == ShadowConfig()
    assert read(preset=None) == read()
    assert read(preset="paper", shadow={"rank": 3}) == read(preset="paper", method="shadow", shadow={"rank": 3})


def test_the_recommended_recipe_is_that_of_the_class_and_leaves_the_shadow_out_of_the_joint_stage():
    config = read(preset="recommended")
    assert config.shadow == ShadowConfig.recommended(shadow_loss_weight=0.0)
    assert config.shadow.variant == "stateless"
    assert config.has_shadow_only_stage
    assert ShadowConfig.recommended().shadow_loss_weight > 0


def test_what_a_file_sets_wins_in_nested_settings_too(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: recommended\ndata: {train: rows.jsonl}\nshadow: {rank: 5}\nshadow_epochs: 2\n")
    config = load_config(TrainConfig, file, ["optimizer.learning_rate=7e-4"])
    recipe = read(preset="recommended")
    assert (config.shadow.rank, config.shadow_epochs, config.optimizer.learning_rate) == (5, 2.0, 7e-4)
    assert config.shadow.init_layers == recipe.shadow.init_layers
    assert config.shadow.alpha == recipe.shadow.alpha != ShadowConfig().alpha
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(TrainConfig, tmp_path / "resolved.yaml", []) == config


def test_a_preset_on_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {train: rows.jsonl}\n")
    assert load_config(TrainConfig, file, ["preset=recommended"]) == read(preset="recommended")


@pytest.mark.parametrize("setting", ["epochs", "batch_size", "model", "base_dtype", "seed"])
def test_what_a_task_and_its_budget_decide_is_left_alone(setting):
    assert vars(read(preset="recommended"))[setting] == vars(read())[setting]


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"preset must be one of paper, recommended, got 'recomended' \(did you mean"):
        read(preset="recomended")
    with pytest.raises(ConfigError, match="preset must be one of"):
        read(preset=["recommended"])


def test_validation_rows_are_used_where_there_are_some():
    assert not read(preset="recommended").fits_logit_interpolation
    with_rows = {"train": "rows.jsonl", "validation": "hold_out"}
    assert read(preset="recommended", data=with_rows).fits_logit_interpolation
    assert not read(preset="recommended", data=with_rows, fit_logit_interpolation=False).fits_logit_interpolation


@pytest.mark.parametrize(
    "settings",
    [
        {"task": "classification"},
        {"stage": "pretrain"},
        {"method": "lora"},
        {"base_quantization": "int8"},
        {"shadow": {"backbone": "some/model"}},
        {"shadow": {"init_from": "runs/x/model"}},
        {"shadow": {"num_shadow_layers": 2}},
        {"shadow": None},
        {"shadow": {"variant": "paper"}},
    ],
    ids=str,
)
def test_it_goes_with_every_kind_of_run(settings):
    if settings == {"shadow": None}:
        with pytest.raises(ConfigError, match="shadow must be a mapping"):
            read(preset="recommended", **settings)
        return
    config = read(preset="recommended", **settings)
    for key, value in settings.items():
        if not isinstance(value, dict):
            assert vars(config)[key] == value
        else:
            assert {name: vars(config.shadow)[name] for name in value} == value
    alone = (config.task, config.stage) == ("causal_lm", "task")
    assert (config.shadow.shadow_loss_weight > 0) == (not alone), "the shadow learns somewhere"


def test_a_layer_with_a_preset_wins_over_those_before_and_gives_way_to_those_after():
    merged = merge({"optimizer": {"learning_rate": 0.1, "weight_decay": 0.2}}, {"preset": "recommended"})
    assert merged["optimizer"]["learning_rate"] == read(preset="recommended").optimizer.learning_rate
    assert merged["optimizer"]["weight_decay"] == 0.2
    assert merge(merged, {"shadow": {"rank": 2}})["shadow"]["rank"] == 2
    assert "shadow_epochs" not in merge({"task": "classification"}, {"preset": "recommended"})


def test_a_method_of_a_comparison_takes_it():
    methods = {"lora": None, "shadow": {"preset": "recommended", "shadow": {"rank": 9}}}
    common = {"optimizer": {"learning_rate": 0.1}, "epochs": 3}
    config = CompareConfig(tasks={"clinc150": None}, methods=methods, common=common)
    ours, lora = config.train_config("clinc150", "shadow"), config.train_config("clinc150", "lora")
    recipe = read(preset="recommended")
    assert (ours.shadow.variant, ours.shadow.rank, ours.epochs) == ("stateless", 9, 3.0)
    assert ours.optimizer.learning_rate == recipe.optimizer.learning_rate
    assert (lora.optimizer.learning_rate, lora.shadow) == (0.1, ShadowConfig())
    tried = config.train_config("clinc150", "shadow", {"optimizer.learning_rate": 0.3})
    assert tried.optimizer.learning_rate == 0.3


def test_a_misspelt_setting_beside_a_preset_is_refused():
    with pytest.raises(ConfigError, match=r"unknown key shadow\.rnak"):
        read(preset="recommended", shadow={"rnak": 3})
    with pytest.raises(ConfigError, match=r"unknown key methods\.shadow\.presett"):
        CompareConfig(tasks={"clinc150": None}, methods={"shadow": {"presett": "recommended"}})


def test_each_name_is_a_choice():
    for name in PRESETS:
        assert read(preset=name).preset == name


VALIDATED = {"data": {"train": "a.jsonl", "validation": "b.jsonl"}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": {"train": "a.jsonl"}, "early_stopping_patience": 2}, "^early_stopping_patience=2 .* set data.valid"),
        (
            {"data": {"train": "a.jsonl"}, "load_best_model_at_end": True},
            "^load_best_model_at_end=true .* set data.val",
        ),
        ({"load_best_model_at_end": True, "save_steps": 3, "eval_steps": 2}, "leave save_steps=3 out, or set eval_ste"),
        ({"load_best_model_at_end": True, "keep_checkpoints": 1}, "set keep_checkpoints to at least 2, or to 0"),
        (
            {"early_stopping_patience": 1, "method": "lora", "metric_for_best_model": "base_loss"},
            "metric_for_best_model=base_loss is a term of a shadow's joint loss",
        ),
        (
            {
                "early_stopping_patience": 1,
                "shadow": {"shadow_loss_weight": 0.0},
                "metric_for_best_model": "shadow_loss",
            },
            "shadow_loss is not computed while shadow.shadow_loss_weight is 0",
        ),
        ({"report_to": ["wandbb"]}, r"^report_to\[0\] must be one of tensorboard, .* \(did you mean wandb\?\)"),
    ],
)
def test_what_compares_evaluations_needs_them(settings, said):
    with pytest.raises(ConfigError, match=said):
        from_mapping(TrainConfig, {**VALIDATED, **settings})


def test_trackers_are_named_once_and_a_single_one_needs_no_list():
    assert from_mapping(TrainConfig, {**VALIDATED, "report_to": "wandb"}).trackers == ["wandb"]
    both = from_mapping(TrainConfig, {**VALIDATED, "report_to": ["tensorboard", "mlflow"], "tensorboard": True})
    assert both.trackers == ["tensorboard", "mlflow"]
