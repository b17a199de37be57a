import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core import reference
from shadowtune.core.boundary import Boundaries

WIDTH, COUNT = 12, 4

VARIANTS: dict[str, dict] = {
    "paper": {},
    "no_update": {"update": False},
    "full_sharing": {"depth_sharing": "full"},
    "full_sharing_no_update": {"depth_sharing": "full", "update": False},
    "no_norm": {"update_norm": False},
    "bias": {"update_bias": True},
    "gelu": {"activation": "gelu"},
    "inject_first": {"inject_first": True},
    "channel_scaling": {"channel_scaling": True},
    "channel_scaling_full_sharing": {"channel_scaling": True, "depth_sharing": "full"},
    "stateless": {"variant": "stateless"},
    "stateless_first": {"variant": "stateless", "inject_first": True},
    "stateless_full_sharing": {"variant": "stateless", "depth_sharing": "full", "channel_scaling": True},
    "peft": {
        "update_norm": False,
        "update_bias": True,
        "activation": "gelu",
        "inject_first": True,
        "dropout_position": "hidden",
        "transform_dropout": False,
    },
}


def perturbed_boundaries(count: int = COUNT, **settings) -> Boundaries:
    torch.manual_seed(0)
    boundaries = Boundaries(count, WIDTH, ShadowConfig(**{"rank": 3, "update_width": 2, "alpha": 0.7, **settings}))
    with torch.no_grad():
        for parameter in boundaries.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        for scales in boundaries.buffers():
            scales.copy_(0.2 + 2 * torch.rand_like(scales))
    return boundaries.double().eval()


