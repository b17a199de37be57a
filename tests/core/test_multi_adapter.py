"""Sequences of several adapters in one batch get what each would get from its own boundaries."""

import pytest
import torch
from torch import nn

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries, ShadowState
from shadowtune.core.multi_adapter import AdapterStack, batching_key

COUNT, WIDTH, TOKENS = 5, 12, 3
VARIANTS = {
    "paper": {},
    "biases": {"update_bias": True},
    "shared depth": {"depth_sharing": "full"},
    "no update": {"update": False},
}


def boundaries(seed, count=COUNT, dtype=torch.float64, **settings):
    settings = {"rank": 2 + seed, "update_width": 1 + seed, "alpha": 0.3 + 0.2 * seed, **settings}
    config = ShadowConfig(**settings)
    made = Boundaries(count, WIDTH, config, config.first_boundary(count)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    made.kernel = "reference"
    return made


@torch.no_grad()
def alone(member, h, s):
    """Hidden states and state of one sequence after all boundaries of its own adapter."""
    for index in range(COUNT):
        h, s = member(index, h, s)
    return h, s


@torch.no_grad()
def together(members, owners, h, s):
    batched = AdapterStack(members).for_sequences(owners, h.shape[1])
    for parameters in batched.unstack():
        h, s = batched.apply_boundary(parameters, h, s)
    return h, s


def sequences(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(9)
    return (torch.randn(count, TOKENS, WIDTH, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize(
    "common", [{}, {"update_norm": False}, {"activation": "gelu"}, {"inject_first": True}], ids=str
)
def test_sequences_of_different_adapters_get_what_each_gets_alone(common):
    members = [boundaries(seed, **settings, **common) for seed, settings in enumerate(VARIANTS.values())]
    owners = [2, 0, None, 3, 1, 0]
    h, s = sequences(len(owners))
    corrected, states = together(members, owners, h, s)
    for row, owner in enumerate(owners):
        if owner is None:
            assert torch.equal(corrected[row], h[row])
            continue
        expected = alone(members[owner], h[row : row + 1], s[row : row + 1])
        torch.testing.assert_close(corrected[row : row + 1], expected[0])
        torch.testing.assert_close(states[row : row + 1], expected[1])
        assert (corrected[row] - h[row]).abs().max() > 0.1, "the adapter must do something"


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_one_adapter_beside_sequences_without_one(settings):
    member = boundaries(1, **settings)
    h, s = sequences(2)
    corrected, _ = together([member], [None, 0], h, s)
    assert torch.equal(corrected[0], h[0])
    torch.testing.assert_close(corrected[1:], alone(member, h[1:], s[1:])[0])


@torch.no_grad()
def test_hidden_states_keep_their_precision_and_states_take_that_of_the_boundaries():
    members = [boundaries(0, dtype=torch.float32), boundaries(1, dtype=torch.float32)]
    h, s = sequences(2, torch.bfloat16)
    batched = AdapterStack(members).for_sequences([1, 0], TOKENS)
    corrected, states = batched.apply_boundary(batched.unstack()[1], h, s)
    assert (corrected.dtype, states.dtype) == (torch.bfloat16, torch.float32)
    for row, member in enumerate((members[1], members[0])):
        member.kernel = "auto"  # which rounds once, at the end
        expected = member(1, h[row], s[row])
        torch.testing.assert_close(corrected[row], expected[0])
        torch.testing.assert_close(states[row], expected[1])


@torch.no_grad()
def test_a_state_goes_through_batched_boundaries_as_through_one_adapters():
    members = [boundaries(0), boundaries(1)]
    h, s = sequences(2)
    state = ShadowState(AdapterStack(members).for_sequences([1, 0], TOKENS), s)
    single = ShadowState(members[1], s[:1])
    one = h[:1]
    for depth in range(COUNT + 1):
        h, one = state.before_block(depth, h), single.before_block(depth, one)
    torch.testing.assert_close(state.finalize(COUNT + 1, h)[:1], single.finalize(COUNT + 1, one))


@torch.no_grad()
def test_each_token_gets_the_gamma_of_its_own_adapter():
    members = [boundaries(0), boundaries(1, logit_interpolation=0.3), boundaries(2, logit_interpolation=0.6)]
    h, s = sequences(4)
    batched = AdapterStack(members).for_sequences([2, None, 0, 1], TOKENS).final_states(h, s)
    assert torch.equal(batched[1:3], h[1:3])
    for row, member in ((0, members[2]), (3, members[1])):
        torch.testing.assert_close(batched[row], h[row] + member.config.logit_interpolation * s[row])
        assert (batched[row] - h[row]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"rank": 9, "update_width": 7, "alpha": 2.0}, True),
        ({"update_bias": True}, True),
        ({"update": False}, True),
        ({"activation": "gelu"}, False),
        ({"inject_first": True}, False),
        ({"update_norm": False}, False),
        ({"dtype": torch.bfloat16}, False),
    ],
    ids=str,
)
def test_what_shadows_must_share_to_be_corrected_together(settings, same):
    assert (batching_key(boundaries(0)) == batching_key(boundaries(1, **settings))) == same
