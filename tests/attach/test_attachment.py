import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache

from shadowtune import ShadowConfig, ShadowForCausalLM, attach
from shadowtune.compatibility import CACHE, cache_of
from shadowtune.errors import AttachError
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.shadows import perturbed_model, tokens


@pytest.fixture(scope="module")
def pair():
    return perturbed_model()


@pytest.fixture(scope="module")
def other():
    return perturbed_model(seed=7)


@pytest.fixture
def base():
    return tiny_base()


@torch.no_grad()
def logits(base, ids=None):
    return base(tokens(2, 9) if ids is None else ids).logits


def snapshot(base):
    """Everything of a model that attaching could touch: objects by identity, values, hooks, settings."""
    return {
        "modules": {name: id(module) for name, module in base.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p.data_ptr()) for name, p in base.named_parameters()},
        "keys": list(base.state_dict()),
        "sum": sum(p.double().sum().item() for p in base.parameters()),
        "config": base.config.to_dict(),
        "generation_config": base.generation_config.to_dict(),
        "attributes": sorted(vars(base)),
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
            for m in base.modules()
        ],
    }


def test_attaching_leaves_keys_weights_and_objects_and_detaching_leaves_nothing(base, pair):
    before, plain = snapshot(base), logits(base)
    handle = attach(base, pair.shadow)
    attached = snapshot(base)
    assert {name: value for name, value in attached.items() if name != "hooks"} == {
        name: value for name, value in before.items() if name != "hooks"
    }
    assert not torch.equal(logits(base), plain)
    handle.detach()
    assert snapshot(base) == before
    assert torch.equal(logits(base), plain)
    handle.detach()
    assert snapshot(base) == before


def test_a_context_detaches_at_its_end_even_after_an_error(base, pair):
    before = snapshot(base)
    with attach(base, pair.shadow) as handle:
        assert (handle.names, handle.active) == (["default"], "default")
    assert snapshot(base) == before
    with pytest.raises(KeyError), attach(base, pair.shadow):
        raise KeyError
    assert snapshot(base) == before


def test_several_shadows_are_switched_disabled_and_removed(base, pair, other):
    plain, first, second = logits(base), logits(pair), logits(other)
    handle = attach(base, pair.shadow, "first")
    handle.add(other.shadow, "second")
    assert (handle.names, handle.active) == (["first", "second"], "second")
    assert torch.equal(logits(base), second)
    handle.switch("first")
    assert torch.equal(logits(base), first)
    with handle.disabled():
        assert handle.active is None
        assert torch.equal(logits(base), plain)
    assert torch.equal(logits(base), first)
    handle.remove("second")
    assert torch.equal(logits(base), first)
    handle.remove("first")
    assert (handle.names, handle.active) == ([], None)
    assert torch.equal(logits(base), plain)
    handle.detach()


def test_a_shadow_removed_while_disabled_does_not_come_back(base, pair, other):
    plain = logits(base)
    with attach(base, pair.shadow) as handle:
        with handle.disabled():
            handle.remove("default")
        assert torch.equal(logits(base), plain)


def test_misuse_is_an_error_that_says_what_to_do(base, pair, other):
    with attach(base, pair.shadow, "first") as handle:
        with pytest.raises(AttachError, match=r"attached to this base already; use handle.add"):
            attach(base, other.shadow)
        with pytest.raises(AttachError, match="named 'first' is attached already"):
            handle.add(other.shadow, "first")
        with pytest.raises(AttachError, match="cannot be attached a second time as 'again'"):
            handle.add(pair.shadow, "again")
        for call in (handle.switch, handle.remove):
            with pytest.raises(AttachError, match="no shadow named 'third' is attached; attached are first"):
                call("third")
        assert torch.equal(logits(base), logits(pair))
        with pytest.raises(AttachError, match="with keywords"):
            base.model(tokens(1, 4), torch.ones(1, 4))
    with pytest.raises(AttachError, match="detached; call attach"):
        handle.add(other.shadow, "second")


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": 48}, {"num_hidden_layers": 5}, {"num_hidden_layers": 3, "hidden_size": 16}], ids=str
)
def test_a_base_of_another_width_or_depth_is_refused_with_both_shapes_named(pair, wrong):
    base = tiny_base(**wrong)
    before, sizes = snapshot(base), {"hidden_size": 32, "num_hidden_layers": 4, **wrong}
    with pytest.raises(AttachError) as caught:
        attach(base, pair.shadow)
    assert "width 32 and 4 blocks" in str(caught.value)
    assert f"width {sizes['hidden_size']} and {sizes['num_hidden_layers']} blocks" in str(caught.value)
    assert snapshot(base) == before


def test_a_base_of_one_block_is_refused():
    with pytest.raises(AttachError, match="at least 2"):
        ShadowForCausalLM.from_base(tiny_base(num_hidden_layers=1), ShadowConfig(inject_first=True))


def test_attaching_a_hundred_times_leaks_nothing(base, pair):
    before = snapshot(base)
    gc.collect()
    gc.disable()
    try:
        handles = []
        for _ in range(100):
            with attach(base, pair.shadow) as handle:
                logits(base, tokens(1, 2))
            handles.append(weakref.ref(handle))
            del handle
    finally:
        gc.enable()
    gc.collect()
    assert [ref for ref in handles if ref() is not None] == []
    assert snapshot(base) == before


