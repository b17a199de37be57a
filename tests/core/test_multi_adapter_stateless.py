"""Sequences of several stateless adapters in one batch get what each would get from its own boundaries."""

import pytest
import torch
from torch import nn

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries
from shadowtune.core.multi_adapter import AdapterStack, batching_key

COUNT, WIDTH, TOKENS = 5, 12, 3


@torch.no_grad()
def boundaries(seed, dtype=torch.float64, **settings):
    settings = {"variant": "stateless", "rank": 2 + seed, "alpha": 0.001 * (1 + seed), **settings}
    made = Boundaries(COUNT, WIDTH, ShadowConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    for measured in made.buffers():
        measured.copy_(0.3 + torch.rand(measured.shape, generator=generator))
    return made.to(dtype).eval()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@torch.no_grad()
def test_each_sequence_is_corrected_by_its_own_adapter(dtype, tolerance):
    members = [boundaries(0), boundaries(1), boundaries(2, depth_sharing="full")]
    members = [member.to(torch.float32 if dtype == torch.bfloat16 else dtype) for member in members]
    owners = [2, 0, None, 1, 0]
    h = torch.randn(len(owners), TOKENS, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    batched = AdapterStack(members).for_sequences(owners, TOKENS)
    for index, parameters in enumerate(batched.unstack()):
        corrected, state = batched.apply_boundary(parameters, h, None)
        assert (state, corrected.dtype) == (None, dtype)
        for row, owner in enumerate(owners):
            own = h[row] if owner is None else members[owner](index, h[row], None)[0]
            torch.testing.assert_close(corrected[row], own, rtol=tolerance, atol=tolerance)
            assert (owner is None) == torch.equal(own, h[row])


@torch.no_grad()
def test_each_sequence_gets_its_own_gamma():
    members = [boundaries(0, logit_interpolation=0.5), boundaries(1)]
    h, s = torch.randn(2, 3, TOKENS, WIDTH, dtype=torch.float64)
    seen = AdapterStack(members).for_sequences([1, 0, None], TOKENS).final_states(h, s)
    torch.testing.assert_close(seen[1], h[1] + 0.5 * s[1])
    assert torch.equal(seen[::2], h[::2])
    assert torch.equal(AdapterStack(members[1:]).for_sequences([0, 0, None], TOKENS).final_states(h, None), h)


def test_it_does_not_share_a_pass_with_the_papers_variant():
    paper = Boundaries(COUNT, WIDTH, ShadowConfig()).double()
    assert batching_key(boundaries(0)) != batching_key(paper)
    assert batching_key(boundaries(0)) == batching_key(boundaries(3))
