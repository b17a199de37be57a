import pytest
import torch

from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries, ShadowState
from shadowtune.errors import AttachError

BLOCKS = 4


class Recorder(Boundaries):
    """Boundaries that record which of them are applied, and change what passes."""

    def __init__(self, inject_first: bool) -> None:
        config = ShadowConfig(rank=1, inject_first=inject_first)
        first = config.first_boundary(BLOCKS)
        super().__init__(BLOCKS - first, 2, config, first)
        self.applied: list[int] = []

    def unstack(self):
        return list(range(self.count))

    def apply_boundary(self, parameters, hidden_states, shadow_states):
        self.applied.append(parameters)
        return hidden_states + 1, shadow_states + 10

    def final_states(self, hidden_states, initial_states):
        return hidden_states + 100 + initial_states


def state(inject_first: bool = False) -> ShadowState:
    return ShadowState(Recorder(inject_first), torch.zeros(1, 1, 2))


def test_boundary_l_stands_before_block_l_plus_one():
    one = state()
    entered = [one.before_block(depth, torch.zeros(1, 1, 2)).mean().item() for depth in range(BLOCKS)]
    assert entered == [0, 1, 1, 1]
    assert one.boundaries.applied == [0, 1, 2]
    assert one.value.mean() == 30
    assert one.initial.mean() == 0
    assert one.finalize(BLOCKS, torch.ones(1, 1, 2)).mean() == 101, "s0 is added, not the last state"


def test_inject_first_puts_a_boundary_before_the_first_block_too():
    one = state(inject_first=True)
    entered = [one.before_block(depth, torch.zeros(1, 1, 2)).mean().item() for depth in range(BLOCKS)]
    assert entered == [1, 1, 1, 1]
    assert one.boundaries.applied == [0, 1, 2, 3]


def test_blocks_below_the_first_boundary_run_as_in_the_base():
    recorder = Recorder(inject_first=False)
    recorder.first = 2
    one = ShadowState(recorder, torch.zeros(1, 1, 2))
    entered = [one.before_block(depth, torch.zeros(1, 1, 2)).mean().item() for depth in range(BLOCKS)]
    assert entered == [0, 0, 1, 1]
    assert recorder.applied == [0, 1]


def test_two_hooks_on_one_block_apply_its_boundary_once():
    one = state(inject_first=True)
    for depth in range(BLOCKS):
        hidden = one.before_block(depth, torch.zeros(1, 1, 2))
        assert torch.equal(one.before_block(depth, hidden), hidden)
    assert one.boundaries.applied == [0, 1, 2, 3]


@pytest.mark.parametrize("order", [[0, 2], [1], [0, 1, 2, 1], [0, 1, 0]])
def test_blocks_out_of_order_or_run_again_are_an_error(order):
    one = state()
    for depth in order[:-1]:
        one.before_block(depth, torch.zeros(1, 1, 2))
    with pytest.raises(AttachError, match=f"block {order[-1]} ran after block {order[-2] if len(order) > 1 else -1}"):
        one.before_block(order[-1], torch.zeros(1, 1, 2))


@pytest.mark.parametrize("reached", [0, 1, 3])
def test_a_state_that_did_not_reach_the_last_block_is_an_error(reached):
    one = state()
    for depth in range(reached):
        one.before_block(depth, torch.zeros(1, 1, 2))
    with pytest.raises(AttachError, match=f"reached {reached} of 4 blocks"):
        one.finalize(BLOCKS, torch.zeros(1, 1, 2))


def test_a_state_is_finalized_once():
    one = state()
    for depth in range(BLOCKS):
        one.before_block(depth, torch.zeros(1, 1, 2))
    final = one.finalize(BLOCKS, torch.ones(1, 1, 2))
    assert torch.equal(one.finalize(BLOCKS, final), final)
