import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.errors import CheckpointError, ConfigError
from tests.support.bases import VOCABULARY, tiny_base, tiny_classifier
from tests.support.shadows import perturb, perturbed_model, tokens

MODES = ("attached", "detached", "base")
SETTINGS = ShadowConfig(rank=4, update_width=3, alpha=0.7)


@torch.no_grad()
def logits(model, ids=None):
    return {mode: model.set_mode(mode)(tokens(2, 9) if ids is None else ids).logits for mode in MODES}


def assert_same(one, other):
    for mode in MODES:
        assert torch.equal(one[mode], other[mode]), mode


def test_all_and_only_the_shadow_is_trainable():
    model = ShadowForCausalLM.from_base(tiny_base(), SETTINGS)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("shadow."), name
    assert {name for name, _ in model.shadow.named_parameters()} == {
        name.removeprefix("shadow.") for name, p in model.named_parameters() if p.requires_grad
    }


def test_giving_a_base_a_shadow_leaves_its_settings_and_weights_alone():
    base = tiny_base()
    before, config, generation = (
        copy.deepcopy(base.state_dict()),
        base.config.to_dict(),
        base.generation_config.to_dict(),
    )
    model = perturb(ShadowForCausalLM.from_base(base, SETTINGS))
    logits(model)
    model.generate(tokens(1, 4), max_new_tokens=2)
    assert model.base is base
    assert (base.config.to_dict(), base.generation_config.to_dict()) == (config, generation)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert base.training is False


@pytest.mark.parametrize("word", ["Attached", "shadow", "", None])
def test_an_unknown_mode_is_an_error_and_changes_nothing(word):
    model = perturbed_model().set_mode("detached")
    with pytest.raises(ConfigError, match="mode must be one of attached, detached, base"):
        model.set_mode(word)
    assert model.mode == "detached"


def test_modes_are_independent_of_what_ran_before():
    model, ids = perturbed_model(), tokens(2, 9)
    alone = logits(perturbed_model())
    for _ in range(2):
        assert_same(logits(model), alone)
    model.set_mode("attached").train()
    model(ids, labels=ids).loss.backward()
    assert_same(logits(model.eval()), alone)


