import pytest
import torch

from benchmarks.operations import LOSSES, HeadCandidate, HeadSettings, plan_head
from shadowtune.errors import ConfigError

SMALL = {"rows": (5,), "width": 6, "vocabulary": 40, "baselines": ("all-logits",)}


@pytest.mark.parametrize("distilled", [False, True])
def test_ours_and_all_logits_compute_the_same_loss(distilled):
    values = []
    for name in ("shadow", "all-logits"):
        torch.manual_seed(0)
        one = HeadCandidate(HeadSettings(**SMALL), name)
        one.prepare({"rows": 5, "distilled": distilled})
        assert one.measure() > 0
        values.append(one.loss(one.head.weight, *one.hidden, one.targets, one.distilled))
    torch.testing.assert_close(*values)


def test_distillation_adds_to_the_loss():
    one = HeadCandidate(HeadSettings(**SMALL), "shadow")
    one.prepare({"rows": 5, "distilled": True})
    losses = [one.loss(one.head.weight, *one.hidden, one.targets, distilled) for distilled in (False, True)]
    assert losses[1] > losses[0]


def test_a_case_for_each_kind_and_number_of_rows():
    names = [case.name for case in plan_head(HeadSettings(**{**SMALL, "rows": (5, 9)})).cases]
    assert names == ["joint rows=5", "joint rows=9", "distilled rows=5", "distilled rows=9"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baselines": ("al-logits",)}, "did you mean all-logits"),
        ({"baselines": ()}, "no baseline"),
        ({"baselines": ("liger",)}, "liger runs on CUDA devices only"),
        ({"rows": (0,)}, "rows must be"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        plan_head(HeadSettings(**{**SMALL, **change}))


def test_every_baseline_has_a_loss():
    assert set(LOSSES) == {"all-logits", "liger"}
