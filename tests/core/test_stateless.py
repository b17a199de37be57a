import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core import reference
from shadowtune.core.boundary import Boundaries

WIDTH, COUNT = 12, 4


def perturbed(dtype: torch.dtype = torch.float64, **settings) -> Boundaries:
    torch.manual_seed(0)
    config = ShadowConfig(**{"variant": "stateless", "rank": 3, "alpha": 0.02, "dropout": 0.0, **settings})
    boundaries = Boundaries(COUNT, WIDTH, config)
    with torch.no_grad():
        for parameter in boundaries.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        for measured in boundaries.buffers():
            measured.copy_(0.2 + 2 * torch.rand_like(measured))
    return boundaries.to(dtype).eval()


def hidden(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    h = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    h[0] *= 100  # first tokens of a text are larger than all others
    return h.to(dtype)


def outputs_and_gradients(boundaries: Boundaries, h: Tensor) -> list[Tensor]:
    h = h.clone().requires_grad_()
    weights = torch.sin(torch.arange(h.numel(), dtype=h.dtype)).view_as(h)
    output = h
    for index in range(COUNT):
        output = boundaries(index, output, None)[0]
    parameters = [boundaries.injection_downs, boundaries.injection_ups]
    return [output, *torch.autograd.grad((output * weights).sum(), [h, *parameters])]


@pytest.mark.parametrize("tokens", [1, 63, 100])
@pytest.mark.parametrize("kernel", ["auto", "fused", "reference", "triton"])
def test_every_kernel_equals_the_reference_outputs_and_gradients(kernel, tokens):
    boundaries = perturbed()
    known = {**dict(boundaries.named_parameters()), **dict(boundaries.named_buffers())}
    h = hidden(tokens).requires_grad_()
    output = h
    for index in range(COUNT):
        output = reference.stateless(index, output, known, boundaries.config)
    weights = torch.sin(torch.arange(h.numel(), dtype=h.dtype)).view_as(h)
    parameters = [boundaries.injection_downs, boundaries.injection_ups]
    truth = [output, *torch.autograd.grad((output * weights).sum(), [h, *parameters])]
    boundaries.kernel = kernel
    for ours, theirs in zip(outputs_and_gradients(boundaries, hidden(tokens)), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_without_gradients_the_result_is_the_same():
    boundaries, h = perturbed(), hidden(70)
    with torch.no_grad():
        assert not torch.equal(boundaries(1, h, None)[0], h)
        torch.testing.assert_close(boundaries(1, h, None)[0], boundaries(1, h.clone().requires_grad_(), None)[0])


def test_by_hand():
    config = ShadowConfig(variant="stateless", rank=1, alpha=0.5)
    p = {
        "channel_scales": torch.tensor([[2.0, 1.0]], dtype=torch.float64),
        "input_sizes": torch.tensor([3.0], dtype=torch.float64),
        "injection_downs": torch.tensor([[[1.0], [1.0]]], dtype=torch.float64),
        "injection_ups": torch.tensor([[[1.0, 0.0]]], dtype=torch.float64),
    }
    h = torch.tensor([[1.5, 4.0]], dtype=torch.float64)  # times the scales: (3, 4), whose mean square is 12.5
    f = 0.5 * 16 * 30 * 288
    corrected = reference.stateless(0, h, p, config)
    torch.testing.assert_close(corrected, h + torch.tensor([[f * 3 * 7 / 12.5**0.5, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("kernel", ["fused", "reference"])
def test_dropout_is_a_mask_on_the_bottleneck(kernel):
    boundaries = perturbed(dropout=0.5).train()
    boundaries.kernel = kernel
    h, p = hidden(70), dict(boundaries.named_parameters())
    torch.manual_seed(5)
    dropped = boundaries(0, h, None)[0]
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(70, 3, dtype=torch.float64), 0.5)
    scaled = h * boundaries.channel_scales[0]
    x = scaled / (scaled.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    f = 0.02 * (16 / 3) * (30 / COUNT) * (576 / WIDTH) * boundaries.input_sizes[0]
    expected = h + f * (mask * (x @ p["injection_downs"][0])) @ p["injection_ups"][0]
    torch.testing.assert_close(dropped, expected, rtol=1e-8, atol=1e-8)
    torch.manual_seed(5)
    with_gradient = outputs_and_gradients(boundaries, h)
    boundaries.kernel = "fused" if kernel == "reference" else "reference"
    torch.manual_seed(5)
    for one, other in zip(with_gradient, outputs_and_gradients(boundaries, h), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_dropout_before_w_down_takes_the_steps():
    boundaries = perturbed(dropout=0.5, dropout_position="hidden").train()
    h = hidden(70)
    torch.manual_seed(5)
    dropped = boundaries(0, h, None)[0]
    assert (dropped != boundaries.eval()(0, h, None)[0]).any()
    assert torch.isfinite(outputs_and_gradients(boundaries.train(), h)[0]).all()


def test_the_size_of_a_token_does_not_change_its_correction():
    boundaries, h = perturbed(), hidden(5)
    one = boundaries(0, h, None)[0] - h
    many = boundaries(0, 1000 * h, None)[0] - 1000 * h
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("of_base", "of_parameters", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 4e-2),
        (torch.float16, torch.float16, 5e-3),
        (torch.bfloat16, torch.float32, 8e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 100])
def test_lower_precision_stays_near_the_reference_whatever_the_size_of_the_first_token(
    of_base, of_parameters, tolerance, tokens
):
    boundaries = perturbed(of_parameters)
    known = {**dict(boundaries.named_parameters()), **dict(boundaries.named_buffers())}
    exact = {name: tensor.detach().double() for name, tensor in known.items()}
    h = (10 * hidden(tokens)).to(of_base)  # squares of the first token overflow half precision
    given = h.requires_grad_() if tokens > 1 else h
    truth = reference.stateless(2, h.detach().double(), exact, boundaries.config)
    ours = boundaries(2, given, None)[0]
    assert ours.dtype == of_base
    torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance * float(truth[-1].abs().max()))


def test_autocast_returns_the_dtype_of_the_base():
    boundaries = perturbed(torch.float32)
    h = hidden(70, torch.float32)
    full = boundaries(1, h, None)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = boundaries(1, h, None)[0]
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=2e-2, atol=2e-2 * float((full - h).detach().abs().max()))


def test_compiled_equals_eager():
    boundaries = perturbed()
    h = hidden(70)
    compiled = torch.compile(lambda h: boundaries(1, h, None)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), boundaries(1, h, None)[0])


def test_it_has_no_parameters_but_those_of_the_injection():
    boundaries = perturbed()
    assert {name: tuple(p.shape) for name, p in boundaries.named_parameters()} == {
        "injection_downs": (COUNT, WIDTH, 3),
        "injection_ups": (COUNT, 3, WIDTH),
    }
    assert {name: tuple(b.shape) for name, b in boundaries.named_buffers()} == {
        "channel_scales": (COUNT, WIDTH),
        "input_sizes": (COUNT,),
    }


def share_moved(rank: int, width: int, count: int, steps: int, learning_rate: float = 1e-3) -> float:
    """Move the parameters by Adam towards a fixed change of what all boundaries add; return its size at the end.

    The blocks between the boundaries are left out: what is added to the stream is a sum over the boundaries.
    """
    torch.manual_seed(0)
    config = ShadowConfig(variant="stateless", rank=rank, alpha=0.5, dropout=0.0)
    boundaries = Boundaries(count, width, config).train()
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(8, width, generator=generator)
    h = torch.randn(128, 8, generator=generator) @ directions / 8**0.5  # texts have few directions in common
    wanted = torch.randn(width, generator=generator).expand(128, -1)
    optimizer = torch.optim.Adam(boundaries.parameters(), lr=learning_rate)
    for _ in range(steps):
        loss = -sum(((boundaries(index, h, None)[0] - h) * wanted).mean() for index in range(count))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(sum(boundaries(index, h, None)[0] - h for index in range(count)).pow(2).mean().sqrt())


SIZES = [(16, 64, 4), (8, 64, 4), (256, 64, 4), (16, 512, 4), (16, 64, 48), (128, 512, 12)]


@pytest.mark.parametrize("steps", [1, 10])
def test_a_step_moves_the_stream_by_the_same_share_for_every_rank_width_and_depth(steps):
    """The coordinate check of muP: what one learning rate does is flat over sizes, so its best value is as well."""
    moved = {sizes: share_moved(*sizes, steps) for sizes in SIZES}
    start = moved[SIZES[0]]
    assert start > 1e-3
    assert {sizes: round(share / start, 2) for sizes, share in moved.items() if not 0.5 < share / start < 2} == {}
