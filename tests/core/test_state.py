import pytest
import torch

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries
from shadowtune.core.state import ShadowState
from shadowtune.errors import AttachError

BLOCKS = 4


class Recorder(Boundaries):
    """Boundaries that note which of them is crossed, and mark what passes."""

    def __init__(self, inject_first: bool) -> None:
        super().__init__(BLOCKS if inject_first else BLOCKS - 1, 2, ShadowConfig(rank=1, inject_first=inject_first))
        self.crossed: list[int] = []

    def split(self):
        return list(range(self.count))

    def cross(self, parameters, hidden_states, shadow_states):
        self.crossed.append(parameters)
        return hidden_states + 1, shadow_states + 10

    def mix(self, hidden_states, initial_states):
        return hidden_states + 100 + initial_states


def state(inject_first: bool = False) -> ShadowState:
    return ShadowState(Recorder(inject_first), torch.zeros(1, 1, 2))


def test_boundary_l_stands_before_block_l_plus_one():
    travelling = state()
    entered = [travelling.enter(depth, torch.zeros(1, 1, 2)).mean().item() for depth in range(BLOCKS)]
    assert entered == [0, 1, 1, 1]
    assert travelling.boundaries.crossed == [0, 1, 2]
    assert travelling.value.mean() == 30
    assert travelling.initial.mean() == 0
    assert travelling.arrive(BLOCKS, torch.ones(1, 1, 2)).mean() == 101, "what is mixed in is s0, not the last state"


def test_inject_first_puts_a_boundary_before_the_first_block_too():
    travelling = state(inject_first=True)
    entered = [travelling.enter(depth, torch.zeros(1, 1, 2)).mean().item() for depth in range(BLOCKS)]
    assert entered == [1, 1, 1, 1]
    assert travelling.boundaries.crossed == [0, 1, 2, 3]


def test_two_hooks_on_one_block_cross_its_boundary_once():
    travelling = state(inject_first=True)
    for depth in range(BLOCKS):
        hidden = travelling.enter(depth, torch.zeros(1, 1, 2))
        assert torch.equal(travelling.enter(depth, hidden), hidden)
    assert travelling.boundaries.crossed == [0, 1, 2, 3]


@pytest.mark.parametrize("order", [[0, 2], [1], [0, 1, 2, 1], [0, 1, 0]])
def test_blocks_out_of_order_or_run_again_are_an_error(order):
    travelling = state()
    for depth in order[:-1]:
        travelling.enter(depth, torch.zeros(1, 1, 2))
    with pytest.raises(AttachError, match=f"block {order[-1]} ran after block {order[-2] if len(order) > 1 else -1}"):
        travelling.enter(order[-1], torch.zeros(1, 1, 2))


@pytest.mark.parametrize("reached", [0, 1, 3])
def test_a_state_that_did_not_reach_the_last_block_is_an_error(reached):
    travelling = state()
    for depth in range(reached):
        travelling.enter(depth, torch.zeros(1, 1, 2))
    with pytest.raises(AttachError, match=f"reached {reached} of 4 blocks"):
        travelling.arrive(BLOCKS, torch.zeros(1, 1, 2))
