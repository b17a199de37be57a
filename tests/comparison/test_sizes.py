import pytest

from shadowtune.comparison.sizes import ParameterCounter, solve_sizes
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.methods import load_base, make_trainable, trainable_parameters
from tests.support.comparisons import SHADOW, compare_config

METHODS = {
    "base": None,
    "lora": {"lora": {"rank": 2, "alpha": 6}},
    "dora": None,
    "peft-shadow": {"method": "peft", "peft": {"peft_type": "SHADOW", "r": 4}},
    "shadow": {"shadow": SHADOW},
}


def solve(config):
    return solve_sizes(config, "words", ParameterCounter())


def test_sizes_make_real_models_equal(tmp_path):
    config = compare_config(tmp_path, methods=METHODS, budget={"like": "shadow", "tolerance": 0.1})
    sizes = solve(config)
    assert sizes["base"].parameters == 0
    counts = {}
    for method in ("lora", "dora", "peft-shadow", "shadow"):
        run = config.train_config("words", method, sizes[method].changes)
        model = make_trainable(load_base(run.model), run.method, run.task, run.shadow, run.lora, peft=run.peft)
        counts[method] = trainable_parameters(model)
        assert sizes[method].parameters == counts[method]
    assert all(abs(count - counts["shadow"]) <= 0.1 * counts["shadow"] for count in counts.values())
    assert sizes["lora"].changes["lora.alpha"] == 3 * sizes["lora"].changes["lora.rank"]


def test_without_a_budget_each_method_keeps_its_size(tmp_path):
    config = compare_config(tmp_path, methods=METHODS)
    assert all(size.changes == {} for size in solve(config).values())
    assert solve(config)["lora"].parameters == 2 * 4 * (4 * 64 - 32 + 3 * 80)


def test_a_number_of_parameters_can_be_aimed_at(tmp_path):
    methods = {"lora": None, "shadow": {"shadow": SHADOW}}
    found = solve(compare_config(tmp_path, methods=methods, budget={"parameters": 18000, "tolerance": 0.05}))
    assert all(abs(size.parameters - 18000) <= 0.1 * 18000 for size in found.values())
    assert found["lora"].changes["lora.rank"] > 1


def test_a_method_can_keep_its_size_or_have_another_chosen(tmp_path):
    methods = {
        **METHODS,
        "lora": {"size": "none", "lora": {"rank": 1}},
        "shadow": {"shadow": SHADOW, "size": "shadow.rank"},
    }
    sizes = solve(compare_config(tmp_path, methods=methods, budget={"like": "shadow", "tolerance": 0.1}))
    assert sizes["lora"].changes == {}
    assert list(sizes["shadow"].changes) == ["shadow.rank"]


def test_a_copy_of_a_block_does_not_grow_beyond_it(tmp_path):
    methods = {"shadow": {"shadow": {**SHADOW, "init_layers": [0]}}, "lora": None}
    with pytest.raises(ConfigError, match=r"shadow cannot have 60,000 trainable parameters: the nearest it comes is"):
        solve(compare_config(tmp_path, methods=methods, budget={"parameters": 60000}))


@pytest.mark.parametrize(
    ("methods", "budget", "said"),
    [
        ({"shadow": {"shadow": SHADOW}, "lora": None}, {"parameters": 10}, "cannot have 10 trainable parameters"),
        (
            {"shadow": {"size": "epochs"}},
            {"like": "shadow"},
            "epochs does not change how many parameters shadow trains",
        ),
        ({"full": None}, {"like": "full"}, "budget.like: full has no size to choose"),
        ({"full": None}, {"parameters": 5}, "no method has a size to choose"),
    ],
)
def test_what_cannot_be_made_equal_is_one_line(methods, budget, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        solve(compare_config(tmp_path, methods=methods, budget=budget))


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        solve(compare_config(tmp_path, common={"model": "./nowhere"}))


def test_equal_models_are_counted_once(tmp_path, monkeypatch):
    from shadowtune.comparison import sizes

    counted = []
    count = sizes.count_parameters
    monkeypatch.setattr(sizes, "count_parameters", lambda *args: counted.append(1) or count(*args))
    config, counter = compare_config(tmp_path), ParameterCounter()
    first = counter.count("a", config.train_config("words", "lora"))
    assert counter.count("b", config.train_config("words", "lora", {"epochs": 7})) == first
    assert counter.count("c", config.train_config("words", "lora", {"lora.rank": 4})) == 2 * first
    assert len(counted) == 2