def inputs(tokens: int, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    h, s = torch.randn(2, 2, tokens, WIDTH, generator=generator, dtype=torch.float64)
    if layout == "strided":
        h, s = torch.stack([h, h], -1)[..., 0], s.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        h, s = h[:1].expand(2, -1, -1), s[:, :1].expand(-1, tokens, -1)
    elif layout == "flat":
        h, s = h.reshape(-1, WIDTH), s.reshape(-1, WIDTH)
    return h, s


def outputs_and_gradients(step: Callable, h: Tensor, s: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of all boundaries in turn, then the gradients of one weighted sum of them."""
    h, s = h.detach().requires_grad_(), s.detach().requires_grad_()
    outputs, total, state = [], torch.zeros((), dtype=torch.float64), s
    for index in range(COUNT):
        hidden, state = step(index, h + index, state)
        outputs += [hidden, state]
        total = total + (hidden * torch.sin(torch.arange(hidden.numel(), dtype=hidden.dtype)).view_as(hidden)).sum()
        total = total + state.pow(2).mean()
    gradients = torch.autograd.grad(total, [h, s, *parameters.values()])
    return [*outputs, *gradients]


@pytest.mark.parametrize(
    ("tokens", "layout"),
    [(1, "contiguous"), (63, "contiguous"), (100, "contiguous"), (63, "strided"), (63, "expanded"), (63, "flat")],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_every_gradient_equal_the_reference_in_float64(variant, tokens, layout):
    boundaries = perturbed_boundaries(**VARIANTS[variant])
    parameters = dict(boundaries.named_parameters())
    h, s = inputs(tokens, layout)
    fast = outputs_and_gradients(boundaries, h, s, parameters)
    known = {**parameters, **dict(boundaries.named_buffers())}
    slow = outputs_and_gradients(
        lambda index, h, s: reference.boundary(index, h, s, known, boundaries.config), h, s, parameters
    )
    for ours, truth in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient(variant):
    boundaries = perturbed_boundaries(**VARIANTS[variant])
    parameters = dict(boundaries.named_parameters())
    gradients = outputs_and_gradients(boundaries, *inputs(5), parameters)[-len(parameters) :]
    assert [name for name, g in zip(parameters, gradients, strict=True) if not g.abs().sum() > 0] == []
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):  # nor is a slot of a stack dead
        assert (gradient.flatten(1).abs().sum(1) > 0).all() if parameter.ndim > 1 else True


@pytest.mark.parametrize("setting", ["update", "update_norm", "activation", "alpha"])
def test_each_setting_changes_the_outputs(setting):
    boundaries = perturbed_boundaries()
    h, s = inputs(5)
    before = boundaries(1, h, s)[0]
    other = {"update": False, "update_norm": False, "activation": "gelu", "alpha": 0.8}[setting]
    changed = perturbed_boundaries(**{setting: other})
    changed.load_state_dict(boundaries.state_dict(), strict=False)
    assert (changed(1, h, s)[0] - before).abs().max() > 1e-4


def test_the_first_boundary_only_injects():
    h, s = inputs(5)
    hidden, state = perturbed_boundaries()(0, h, s)
    assert torch.equal(state, s)
    assert not torch.equal(hidden, h)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize(
    ("hidden", "parameters", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 4e-2),
        (torch.float16, torch.float16, 5e-3),
        (torch.bfloat16, torch.float32, 8e-3),
        (torch.float32, torch.bfloat16, 4e-2),
    ],
    ids=str,
)
def test_lower_precision_stays_near_the_reference(hidden, parameters, tolerance, tokens):
    boundaries = perturbed_boundaries().to(parameters)
    exact = {name: parameter.double() for name, parameter in boundaries.named_parameters()}
    h, s = (x.to(hidden) for x in inputs(tokens))
    wide_h, wide_s = h.double(), s.double()
    for index in range(COUNT):
        h, s = boundaries(index, h, s)
        wide_h, wide_s = reference.boundary(index, wide_h, wide_s, exact, boundaries.config)
        assert h.dtype == hidden
        assert s.dtype == parameters
        torch.testing.assert_close(h.double(), wide_h, rtol=tolerance, atol=tolerance * wide_h.abs().max().item())
        torch.testing.assert_close(s.double(), wide_s, rtol=tolerance, atol=tolerance * wide_s.abs().max().item())


def test_float32_boundaries_beside_a_bfloat16_base_keep_the_state_in_float32():
    boundaries = perturbed_boundaries().float()
    h, s = (x.to(torch.bfloat16) for x in inputs(63))
    exact = {name: parameter.double() for name, parameter in boundaries.named_parameters()}
    state = boundaries(1, h, s)[1]
    torch.testing.assert_close(
        state.double(), reference.boundary(1, h.double(), s.double(), exact, boundaries.config)[1], rtol=1e-5, atol=1e-5
    )


def test_autocast_returns_the_dtype_of_the_base_and_stays_near_the_reference():
    boundaries = perturbed_boundaries().float()
    h, s = (x.float() for x in inputs(63))
    full = boundaries(1, h, s)
    with torch.autocast("cpu", torch.bfloat16):
        half = boundaries(1, h, s)
    assert half[0].dtype == torch.float32
    assert not torch.equal(half[0], full[0])
    for ours, truth in zip(half, full, strict=True):
        torch.testing.assert_close(ours.float(), truth, rtol=4e-2, atol=4e-2)


def undropped(settings: dict) -> tuple[Boundaries, dict[str, Tensor], Tensor, Tensor]:
    boundaries = perturbed_boundaries(dropout=0.5, **settings).train()
    return boundaries, dict(boundaries.named_parameters()), *inputs(63)


@pytest.mark.parametrize("position", ["rank", "hidden"])
def test_injection_dropout_is_a_mask_on_its_bottleneck_or_on_its_input(position):
    boundaries, p, h, s = undropped({"dropout_position": position})
    torch.manual_seed(5)
    hidden = boundaries(0, h, s)[0]
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(2, 63, 3 if position == "rank" else WIDTH, dtype=torch.float64), 0.5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    inner = (
        (h - s) @ p["injection_downs"][0] * mask if position == "rank" else ((h - s) * mask) @ p["injection_downs"][0]
    )
    torch.testing.assert_close(hidden, h + 0.7 * inner @ p["injection_ups"][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropped", [True, False])
def test_transform_dropout_is_a_mask_on_the_hidden_layer_of_the_transform_alone(dropped):
    boundaries, p, h, s = undropped({"transform_dropout": dropped})
    torch.manual_seed(5)
    state = boundaries(1, h, s)[1]
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(2, 63, 2, dtype=torch.float64), 0.5) if dropped else 1.0
    n = reference.norm(h, p["norm_weight"], p["norm_bias"])
    t = (F.silu(n @ p["transform_downs"][0]) * mask) @ p["transform_ups"][0]
    g = torch.sigmoid(F.silu(n @ p["gate_downs"][0]) @ p["gate_ups"][0])
    torch.testing.assert_close(state, (1 - g) * s + g * t, rtol=1e-12, atol=1e-12)


def test_evaluation_drops_nothing():
    boundaries, _, h, s = undropped({})
    boundaries.eval()
    assert torch.equal(boundaries(1, h, s)[0], boundaries(1, h, s)[0])


def test_an_untrained_boundary_leaves_the_hidden_states_alone_bit_for_bit():
    torch.manual_seed(0)
    boundaries = Boundaries(COUNT, WIDTH, ShadowConfig())
    h, s = (x.float() for x in inputs(63))
    for index in range(COUNT):
        hidden, s = boundaries(index, h, s)
        assert torch.equal(hidden, h)


def test_initialization_is_the_papers():
    torch.manual_seed(0)
    settings = ShadowConfig(rank=32, update_width=16, update_bias=True, init_std=0.05)
    boundaries = Boundaries(20, 64, settings)
    assert boundaries.injection_downs.std().item() == pytest.approx(0.05, rel=0.05)
    assert not boundaries.injection_ups.any()
    for name, fan_in in (("downs", 64), ("ups", 16)):
        for part in ("transform", "gate"):
            parameter = dict(boundaries.named_parameters())[f"{part}_{name}"]
            bound = fan_in**-0.5
            assert parameter.abs().max().item() == pytest.approx(bound, rel=0.01)
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (boundaries.norm_weight == 1).all()
    assert not boundaries.norm_bias.any()


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({}, {"injection_downs": (4, 12, 3), "transform_downs": (3, 12, 2), "norm_weight": (12,)}),
        ({"update": False}, {"injection_downs": (4, 12, 3), "injection_ups": (4, 3, 12)}),
        (
            {"depth_sharing": "full"},
            {"injection_downs": (1, 12, 3), "transform_ups": (1, 2, 12), "boundary_scales": (4,)},
        ),
        ({"update_bias": True, "update_norm": False}, {"gate_down_biases": (3, 2), "gate_up_biases": (3, 12)}),
    ],
    ids=["paper", "no_update", "full_sharing", "bias"],
)
def test_parameters_are_stacked_and_none_is_superfluous(settings, shapes):
    boundaries = perturbed_boundaries(**settings)
    found = {name: tuple(parameter.shape) for name, parameter in boundaries.named_parameters()}
    assert {name: found[name] for name in shapes} == shapes
    assert ("transform_downs" in found) == boundaries.config.update
    assert ("norm_weight" in found) == (boundaries.config.update and boundaries.config.update_norm)


def test_a_base_of_two_blocks_has_one_boundary_and_no_update():
    boundaries = perturbed_boundaries(count=1)
    assert set(dict(boundaries.named_parameters())) == {"injection_downs", "injection_ups"}
    h, s = inputs(3)
    assert torch.equal(boundaries(0, h, s)[1], s)


def test_settings_that_the_reference_does_not_know_are_not_forgotten_here():
    tested = {name for settings in VARIANTS.values() for name in settings} | {"rank", "update_width", "alpha"}
    elsewhere = {"dropout", "init_std", "backbone", "num_shadow_layers", "init_layers", "init_from", "draft_rank"}
    elsewhere |= {"injection_start"}  # tests/attach/test_stack.py
    elsewhere |= {"injection_after", "draft_layers", "draft_steps"}  # tests/model
    elsewhere |= {"shadow_loss_weight", "shadow_loss_weight_end", "matching_weight", "backbone_loss"}
    elsewhere |= {"distillation_weight", "distillation_temperature", "distillation_top_k", "logit_interpolation"}
    sizes = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
    assert {field.name for field in dataclasses.fields(ShadowConfig)} == tested | elsewhere | sizes


@pytest.mark.parametrize("name", ["paper", "stateless", "peft"])
def test_the_dropout_module_holds_the_probability(name):
    """Trainers switch dropout off by setting ``p`` of every ``nn.Dropout`` to 0."""
    boundaries = perturbed_boundaries(**{**VARIANTS[name], "dropout": 0.5}).train()
    h, s = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    assert "dropout.p" not in boundaries.state_dict()
    dropped = boundaries(1, h, s)[0]
    expected = boundaries.eval()(1, h, s)[0]
    assert not torch.allclose(dropped, expected)
    for module in boundaries.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    torch.testing.assert_close(boundaries.train()(1, h, s)[0], expected)


@pytest.mark.parametrize("name", ["paper", "bias", "stateless", "full_sharing"])
def test_parameters_and_state_follow_the_hidden_state_to_its_device(name):
    """The blocks of a base may be on several devices; "meta" stands for another one."""
    boundaries = perturbed_boundaries(**VARIANTS[name])
    h, s = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    expected = boundaries(1, h, s)
    found = boundaries(1, h.to("meta"), s)
    assert [each.device.type for each in found] == ["meta", "meta"]
    assert [each.shape for each in found] == [each.shape for each in expected]
