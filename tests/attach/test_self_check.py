"""A base that would lose the shadow's state or its own cache is refused at attach."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from shadowtune import ShadowForCausalLM
from shadowtune.attach import ARCHITECTURES, Architecture, attach, self_check
from shadowtune.attach.forward import install_hooks
from shadowtune.compatibility import CACHE, CACHE_NAMES
from shadowtune.errors import UnsupportedArchitectureError
from tests.support.bases import CONFIGS, tiny_base
from tests.support.shadows import perturbed_model


@pytest.fixture
def untested(monkeypatch):
    """Pretend that the installed transformers is of an untested version."""
    monkeypatch.setattr(self_check, "untested_versions", lambda: {"transformers": "5.99.0, tested <5.25"})


def hooks_of(base):
    return [hook for module in base.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_two_tokens_pass_through_every_supported_base(model_type, untested):
    base = tiny_base(model_type).train()
    before = {name: module.training for name, module in base.named_modules()}
    install_hooks(base)
    assert {name: module.training for name, module in base.named_modules()} == before


def test_a_block_without_unknown_keywords_is_refused(monkeypatch):
    def forward(self, hidden_states, attention_mask=None, position_ids=None):
        return hidden_states

    base = tiny_base()
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    with pytest.raises(UnsupportedArchitectureError, match="LlamaDecoderLayer takes no unknown keywords"):
        ShadowForCausalLM.from_base(base)
    assert not hooks_of(base)


def test_a_decoder_that_calls_its_cache_otherwise_is_refused(monkeypatch, untested):
    def forward(self, input_ids=None, memory=None, use_cache=None, **kwargs):
        raise AssertionError("must not be called")

    base = tiny_base()
    shadow = perturbed_model("llama").shadow
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(UnsupportedArchitectureError, match=rf"no argument '{CACHE}'.*5\.99\.0, tested <5\.25"):
        attach(base, shadow)
    assert not hooks_of(base)


def test_a_decoder_that_drops_its_cache_is_refused(monkeypatch, untested):
    real = modeling_llama.LlamaModel.forward

    def forward(self, *args, cache=None, past_key_values=None, **kwargs):
        return real(self, *args, **kwargs)

    base = tiny_base()
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(UnsupportedArchitectureError, match="does not use the key-value cache"):
        install_hooks(base)


def test_a_decoder_whose_blocks_write_the_cache_but_do_not_read_it_is_refused(monkeypatch, untested):
    real = modeling_llama.LlamaAttention.forward

    def forward(self, *args, **kwargs):
        kept = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
        for cache in kept.values():
            if cache is not None:
                cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), self.layer_idx)
        kwargs["attention_mask"] = None
        return real(self, *args, **kwargs)

    base = tiny_base()
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(UnsupportedArchitectureError, match="does not use the key-value cache"):
        install_hooks(base)


def test_a_decoder_that_keeps_unknown_keywords_from_its_blocks_is_refused(monkeypatch, untested):
    real = modeling_llama.LlamaModel.forward

    def forward(self, *args, shadow=None, **kwargs):
        return real(self, *args, **kwargs)

    forward.__wrapped__ = real
    base = tiny_base()
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(UnsupportedArchitectureError, match=r"state reached blocks \[\] of 4"):
        install_hooks(base)
    assert not hooks_of(base)


def test_a_row_that_a_user_added_is_checked_with_two_tokens_too(monkeypatch):
    seen = []
    monkeypatch.setattr(self_check, "_check_two_tokens", lambda *arguments: seen.append(arguments))
    base = tiny_base()
    install_hooks(base)
    assert not seen  # tested versions, a tested row
    monkeypatch.setattr(self_check, "TESTED", frozenset())
    monkeypatch.setitem(ARCHITECTURES, "llama", Architecture("model", "layers"))
    install_hooks(base)
    assert len(seen) == 1


def test_weights_that_are_not_there_yet_cannot_be_tried(untested):
    install_hooks(tiny_base().to("meta"))
