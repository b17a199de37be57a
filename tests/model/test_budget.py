import pytest

from shadowtune.errors import ConfigError
from shadowtune.model.budget import Growth, check_equal, equal_sizes, is_equal


def test_a_count_is_fixed_plus_a_share_for_each_step():
    assert Growth(fixed=100, per_step=30, step=8).count(16) == 160


@pytest.mark.parametrize(("count", "size"), [(160, 16), (174, 16), (176, 24), (0, 8), (1_000, 240)])
def test_the_nearest_size_is_a_multiple_of_the_step_and_at_least_one_step(count, size):
    assert Growth(fixed=100, per_step=30, step=8).nearest(count) == size


def test_a_package_that_ignores_the_size_has_one_count():
    assert Growth(fixed=100, per_step=0, step=8).nearest(5_000) == 8


def test_three_percent_of_ours_is_the_limit_on_either_side():
    assert is_equal(1_000, 1_030)
    assert is_equal(1_000, 970)
    assert not is_equal(1_000, 1_031)
    assert not is_equal(1_000, 969)
    assert not is_equal(1_031, 1_000_000)


def test_every_baseline_gets_the_size_nearest_to_ours():
    baselines = {"lora": Growth(0, 100), "fixed part": Growth(500, 10)}
    assert equal_sizes(1_000, "shadow", Growth(0, 10), baselines) == {"shadow": 100, "lora": 10, "fixed part": 50}


def test_ours_moves_as_little_as_need_be_when_a_rank_is_a_coarse_step():
    baselines = {"lora": Growth(0, 305_280), "dora": Growth(155_520, 305_280)}  # on SmolLM2-135M
    ours = Growth(fixed=1_938_240, per_step=13_824, step=8)  # by default 1536 wide, where no rank of DoRA fits
    sizes = equal_sizes(4_592_448, "shadow", ours, baselines)
    count = ours.count(sizes["shadow"])
    assert sizes == {"shadow": 1_544, "lora": 15, "dora": 15}
    assert all(is_equal(count, baselines[name].count(sizes[name])) for name in baselines)
    for nearer in (1_528, 1_536):
        assert not is_equal(ours.count(nearer), baselines["dora"].count(baselines["dora"].nearest(ours.count(nearer))))


def test_baselines_that_cannot_come_near_are_refused_with_the_counts():
    with pytest.raises(ConfigError, match=r"shadow has 1,000 .* lora 2,000; more than 3%"):
        equal_sizes(1_000, "shadow", Growth(0, 10), {"lora": Growth(1_500, 500), "near": Growth(0, 10)})


def test_a_wish_below_the_smallest_shadow_is_refused_with_the_counts():
    with pytest.raises(ConfigError, match=r"10 trainable parameters: the nearest it comes is 508"):
        equal_sizes(10, "shadow", Growth(500, 8), {})


def test_ours_never_becomes_smaller_than_one_step():
    with pytest.raises(ConfigError, match="not equal"):
        equal_sizes(1_000, "shadow", Growth(999, 1), {"lora": Growth(800, 169)})


def test_loaded_candidates_are_compared_only_when_they_train_equally_much():
    check_equal("shadow", {"shadow": 1_000, "lora": 1_030, "base": 0})
    with pytest.raises(ConfigError) as refused:
        check_equal("shadow", {"shadow": 1_000, "lora": 1_031, "dora": 1_000, "base": 0})
    assert "shadow has 1,000 trainable parameters, but lora 1,031; more than 3%" in str(refused.value)
    assert "dora" not in str(refused.value)
    assert "\n" not in str(refused.value)
