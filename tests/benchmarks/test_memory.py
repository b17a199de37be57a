import pytest
import torch

from benchmarks.training import MemoryCandidate, MemorySettings, plan_memory
from shadowtune.errors import ConfigError

SMALL = {"model": "tiny", "batch": 2, "lengths": (8, 16), "baselines": ("base",)}


def candidate(name="shadow", size=16):
    return MemoryCandidate(MemorySettings(**SMALL), name, size=size)


def values(phase, length):
    return {"phase": phase, "rows": 2, "length": length, "labelled": 1.0}


def test_training_steps_train_and_prompts_do_not():
    one = candidate()
    one.prepare(values("train", 8))
    before = [p.detach().clone() for p in one.model.parameters()]
    assert one.measure() > 0
    assert one.model.training
    assert any(not torch.equal(old, new) for old, new in zip(before, one.model.parameters(), strict=True))
    before = [p.detach().clone() for p in one.model.parameters()]
    one.prepare(values("prompt", 16))
    one.measure()
    assert not one.model.training
    assert all(torch.equal(old, new) for old, new in zip(before, one.model.parameters(), strict=True))
    assert one.batch["input_ids"].shape == (2, 16)


def test_the_base_never_trains():
    one = candidate("base", None)
    one.prepare(values("train", 8))
    assert not one.model.training


class Meter:
    def restart(self):
        pass

    def release(self):
        pass

    def peak_mb(self):
        return 130.0


def test_a_sample_is_the_peak_above_the_loaded_model():
    one = candidate()
    one.make_batch(2, 8, 1.0)
    one.memory, one.loaded_mb = Meter(), 100.0
    assert one.measure() == 30.0
    one.loaded_mb = 140.0
    assert 0 < one.measure() < 0.01


def test_a_case_for_each_phase_and_length():
    cases = plan_memory(MemorySettings(**SMALL)).cases
    assert [(case.values["phase"], case.values["length"]) for case in cases] == [
        ("train", 8),
        ("train", 16),
        ("prompt", 8),
        ("prompt", 16),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"phases": ("trian",)}, "phases must be some of train, prompt, got trian"),
        ({"phases": ()}, "got none"),
        ({"lengths": (1,)}, "lengths must be"),
        ({"labelled": 0.0}, "labelled must be"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        MemorySettings(**{**SMALL, **change})


def test_rows_longer_than_the_base_reads_are_refused():
    with pytest.raises(ConfigError, match="length 4096 exceeds"):
        plan_memory(MemorySettings(**{**SMALL, "lengths": (8, 4096)}))
