"""The method in one file computes what the package computes, on the same weights."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, tokens

FILE = Path(__file__).parents[2] / "examples" / "nanoshadow.py"
SIZES = {"rank": 4, "update_width": 3, "alpha": 0.7}


@pytest.fixture(scope="module")
def nano():
    specification = importlib.util.spec_from_file_location("nanoshadow", FILE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(params=["llama", "qwen3", "gemma3_text"])
def both(nano, request):
    """The file's model and the package's with the same perturbed weights, each on a base of its own."""
    config = ShadowConfig(**SIZES, dropout=0.0, shadow_loss_weight=0.6, init_layers=(0,))
    torch.manual_seed(0)
    model = perturb(ShadowForCausalLM.from_base(tiny_base(request.param), config))
    base = tiny_base(request.param)
    shadow = nano.Shadow(base, rank=4, width=3, alpha=0.7)
    ours = dict(model.shadow.named_parameters())
    with torch.no_grad():
        for name, parameter in shadow.named_parameters():
            parameter.copy_(ours[name if name.startswith("backbone.") else f"boundaries.{name}"])
    assert len(list(shadow.parameters())) == len(ours)
    return nano.ShadowModel(base, shadow), model


def test_it_has_at_most_400_lines_and_nothing_of_the_package():
    text = FILE.read_text()
    assert text.count("\n") <= 400
    assert "import shadowtune" not in text and "from shadowtune" not in text


def test_logits_loss_and_every_gradient_are_those_of_the_package(both):
    small, model = both
    ids, mask = tokens(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    with torch.no_grad():
        s0 = small.run_shadow(ids, mask)
        logits = small.head(small.run_base(ids, s0, mask))
        reference = small.head(small.run_base(ids, None, mask))
        ours = model.eval()(ids, attention_mask=mask).logits
        detached = model.set_mode("detached")(ids, attention_mask=mask).logits
    cap = model._logits_transform or (lambda values: values)
    kept = mask.bool()
    assert not torch.allclose(logits[kept], reference[kept], atol=1e-3)  # the shadow changes something
    assert torch.allclose(cap(logits)[kept], ours[kept], atol=1e-5)
    assert torch.allclose(cap(small.head(s0))[kept], detached[kept], atol=1e-5)

    attached, shadows = small.loss(ids, labels, mask, weight=0.6)
    output = model.set_mode("attached").train()(ids, attention_mask=mask, labels=labels)
    assert torch.allclose(attached + shadows, output.loss, atol=1e-5)
    (attached + shadows).backward()
    output.loss.backward()
    theirs = dict(model.shadow.named_parameters())
    for name, parameter in small.shadow.named_parameters():
        wanted = theirs[name if name.startswith("backbone.") else f"boundaries.{name}"].grad
        assert wanted.abs().max() > 0, name
        assert torch.allclose(parameter.grad, wanted, atol=1e-5, rtol=1e-4), name
    assert all(parameter.grad is None for parameter in small.base.parameters())


def test_cached_and_speculative_decoding_give_the_tokens_of_uncached_decoding(nano, both):
    small, model = both
    ids = tokens(1, 7)
    for mode in ("attached", "detached", "base"):
        answer = nano.generate(small, ids, 8, end=-1, mode=mode)
        uncached, text = [], ids
        with torch.no_grad():
            for _ in range(8):
                uncached.append(int(model.eval().set_mode(mode)(text, use_cache=False).logits[:, -1].argmax()))
                text = torch.cat([text, torch.tensor([[uncached[-1]]])], 1)
        assert answer == uncached, mode
    for drafts in (1, 3):
        answer, passes = nano.speculate(small, ids, 8, end=-1, drafts=drafts)
        assert answer == nano.generate(small, ids, 8, end=-1)
        assert passes <= 8


@pytest.mark.model
def test_the_command_runs(nano, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanoshadow.py", "--model", "tiny", "--steps", "3", "--test", "4"])
    nano.main()
    assert "drafting: same answers True" in capsys.readouterr().out
