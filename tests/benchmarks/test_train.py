import pytest
import torch

from benchmarks.benchmark import Case
from benchmarks.methods import BASELINES, CUDA_BASELINES, METHODS, OURS
from benchmarks.training import TrainCandidate, TrainSettings, plan_train
from shadowtune.core import losses
from shadowtune.core.losses import linear_cross_entropy
from shadowtune.errors import CheckpointError, ConfigError, ShadowtuneError
from shadowtune.model.budget import is_equal

SMALL = {"model": "tiny", "batch": 2, "length": 16}
SIZES = {name: 16 if method.size_name else None for name, method in METHODS.items()}
TRAINED = [name for name in METHODS if SIZES[name] and name not in CUDA_BASELINES]


def case(labelled):
    return {"rows": SMALL["batch"], "length": SMALL["length"], "labelled": labelled}


def candidate(name, **settings):
    return TrainCandidate(TrainSettings(**{**SMALL, **settings}), name, size=SIZES[name])


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_trains_what_is_trainable_and_nothing_else(name):
    one = candidate(name)
    one.prepare(case(1.0))
    before = values(one.model)
    one._step()
    for parameter_name, parameter in one.model.named_parameters():
        same = torch.equal(before[parameter_name], parameter)
        assert same or parameter.requires_grad, parameter_name
        assert parameter.grad is None, parameter_name
    moved = [p.numel() for n, p in one.model.named_parameters() if not torch.equal(before[n], p)]
    assert sum(moved) > 0.5 * one.trainable_parameters


def test_the_base_trains_nothing():
    one = candidate("base")
    before = values(one.model)
    one.prepare(case(0.5))
    assert one.measure() > 0
    assert (one.trainable_parameters, one.size) == (0, None)
    assert all(torch.equal(before[name], parameter) for name, parameter in one.model.named_parameters())
    assert not one.model.training


@pytest.mark.parametrize(("share", "labels"), [(1.0, 16), (0.25, 4), (0.3, 5), (0.001, 1)])
def test_the_end_of_each_row_is_labelled(share, labels):
    one = candidate(OURS)
    one.prepare(case(share))
    batch = one.batch
    assert torch.equal(batch["labels"][:, -labels:], batch["input_ids"][:, -labels:])
    assert (batch["labels"][:, : 16 - labels] == -100).all()


def test_a_baseline_computes_logits_at_all_positions_and_ours_sweeps_over_the_labelled_ones(monkeypatch):
    swept = []

    def spy(head, h, s, *rest):
        swept.append((len(h), len(s)))
        return linear_cross_entropy(head, h, s, *rest)

    monkeypatch.setattr(losses, "linear_cross_entropy", spy)
    rows = {}
    for name in (OURS, "lora", "base"):
        one = candidate(name)
        one.prepare(case(0.25))
        base = one.model.base if name == OURS else one.model
        seen = []
        base.get_output_embeddings().register_forward_hook(
            lambda head, inputs, output, seen=seen: seen.append(output.numel() // output.shape[-1])
        )
        one._step()
        rows[name] = sum(seen)
    assert rows == {OURS: 0, "lora": 2 * 16, "base": 2 * 16}
    assert set(swept) == {(2 * 4, 2 * 4)}


def test_every_candidate_sees_the_same_batch():
    batches = []
    for name in (OURS, "lora", "base"):
        one = candidate(name)
        one.prepare(case(0.5))
        batches.append(one.batch)
    for batch in batches[1:]:
        assert all(torch.equal(batch[key], batches[0][key]) for key in batch)


def test_a_sample_counts_the_tokens_of_all_its_timed_steps(monkeypatch):
    one = candidate(OURS, warm_up=3)
    timed = []
    monkeypatch.setattr(one, "_time", lambda steps: timed.append(steps) or 0.04)
    one.prepare(case(1.0))
    assert timed == [3, 1]
    assert one.steps == 2  # 0.1 seconds
    assert one.measure() == 2 * 16 * 2 / 0.04
    assert timed[2:] == [3, 2]


class Meter:
    """Reads 100 MB before and 130 MB at the peak; notes when memory is given back."""

    peak = 130.0

    def __init__(self):
        self.noted = []

    def restart(self):
        self.noted.append("restart")

    def release(self):
        self.noted.append("give back")

    def peak_mb(self):
        return self.peak


def test_the_memory_of_a_step_is_its_peak_above_the_loaded_model_and_is_given_back(monkeypatch):
    one = candidate(OURS)
    one.memory, one.loaded_mb = Meter(), 100.0
    monkeypatch.setattr(one, "_time", lambda steps: one.memory.noted.append("step") or 1.0)
    assert one.prepare(case(1.0)) == 30.0
    assert one.memory.noted == ["restart", "step", "step", "give back"]
    one.measure()
    assert one.memory.noted[4:] == ["step", "step", "give back"]
    one.memory.peak = 90.0
    assert one.prepare(case(1.0)) == 0.0


def test_a_slow_step_is_a_sample_of_its_own(monkeypatch):
    one = candidate(OURS)
    monkeypatch.setattr(one, "_time", lambda steps: 7.0)
    one.prepare(case(1.0))
    assert one.steps == 1


def test_a_bfloat16_base_keeps_adapters_in_float32_but_in_shadow_peft():
    for name, dtype in ((OURS, torch.float32), ("lora", torch.float32), ("shadow-peft", torch.bfloat16)):
        one = candidate(name, dtype="bfloat16")
        one.prepare(case(0.5))
        assert {p.dtype for p in one.model.parameters() if p.requires_grad} == {dtype}
        assert torch.bfloat16 in {p.dtype for p in one.model.parameters() if not p.requires_grad}


def test_the_plan_gives_every_candidate_the_same_budget():
    planned = plan_train(TrainSettings(**SMALL, labelled=(1.0, 0.25)))
    settings = TrainSettings(**SMALL)
    counts = {
        name: TrainCandidate(settings, name, **arguments).trainable_parameters
        for name, arguments in planned.candidates.items()
    }
    assert list(counts) == [OURS, *BASELINES]
    assert counts.pop("base") == 0
    assert all(is_equal(counts[OURS], count) for count in counts.values())
    assert planned.cases == (Case("labelled=1", case(1.0)), Case("labelled=0.25", case(0.25)))


def test_the_budget_can_be_chosen():
    planned = plan_train(TrainSettings(**SMALL, baselines=("lora",), parameters=40_000))
    one = TrainCandidate(TrainSettings(**SMALL), OURS, **planned.candidates[OURS])
    assert is_equal(40_000, one.trainable_parameters)
    assert one.size == f"intermediate_size {planned.candidates[OURS]['size']}"


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"parameters": 10}, ConfigError, "10 trainable parameters: the nearest it comes is 2[0-9],[0-9]{3}"),
        ({"length": 4096}, ConfigError, "length 4096 exceeds the 2048 positions of tiny"),
        ({"baselines": ("lroa",)}, ConfigError, "did you mean lora"),
        ({"model": "./nowhere"}, CheckpointError, "./nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(settings, kind, said):
    with pytest.raises(kind, match=said) as refused:
        plan_train(TrainSettings(**{**SMALL, **settings}))
    assert isinstance(refused.value, ShadowtuneError)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("labelled", [(0.0,), (1.5,), (), (float("nan"),)])
def test_shares_of_labels_are_above_0_and_up_to_1(labelled):
    with pytest.raises(ConfigError, match="labelled must be"):
        TrainSettings(labelled=labelled)


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError, match=r"repeats .*batch .*length .*parameters"):
        TrainSettings(repeats=0, batch=0, length=1, parameters=0)
