import torch

from benchmarks.benchmark import Settings
from benchmarks.measurement import ModelCandidate
from benchmarks.methods import METHODS


def loaded(name, size, **settings):
    candidate = ModelCandidate(Settings(**settings))
    candidate.load("tiny", METHODS[name], size)
    return candidate


def test_it_knows_what_it_loaded():
    one = loaded("lora", 3)
    assert one.size == "rank 3"
    assert one.trainable_parameters == sum(p.numel() for p in one.model.parameters() if p.requires_grad) > 0
    assert one.vocabulary == 512


def test_every_candidate_starts_from_the_same_random_base():
    bases = [loaded(name, size).model for name, size in (("base", None), ("base", None))]
    assert torch.equal(bases[0].lm_head.weight, bases[1].lm_head.weight)
    adapted = loaded("shadow", 16).model.base
    assert torch.equal(adapted.lm_head.weight, bases[0].lm_head.weight)


def test_the_base_has_the_precision_that_was_asked_for():
    assert loaded("base", None, dtype="bfloat16").model.lm_head.weight.dtype == torch.bfloat16