def test_a_pair_that_is_gone_leaves_no_hooks_on_its_base(base):
    before = snapshot(base)["hooks"]
    for _ in range(3):
        ShadowForCausalLM.from_base(base, ShadowConfig(rank=2, update_width=2))
    gc.collect()
    assert snapshot(base)["hooks"] == before


def test_the_shadow_of_a_pair_can_be_attached_to_the_pairs_own_base(other):
    pair = perturbed_model()
    expected = logits(pair)
    with attach(pair.base, pair.shadow) as handle:
        assert torch.equal(logits(pair.base), expected)
        assert torch.equal(logits(pair), expected)
        handle.add(other.shadow, "other")
        assert torch.equal(logits(pair.base), logits(other))
        assert torch.equal(logits(pair), expected)
    assert torch.equal(logits(pair), expected)


def test_two_pairs_share_one_base_and_each_keeps_its_own_shadow(base, pair, other):
    one = ShadowForCausalLM(pair.config, base, copy.deepcopy(pair.shadow)).eval()
    two = ShadowForCausalLM(other.config, base, copy.deepcopy(other.shadow)).eval()
    assert one.base is two.base
    assert torch.equal(logits(one), logits(pair))
    assert torch.equal(logits(two), logits(other))
    del one
    gc.collect()
    assert torch.equal(logits(two), logits(other))


def test_threads_interleaved_on_one_base_get_what_each_gets_alone(base, pair, other):
    """Both threads stand in the middle of the stack at the same time, in every call."""
    one = ShadowForCausalLM(pair.config, base, pair.shadow).eval()
    two = ShadowForCausalLM(other.config, base, other.shadow).eval()
    inputs = [tokens(2, 9, seed) for seed in range(8)]
    expected = {id(model): [logits(model, ids) for ids in inputs] for model in (one, two)}
    meeting = threading.Barrier(2, timeout=60)
    got = {}

    def meet(*call):
        meeting.wait()

    hook = base.model.layers[1].register_forward_hook(meet)

    def work(model):
        got[id(model)] = [logits(model, ids) for ids in inputs]

    threads = [threading.Thread(target=work, args=(model,)) for model in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    for model in (one, two):
        assert all(torch.equal(*both) for both in zip(got[id(model)], expected[id(model)], strict=True))


def test_an_exception_in_mid_forward_leaves_the_next_call_right(base, pair):
    expected = logits(pair)
    with attach(base, pair.shadow):
        hook = base.model.layers[2].register_forward_pre_hook(lambda *call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(base)
        hook.remove()
        assert torch.equal(logits(base), expected)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_attached_base_is_attached_and_independent(base, pair, copied):
    expected, plain = logits(pair), logits(base)
    handle = attach(base, pair.shadow)
    twin = copied(base)
    handle.detach()
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(base), plain)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(logits(twin), expected)


def test_an_attached_base_trains_its_shadow_and_nothing_else(base, pair):
    shadow = copy.deepcopy(pair.shadow).train()
    base.requires_grad_(False).train()
    with attach(base, shadow):
        base(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    dead = [name for name, p in shadow.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@torch.no_grad()
def test_inputs_reach_an_attached_base_in_every_form(base, pair):
    ids = tokens(2, 9)
    expected = logits(pair)
    embeds = base.get_input_embeddings()(ids)
    mask, positions = torch.ones_like(ids), torch.arange(9).expand(2, -1)
    with attach(base, pair.shadow):
        for call in (
            {"input_ids": ids},
            {"inputs_embeds": embeds},
            {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
            {"input_ids": ids, "use_cache": False},
        ):
            torch.testing.assert_close(base(**call).logits, expected, rtol=0, atol=1e-6)
        packed = torch.cat([torch.arange(4), torch.arange(5)]).expand(2, -1)
        assert torch.equal(base(ids, position_ids=packed).logits, pair(ids, position_ids=packed).logits)
        assert not torch.equal(base(ids, position_ids=packed).logits, expected)
        torch.testing.assert_close(base.model(ids)[0], base.model(input_ids=ids).last_hidden_state, rtol=0, atol=0)
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            base()


@torch.no_grad()
def test_a_cache_given_to_an_attached_base_is_filled_and_goes_on(base, pair):
    ids = tokens(2, 9)
    with attach(base, pair.shadow):
        cache = DynamicCache(config=base.config)
        first = base(ids[:, :5], use_cache=True, **{CACHE: cache})
        assert cache_of(first) is cache
        assert (len(cache), cache.get_seq_length()) == (5, 5)
        rest = base(ids[:, 5:], use_cache=True, **{CACHE: cache}).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), logits(pair), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_the_bases_own_generate_equals_the_pairs(base, pair, settings):
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    generated = []
    with attach(base, pair.shadow):
        for model in (base, pair):
            torch.manual_seed(0)
            generated.append(model.generate(tokens(2, 9), **settings))
    assert torch.equal(*generated)


def test_a_left_padded_batch_generates_what_the_pair_does(base, pair):
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with attach(base, pair.shadow):
        assert torch.equal(base.generate(ids, **settings), pair.generate(ids, **settings))


def test_a_classifier_can_be_attached_to(pair):
    base = tiny_classifier()
    plain = logits(base)
    with attach(base, pair.shadow):
        assert (logits(base) - plain).abs().max() > 0.01
    assert torch.equal(logits(base), plain)
