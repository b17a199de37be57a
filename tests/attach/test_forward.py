import pytest
import torch

from shadowtune import attach
from shadowtune.attach.forward import install_hooks
from shadowtune.errors import AttachError
from tests.support.bases import tiny_base
from tests.support.shadows import perturbed_model, tokens


@torch.no_grad()
def test_hooks_do_nothing_to_calls_that_carry_no_state():
    base, ids = tiny_base(), tokens(2, 9)
    plain = base(ids).logits
    handles = install_hooks(base)
    assert torch.equal(base(ids).logits, plain)
    assert len(handles) == len(base.model.layers) + 1  # and the decoder's output


@pytest.mark.parametrize("installed", [1, 2])
@torch.no_grad()
def test_hooks_of_several_owners_act_once(installed):
    model, ids = perturbed_model(), tokens(2, 9)
    expected = model(ids).logits
    for _ in range(installed):
        install_hooks(model.base)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("through", ["pair", "attachment"])
def test_a_base_that_keeps_the_keyword_from_a_block_is_an_error(through):
    model = perturbed_model()
    base = model.base if through == "pair" else tiny_base()
    block = base.model.layers[2]
    block.register_forward_pre_hook(
        lambda block, args, kwargs: (args, {name: value for name, value in kwargs.items() if name != "shadow"}),
        with_kwargs=True,
    )
    if through == "attachment":
        attach(base, model.shadow)
    with pytest.raises(AttachError, match="reached 3 of 4 blocks"):
        (model if through == "pair" else base)(tokens(1, 4))


def test_blocks_recomputed_together_with_their_hooks_are_an_error():
    from torch.utils.checkpoint import checkpoint

    model = perturbed_model().train()
    for block in model.base.model.layers:  # as wrappers around whole blocks do
        call = block.__call__
        block.__class__ = type("Wrapped", (type(block),), {"__call__": _checkpointed(call, checkpoint)})
    loss = model(tokens(1, 6), labels=tokens(1, 6)).loss
    with pytest.raises(Exception, match=r"block \d ran after block \d|different number of tensors"):
        loss.backward()


def _checkpointed(call, checkpoint):
    return lambda self, *args, **kwargs: checkpoint(call, *args, use_reentrant=False, **kwargs)
