import pytest
import torch

from benchmarks import operations
from benchmarks.benchmark import Case
from benchmarks.operations import BoundarySettings, least_bytes, open_boundary, plan_boundary
from shadowtune.errors import ConfigError

SMALL = {"tokens": (5,), "width": 16, "rank": 3, "update_width": 2}
FORWARD = {"direction": "forward", "tokens": 5}
BACKWARD = {"direction": "forward+backward", "tokens": 5}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)
    monkeypatch.setattr(operations, "COPY_BYTES", 2**16)


def crossing(name, values, **settings):
    one = open_boundary(BoundarySettings(**{**SMALL, **settings}), name)
    one.prepare(values)
    return one


def test_ours_and_the_reference_cross_the_same_boundary_with_the_same_numbers():
    crossed = {}
    for name in ("shadow", "reference"):
        one = crossing(name, BACKWARD, dropout=0.0)
        outputs = one.boundaries(1, *one.inputs)
        wanted = (*one.inputs, *one.boundaries.parameters())
        crossed[name] = (*outputs, *torch.autograd.grad(outputs, wanted, one.gradients))
    for ours, reference in zip(crossed["shadow"], crossed["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_only_ours_takes_the_fast_operation(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("fast")

    monkeypatch.setattr("shadowtune.core.boundary.fused_boundary", refuse)
    monkeypatch.setattr("shadowtune.core.boundary.FEW_TOKENS", 1)
    crossing("reference", BACKWARD)
    with pytest.raises(RuntimeError, match="fast"):
        crossing("shadow", BACKWARD)


def test_the_boundary_refines_the_state_and_injects():
    one = crossing("shadow", FORWARD)
    h, s = one.boundaries(1, *one.inputs)
    assert (h - one.inputs[0]).abs().min() > 0
    assert (s - one.inputs[1]).abs().min() > 0


def test_forward_is_inference_and_backward_is_training(monkeypatch):
    seen = []
    wanted = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: seen.append(a[1]) or wanted(*a, **k))
    one = crossing("shadow", FORWARD)
    assert not seen
    assert not one.boundaries.training
    assert one.measure() > 0
    one.prepare(BACKWARD)
    assert one.boundaries.training
    assert len(seen[0]) == 2 + len(list(one.boundaries.parameters()))
    one.prepare(FORWARD)
    assert (one.boundaries.training, one.gradients) == (False, None)


def test_base_and_adapter_have_their_own_precision():
    one = crossing("shadow", BACKWARD, dtype="bfloat16")
    assert [tensor.dtype for tensor in one.inputs] == [torch.bfloat16, torch.float32]
    assert {parameter.dtype for parameter in one.boundaries.parameters()} == {torch.float32}
    assert [tensor.dtype for tensor in one.boundaries(1, *one.inputs)] == [torch.bfloat16, torch.float32]
    assert [tensor.dtype for tensor in one.gradients] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("dtypes", "forward"), [(("float32", "float32"), 1280), (("bfloat16", "float32"), 960), (("bfloat16",) * 2, 640)]
)
def test_the_least_traffic_is_four_passes_forward_and_six_back(dtypes, forward):
    settings = BoundarySettings(**SMALL, dtype=dtypes[0], adapter_dtype=dtypes[1])
    assert least_bytes(settings, "forward", 5) == forward  # h, s, h', s' of 5 x 16 numbers
    assert least_bytes(settings, "forward+backward", 5) == forward + forward * 6 // 4


def test_a_copy_counts_the_crossings_that_its_speed_would_allow(monkeypatch):
    one = open_boundary(BoundarySettings(**SMALL), "copy")
    assert one.prepare(FORWARD) == 0.0
    monkeypatch.setattr(one, "_time", lambda steps: 0.5 * steps)
    assert one.measure() == 2 * 2**16 / 0.5 / 1280  # each byte is read and written
    one._step()
    assert torch.equal(one.source, one.target)


def test_every_number_of_tokens_is_crossed_forward_and_back():
    planned = plan_boundary(BoundarySettings(**{**SMALL, "tokens": (5, 7)}))
    assert planned.candidates == {"shadow": {}, "reference": {}, "copy": {}}
    assert planned.cases[:2] == (Case("forward tokens=5", FORWARD), Case("forward tokens=7", {**FORWARD, "tokens": 7}))
    assert [case.name for case in planned.cases[2:]] == ["forward+backward tokens=5", "forward+backward tokens=7"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baselines": ("refrence",)}, "did you mean reference"),
        ({"baselines": ()}, "no baseline"),
        ({"tokens": ()}, "tokens must be"),
        ({"tokens": (0,)}, "tokens must be"),
        ({"width": 0, "dropout": 1.0}, r"width .*dropout"),
        ({"adapter_dtype": "float8"}, "adapter_dtype must be one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said) as refused:
        plan_boundary(BoundarySettings(**{**SMALL, **settings}))
    assert "\n" not in str(refused.value)