def test_evaluating_first_changes_nothing_in_training():
    gradients = []
    for evaluate in (False, True):
        model, ids = perturbed_model(dropout=0.0), tokens(2, 9)
        if evaluate:
            logits(model)
            model.set_mode("attached").generate(ids, max_new_tokens=3)
        model.set_mode("attached").train()(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_is_independent(copied):
    model = perturbed_model()
    expected = logits(model)
    twin = copied(model)
    perturb(model, seed=5)
    with torch.no_grad():
        model.base.lm_head.weight.zero_()
    assert_same(logits(twin), expected)
    assert not torch.equal(logits(model)["attached"], expected["attached"])
    del model
    assert_same(logits(twin), expected)


@pytest.mark.filterwarnings("ignore:.*checkpointing_.*able. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inject_first", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "mixtral", "qwen3_next", "pretrained"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant, inject_first, tmp_path):
    ids, settings = tokens(2, 9), {"num_shadow_layers": 2}
    if kind == "pretrained":
        tiny_base("qwen2", num_hidden_layers=2).save_pretrained(tmp_path)
        kind, settings = "llama", {"backbone": str(tmp_path)}
    model = perturbed_model(kind, dropout=0.0, inject_first=inject_first, **settings).train()
    runs = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        runs.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(gradient is not None for gradient in runs[1])
    for plain, again in zip(*runs, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert not model.shadow.backbone.is_activation_checkpointing


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("variant", ["paper", "stateless"])
def test_blocks_below_the_first_injection_keep_nothing_for_the_backward_pass(variant, checkpointed):
    model, ids = perturbed_model(variant=variant, injection_start=0.5, dropout=0.0).train(), tokens(2, 9)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    outputs = []
    for block in model.base.model.layers:
        block.register_forward_hook(lambda block, args, output: outputs.append(output.requires_grad))
    model(ids, labels=ids).loss.backward()
    assert outputs == [False, True, True, True]  # the second block's output is corrected in a hook before this one
    assert all(p.grad is not None and p.grad.any() for p in model.shadow.boundaries.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_blocks_but_never_runs_the_shadows_hooks_again(reentrant, monkeypatch):
    model, ids = perturbed_model().train(), tokens(2, 9)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    applied, computed = [], []
    apply_boundary = type(model.shadow.boundaries).apply_boundary
    monkeypatch.setattr(
        type(model.shadow.boundaries),
        "apply_boundary",
        lambda self, *args: applied.append(args[0]) or apply_boundary(self, *args),
    )
    model.base.model.layers[2].mlp.register_forward_pre_hook(lambda *call: computed.append(1))
    model(ids, labels=ids).loss.backward()
    downs = model.shadow.boundaries.injection_downs
    assert [parameters.injection.down.data_ptr() for parameters in applied] == [down.data_ptr() for down in downs]
    assert len(computed) == 2


@pytest.mark.filterwarnings("error:None of the inputs have requires_grad")
def test_reentrant_checkpointing_alarms_nobody():
    model, ids = perturbed_model().train(), tokens(2, 9)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model(ids, labels=ids).loss.backward()


def test_checkpointing_leaves_the_callers_embeddings_alone():
    model, ids = perturbed_model().train(), tokens(2, 9)
    model.activation_checkpointing_enable({"use_reentrant": True})
    embeds = model.get_input_embeddings()(ids).detach()
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.shadow.parameters())
    assert not embeds.requires_grad
    assert embeds.grad is None


@pytest.mark.parametrize(
    ("base_dtype", "dtype", "autocast"),
    [
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 16}], ids=["same_width", "other_width"])
def test_precisions_mix(base_dtype, dtype, autocast, sizes):
    ids = tokens(2, 9)
    exact = perturbed_model(dropout=0.0, **sizes)
    base = tiny_base().to(base_dtype)
    model = ShadowForCausalLM.from_base(base, exact.config.shadow_config, dtype=dtype).eval()
    model.shadow.load_state_dict(exact.shadow.state_dict())
    assert {p.dtype for p in model.shadow.parameters()} == {dtype}
    assert {p.dtype for p in model.base.parameters()} == {base_dtype}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = logits(model)
        generated = model.set_mode("attached").generate(ids, max_new_tokens=3, do_sample=False)
        loss = model.train()(ids, labels=ids).loss
    assert generated.shape == (2, 12)
    assert loss.dtype == torch.float32
    for mode, truth in logits(exact).items():
        torch.testing.assert_close(found[mode].float(), truth, rtol=0, atol=0.2)
    loss.backward()
    expected = exact.set_mode("attached").train()(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0.03)
    for name, parameter in model.shadow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name


def test_casting_a_shadow_keeps_what_is_not_saved_exact():
    model = perturbed_model()
    before = model.shadow.backbone.rotary_emb.inv_freq.clone()
    model.shadow.cast(torch.bfloat16)
    assert {tensor.dtype for tensor in model.shadow.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(model.shadow.backbone.rotary_emb.inv_freq, before)


def test_resizing_the_vocabulary_keeps_the_old_logits_and_freezes_the_new_rows(tmp_path):
    model = perturbed_model()
    before = logits(model)
    embedding = model.resize_token_embeddings(VOCABULARY + 7)
    assert embedding is model.get_input_embeddings()
    after = logits(model)
    for mode in MODES:
        torch.testing.assert_close(after[mode][..., :VOCABULARY], before[mode], rtol=0, atol=1e-6)
        assert after[mode].shape[-1] == VOCABULARY + 7
    logits(model, torch.tensor([[VOCABULARY + 6, 5]]))
    assert all(parameter.requires_grad == name.startswith("shadow.") for name, parameter in model.named_parameters())
    assert model.config.vocab_size == VOCABULARY + 7
    assert model.detached().get_input_embeddings().num_embeddings == VOCABULARY + 7
    model.base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "shadow")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shadow", base=str(tmp_path / "base"))
    assert_same(logits(loaded), after)
    tiny_base().save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"vocab_size 104, but .* has vocab_size 97"):
        ShadowForCausalLM.from_pretrained(tmp_path / "shadow", base=str(tmp_path / "small"))


def test_a_shadow_with_its_own_embedding_refuses_to_be_resized(tmp_path):
    tiny_base("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="resize the base before"):
        perturbed_model(backbone=str(tmp_path)).resize_token_embeddings(120)


def test_resizing_a_classifier_keeps_its_heads_trainable():
    model = ShadowForSequenceClassification.from_base(tiny_classifier(), SETTINGS)
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model.score.weight.requires_grad
    assert not model.base.score.weight.requires_grad
    assert not model.base.model.embed_tokens.weight.requires_grad


def test_a_model_can_be_built_from_its_config_alone():
    model = perturbed_model()
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert type(fresh) is ShadowForCausalLM
    fresh.load_state_dict(model.state_dict())
    assert_same(logits(fresh.eval()), logits(model))


def test_inputs_are_exactly_one_of_ids_and_embeddings():
    model = perturbed_model()
    for inputs in ({}, {"input_ids": tokens(1, 2), "inputs_embeds": torch.zeros(1, 2, 32)}):
        with pytest.raises(ConfigError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_saving_on_another_process_than_the_first_writes_nothing(tmp_path):
    perturbed_model().save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_a_gathered_state_is_saved_in_place_of_the_models_own(tmp_path):
    model = perturbed_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(model, seed=9)
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base())
    assert_same(logits(loaded), logits(perturbed_model()))


def test_a_base_that_was_resized_itself_is_recorded_when_the_shadow_is_saved(tmp_path):
    model = perturbed_model()
    model.base.resize_token_embeddings(VOCABULARY + 7)
    model.save_pretrained(tmp_path / "shadow")
    model.base.save_pretrained(tmp_path / "base")
    loaded = ShadowForCausalLM.from_pretrained(tmp_path / "shadow", base=str(tmp_path / "base"))
    assert_same(logits(loaded), logits(model))


def test_a_wrapped_base_is_refused_when_a_shadow_is_loaded(tmp_path):
    model = perturbed_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="DataParallel, which is not a transformers model"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=torch.nn.DataParallel(model.base))
