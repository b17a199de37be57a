import pytest

from shadowtune import ShadowConfig
from shadowtune.config.checking import from_mapping
from shadowtune.config.comparison import CompareConfig
from shadowtune.config.loading import dump_config, load_config
from shadowtune.config.merging import merge
from shadowtune.config.presets import PRESETS
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError

DATA = {"data": {"train": "rows.jsonl"}}


def read(**values) -> TrainConfig:
    return from_mapping(TrainConfig, {**DATA, **values}, where="")


def test_without_a_preset_and_with_the_papers_nothing_changes():
    assert read().shadow == read(preset="paper").shadow == ShadowConfig()
    assert read(preset=None) == read()
    assert read(preset="paper", shadow={"rank": 3}) == read(preset="paper", method="shadow", shadow={"rank": 3})


def test_the_recommended_recipe_is_that_of_the_class_and_leaves_the_shadow_out_of_the_joint_stage():
    config = read(preset="recommended")
    assert config.shadow == ShadowConfig.recommended(shadow_loss_weight=0.0)
    assert config.shadow.variant == "stateless"
    assert config.shadow_first
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
    assert not read(preset="recommended").fits_head_mixing
    with_rows = {"train": "rows.jsonl", "validation": "held_back"}
    assert read(preset="recommended", data=with_rows).fits_head_mixing
    assert not read(preset="recommended", data=with_rows, fit_head_mixing=False).fits_head_mixing


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
