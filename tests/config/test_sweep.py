import pytest

from shadowtune.config.sweep import SweepConfig
from shadowtune.errors import ConfigError

GRID = {"optimizer.learning_rate": [1, 2], "epochs": [3, 4]}


def test_every_combination_of_a_grid_is_a_trial():
    assert SweepConfig(grid=GRID).trials("shadow") == [
        {"optimizer.learning_rate": 1, "epochs": 3},
        {"optimizer.learning_rate": 1, "epochs": 4},
        {"optimizer.learning_rate": 2, "epochs": 3},
        {"optimizer.learning_rate": 2, "epochs": 4},
    ]


def test_a_method_can_have_a_grid_of_its_own():
    sweep = SweepConfig(grid=GRID, methods={"lora": {"lora.alpha": [5, 6]}})
    assert sweep.trials("lora") == [{"lora.alpha": 5}, {"lora.alpha": 6}]
    assert len(sweep.trials("dora")) == 4
    assert sweep.grids() == {"grid": GRID, "methods.lora": {"lora.alpha": [5, 6]}}


def test_without_a_grid_the_settings_are_tried_as_they_are():
    assert SweepConfig().trials("lora") == [{}]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grid": {"epochs": []}}, r"grid.epochs must be a list of values, got \[\]"),
        ({"methods": {"lora": 3}}, "methods.lora must be a mapping of dotted keys to lists, got 3"),
    ],
)
def test_grids_are_lists_by_dotted_keys(settings, said):
    with pytest.raises(ConfigError, match=said):
        SweepConfig(**settings)
