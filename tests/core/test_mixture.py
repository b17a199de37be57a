"""Rows of several shadows in one crossing get what each would get from its own boundaries."""

import pytest
import torch
from torch import nn

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries
from shadowtune.core.mixture import Mixture, mixing_key
from shadowtune.core.state import ShadowState

COUNT, WIDTH, TOKENS = 5, 12, 3
VARIANTS = {
    "paper": {},
    "biases": {"update_bias": True},
    "shared depth": {"depth_sharing": "full"},
    "no update": {"update": False},
}


def boundaries(seed, count=COUNT, dtype=torch.float64, **settings):
    settings = {"rank": 2 + seed, "update_width": 1 + seed, "alpha": 0.3 + 0.2 * seed, **settings}
    made = Boundaries(count, WIDTH, ShadowConfig(**settings)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    made.kernel = "reference"
    return made


@torch.no_grad()
def alone(member, h, s):
    """What one row comes to after all boundaries, by its own shadow; the last state."""
    for index in range(COUNT):
        h, s = member(index, h, s)
    return h, s


@torch.no_grad()
def together(members, owners, h, s):
    mixed = Mixture(members).of_rows(owners, h.shape[1])
    for parameters in mixed.split():
        h, s = mixed.cross(parameters, h, s)
    return h, s


def rows(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(9)
    return (torch.randn(count, TOKENS, WIDTH, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize(
    "common", [{}, {"update_norm": False}, {"activation": "gelu"}, {"inject_first": True}], ids=str
)
def test_rows_of_different_shadows_cross_as_each_alone(common):
    members = [boundaries(seed, **settings, **common) for seed, settings in enumerate(VARIANTS.values())]
    owners = [2, 0, None, 3, 1, 0]
    h, s = rows(len(owners))
    crossed, states = together(members, owners, h, s)
    for row, owner in enumerate(owners):
        if owner is None:
            assert torch.equal(crossed[row], h[row])
            continue
        expected = alone(members[owner], h[row : row + 1], s[row : row + 1])
        torch.testing.assert_close(crossed[row : row + 1], expected[0])
        torch.testing.assert_close(states[row : row + 1], expected[1])
        assert (crossed[row] - h[row]).abs().max() > 0.1, "the shadow must do something"


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_one_shadow_beside_rows_of_none(settings):
    member = boundaries(1, **settings)
    h, s = rows(2)
    crossed, _ = together([member], [None, 0], h, s)
    assert torch.equal(crossed[0], h[0])
    torch.testing.assert_close(crossed[1:], alone(member, h[1:], s[1:])[0])


@torch.no_grad()
def test_hidden_states_keep_their_precision_and_states_take_that_of_the_boundaries():
    members = [boundaries(0, dtype=torch.float32), boundaries(1, dtype=torch.float32)]
    h, s = rows(2, torch.bfloat16)
    mixed = Mixture(members).of_rows([1, 0], TOKENS)
    crossed, states = mixed.cross(mixed.split()[1], h, s)
    assert (crossed.dtype, states.dtype) == (torch.bfloat16, torch.float32)
    for row, member in enumerate((members[1], members[0])):
        member.kernel = "auto"  # which rounds once, at the end
        expected = member(1, h[row], s[row])
        torch.testing.assert_close(crossed[row], expected[0])
        torch.testing.assert_close(states[row], expected[1])


@torch.no_grad()
def test_the_state_of_a_call_goes_through_mixed_boundaries_as_through_one_shadows():
    members = [boundaries(0), boundaries(1)]
    h, s = rows(2)
    state = ShadowState(Mixture(members).of_rows([1, 0], TOKENS), s)
    single = ShadowState(members[1], s[:1])
    one = h[:1]
    for depth in range(COUNT + 1):
        h, one = state.enter(depth, h), single.enter(depth, one)
    torch.testing.assert_close(state.arrive(COUNT + 1, h)[:1], single.arrive(COUNT + 1, one))


@torch.no_grad()
def test_each_token_gets_as_much_of_s0_as_its_own_shadow_mixes_in():
    members = [boundaries(0), boundaries(1, head_mixing=0.3), boundaries(2, head_mixing=0.6)]
    h, s = rows(4)
    mixed = Mixture(members).of_rows([2, None, 0, 1], TOKENS).mix(h, s)
    assert torch.equal(mixed[1:3], h[1:3])
    for row, member in ((0, members[2]), (3, members[1])):
        torch.testing.assert_close(mixed[row], h[row] + member.config.head_mixing * s[row])
        assert (mixed[row] - h[row]).abs().max() > 0.1


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
def test_what_shadows_must_share_to_be_crossed_together(settings, same):
    assert (mixing_key(boundaries(0)) == mixing_key(boundaries(1, **settings))) == same
