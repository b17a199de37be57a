"""What transformers, its Trainer and whoever builds on them expect of a model, beyond its logits."""

import inspect
import logging
import threading

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, StaticCache, Trainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification, attach
from shadowtune.compatibility import CACHE
from shadowtune.errors import AttachError, CheckpointError, ConfigError
from tests.support.bases import VOCABULARY, WIDTH, tiny_base, tiny_classifier
from tests.support.runs import arguments, causal_rows, class_rows
from tests.support.shadows import perturb, perturbed_classifier, perturbed_model, tokens
from tests.support.tokenizers import tiny_tokenizer


def trainer(model, path, rows, **settings):
    """transformers' own Trainer, not ours."""
    options = {name: settings.pop(name) for name in list(settings) if name not in inspect.signature(Trainer).parameters}
    rows = [{name: value for name, value in row.items() if name != "row"} for row in rows]
    collate = DataCollatorForSeq2Seq(tiny_tokenizer()) if isinstance(model, ShadowForCausalLM) else None
    processing = {} if collate is not None else {"processing_class": tiny_tokenizer()}
    return Trainer(
        model=model,
        args=arguments(path, **{"prediction_loss_only": False, **options}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        **processing,
        **settings,
    )


# Trainer


@pytest.mark.parametrize("mode", ["attached", "detached"])
@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_predictions_are_the_logits_alone(kind, mode, tmp_path):
    causal = kind == "causal"
    model = (perturbed_model() if causal else perturbed_classifier()).set_mode(mode)
    rows, seen = causal_rows() if causal else class_rows(), []
    evaluator = trainer(model, tmp_path, rows, compute_metrics=lambda found: seen.append(found.predictions) or {})
    evaluator.evaluate()
    assert isinstance(seen[0], np.ndarray)
    assert seen[0].shape[-1] == (VOCABULARY if causal else 3)


@pytest.mark.parametrize("mode", ["attached", "detached"])
@pytest.mark.parametrize("kind", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_that_computes_the_loss_itself_is_refused(kind, mode, tmp_path):
    values = {"label_smoothing_factor": 0.1, "compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()}
    refused = trainer(perturbed_model().set_mode(mode), tmp_path, causal_rows(), **{kind: values[kind]})
    with pytest.raises(ConfigError, match="label_smoothing_factor or compute_loss_func"):
        refused.train()


def test_a_classifier_whose_shadow_would_not_learn_is_refused_and_one_without_a_shadows_loss_trains(tmp_path):
    with pytest.raises(ConfigError, match="shadow's loss would never exist"):
        trainer(perturbed_classifier(), tmp_path, class_rows(), label_smoothing_factor=0.1).train()
    model = perturbed_classifier(shadow_loss_weight=0.0)
    before = model.score.weight.detach().clone()
    trainer(model, tmp_path, class_rows(), label_smoothing_factor=0.1).train()
    assert not torch.equal(before, model.score.weight)


def test_the_best_model_is_loaded_without_complaints(tmp_path, caplog):
    model = perturbed_model()
    kept = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    with caplog.at_level(logging.WARNING):
        for logger in ("transformers", "transformers.trainer"):
            logging.getLogger(logger).addHandler(caplog.handler)
        trainer(model, tmp_path, causal_rows(), load_best_model_at_end=True, **kept).train()
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text


# keywords


def half_way(labels):
    """Labels (B, T) as a trainer under context parallelism shifts them."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("attached", {}),
        ("attached", {"distillation_weight": 0.5, "matching_weight": 0.25}),
        ("attached", {"draft_rank": 3}),
        ("detached", {}),
        ("detached", {"distillation_weight": 0.5}),
    ],
)
def test_labels_that_are_shifted_already_give_the_same_loss_and_gradients(mode, settings):
    model, ids, found = perturbed_model(**settings).set_mode(mode).train(), tokens(2, 9), []
    labels = ids.clone()
    labels[:, :4] = -100
    for extra in ({}, {"shift_labels": half_way(labels)}):
        garbage = labels if not extra else torch.full_like(labels, 5)  # what counts is shift_labels
        torch.manual_seed(0)  # of dropout
        loss = model(ids, labels=garbage, **extra).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1])


def test_half_of_a_sequence_counts_the_label_that_belongs_to_the_next_process():
    model, ids = perturbed_model(), tokens(2, 9)
    whole = model(ids, labels=ids, num_items_in_batch=1).loss
    shifted = half_way(ids)
    parts = []
    for first, last in ((0, 4), (4, 9)):
        only = torch.full_like(shifted, -100)
        only[:, first:last] = shifted[:, first:last]
        parts.append(model(ids, labels=ids, shift_labels=only, num_items_in_batch=1).loss)
    torch.testing.assert_close(sum(parts), whole)
    last = model(ids[:, :5], labels=ids[:, :5], shift_labels=shifted[:, :5], num_items_in_batch=1).base_loss
    expected = nn.functional.cross_entropy(
        model(ids).logits[:, :5].flatten(0, 1), ids[:, 1:6].flatten(), reduction="sum"
    )
    torch.testing.assert_close(last, expected)


def test_shifted_labels_without_labels_are_an_error():
    ids = tokens(2, 9)
    with pytest.raises(ConfigError, match="shift_labels without labels"):
        perturbed_model().train()(ids, shift_labels=half_way(ids))


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
@pytest.mark.parametrize("build", [perturbed_model, perturbed_classifier])
@pytest.mark.parametrize(("word", "meant"), [("lables", "labels"), ("shadow_weight", "shadow_loss_weight")])
def test_a_misspelt_keyword_is_an_error_that_names_the_right_one(build, mode, word, meant):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{word}' \(did you mean {meant}"):
        build().set_mode(mode)(tokens(2, 9), **{word: 1.0})


def test_what_tokenizers_and_trainers_send_to_every_model_is_taken():
    model, ids = perturbed_model(), tokens(2, 9)
    expected = model(ids).logits
    assert torch.equal(model(ids, token_type_ids=torch.zeros_like(ids), return_dict=True).logits, expected)
    assert torch.equal(model(ids, output_router_logits=False, is_causal=True).logits, expected)


# outputs


@pytest.mark.parametrize("build", [perturbed_model, perturbed_classifier])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("sizes", [{}, {"num_shadow_layers": 2, "hidden_size": 16}], ids=["same width", "narrower"])
def test_the_detached_model_has_the_hidden_states_and_attentions_of_its_plain_form(build, kind, sizes):
    model = build(kind, **sizes).set_mode("detached")
    model.set_attn_implementation("eager")
    plain, ids = model.detached().eval(), tokens(2, 9)
    plain.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = model(ids, **wanted), plain(ids, **wanted)
    assert len(ours.hidden_states) == 1 + model.shadow.num_cache_layers
    assert len(ours.attentions) == model.shadow.num_cache_layers
    for one, other in zip(ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_hidden_states_may_be_asked_for_in_the_config(mode):
    model = perturbed_model().set_mode(mode)
    model.config.output_hidden_states = True
    assert model(tokens(2, 9)).hidden_states is not None


@pytest.mark.filterwarnings("ignore")
def test_assisted_decoding_of_a_detached_model_returns_hidden_states(monkeypatch):
    model, ids = perturbed_model().set_mode("detached"), tokens(1, 9)
    wanted = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **wanted)
    monkeypatch.setattr(logging.getLogger("transformers.generation.utils"), "disabled", True)  # it deprecates itself
    assisted = model.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=model.detached(), **wanted)
    assert torch.equal(assisted.sequences, plain.sequences)
    assert assisted.hidden_states[0][0].shape[-1] == WIDTH


# generation


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_continuous_batching_of_two_networks_is_refused(mode):
    with pytest.raises(ConfigError, match=r"generate_batch.*serve"):
        perturbed_model().set_mode(mode).generate_batch([[5, 6, 7], [8, 9]])


def test_continuous_batching_in_mode_base_is_the_bases_own(monkeypatch):
    model, asked = perturbed_model().set_mode("base"), []
    monkeypatch.setattr(type(model.base), "init_continuous_batching", lambda base, **kwargs: asked.append(base))
    model.init_continuous_batching()
    assert asked == [model.base]


def test_an_attached_base_refuses_a_cache_that_is_none_of_two_networks():
    class Paged:
        """As transformers' paged cache, no ``Cache``."""

    base = tiny_base()
    with (
        attach(base, ShadowForCausalLM.from_base(base, ShadowConfig(rank=2)).shadow),
        pytest.raises(AttachError, match="Paged"),
    ):
        base(tokens(1, 5), **{CACHE: Paged()})


@torch.no_grad()
def test_a_left_padded_static_cache_compiles_the_step_once():
    model, ids = perturbed_model(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    shapes, expected = [], model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(found, expected)
    assert len(shapes) == 8
    assert len(set(shapes)) == 1  # each other shape would be another graph


@torch.no_grad()
def test_a_mask_without_a_cache_stays_as_it_is():
    mask = torch.ones(2, 5)
    assert ShadowForCausalLM.create_masks_for_generate(attention_mask=mask, cache=None) is mask
    cache = StaticCache(config=perturbed_model().config, max_cache_len=16)
    padded = ShadowForCausalLM.create_masks_for_generate(attention_mask=mask, **{CACHE: cache})
    assert padded.tolist() == [[1.0] * 5 + [0.0] * 11] * 2


@pytest.mark.parametrize("given", [{}, {"repetition_penalty": 1.7}, {"eos_token_id": None}])
def test_mode_base_generates_by_the_models_own_config(given, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers.generation.utils"), "disabled", None in given.values())
    model, ids = perturbed_model().set_mode("base"), tokens(2, 9)
    model.generation_config.repetition_penalty = 4.0
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    found = model.generate(ids, **options, **given)
    expected = model.base.generate(ids, **options, **{"repetition_penalty": 4.0, **given})
    assert torch.equal(found, expected)


# what the model says of itself


@pytest.mark.parametrize("build", [perturbed_model, perturbed_classifier])
def test_blocks_plans_and_precisions_are_those_of_the_networks(build):
    model = build()
    assert "LlamaDecoderLayer" in model._no_split_modules
    assert model._keep_in_fp32_modules is not None
    assert any(key.startswith("base.model.layers") for key in model.tp_plan)
    assert {f"base.{name}" for name in model.base.state_dict()} == model._keys_to_ignore_on_save


def test_the_blocks_of_a_backbone_of_another_architecture_are_named_too(tmp_path):
    tiny_base("qwen3").save_pretrained(tmp_path)
    model = ShadowForCausalLM.from_base(tiny_base(), ShadowConfig(backbone=str(tmp_path)))
    assert {"LlamaDecoderLayer", "Qwen3DecoderLayer"} <= model._no_split_modules


def test_fsdp_finds_the_blocks_of_both_networks():
    from accelerate import FullyShardedDataParallelPlugin

    model = perturbed_model()
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    assert LlamaDecoderLayer in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]


def test_giving_a_base_a_shadow_initializes_nothing_anew():
    base = tiny_base()
    for module in base.modules():  # as after unpickling, where nothing says that it was initialized
        vars(module).pop("_is_hf_initialized", None)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ShadowForCausalLM.from_base(base, ShadowConfig(rank=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


# config


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "opt"])
def test_the_config_says_how_many_positions_there_are(kind, tmp_path):
    model = perturbed_model(kind)
    assert model.config.max_position_embeddings == 128
    model.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).max_position_embeddings == 128


def test_a_backbone_with_fewer_positions_sets_the_limit(tmp_path):
    tiny_base(seed=3, max_position_embeddings=64).save_pretrained(tmp_path)
    model = ShadowForCausalLM.from_base(tiny_base(), ShadowConfig(backbone=str(tmp_path)))
    assert model.config.max_position_embeddings == 64


def test_the_config_names_the_base_before_it_is_saved_and_the_directory_once_it_is_loaded(base_directory, tmp_path):
    base = type(tiny_base()).from_pretrained(base_directory)
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=2))
    assert model.config._name_or_path == model.name_or_path == str(base_directory)
    model.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._name_or_path == loaded.name_or_path == str(tmp_path)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_config_knows_how_the_networks_attend(implementation, base_directory, tmp_path):
    base = type(tiny_base()).from_pretrained(base_directory, attn_implementation=implementation)
    model = ShadowForCausalLM.from_base(base, ShadowConfig(rank=2))
    assert model.config._attn_implementation == implementation
    model.save_pretrained(tmp_path)
    loaded = ShadowForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    found = {each.config._attn_implementation for each in (loaded, loaded.base, loaded.shadow.backbone)}
    assert found == {implementation}
    loaded.set_attn_implementation("eager")
    assert {each.config._attn_implementation for each in (loaded, loaded.base, loaded.shadow.backbone)} == {"eager"}


@pytest.mark.parametrize(("size", "value"), [("n_embd", 48), ("n_layer", 3), ("vocab_size", 101)])
def test_a_base_of_another_size_under_an_attribute_map_is_told_which(size, value, tmp_path):
    perturbed_model("gpt2").save_pretrained(tmp_path)
    name = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}.get(size, size)
    with pytest.raises(CheckpointError, match=f"with {name} .*has {name} {value}"):
        ShadowForCausalLM.from_pretrained(tmp_path, base=tiny_base("gpt2", **{size: value}))


# loading and saving


def test_the_directory_may_be_given_by_its_keyword_and_loading_info_is_returned(tmp_path):
    model = perturbed_model()
    model.save_pretrained(tmp_path)
    loaded, info = ShadowForCausalLM.from_pretrained(
        pretrained_model_name_or_path=tmp_path, base=tiny_base(), output_loading_info=True
    )
    assert torch.equal(loaded(tokens(2, 5)).logits, model(tokens(2, 5)).logits)
    assert info["missing_keys"] == info["unexpected_keys"] == info["mismatched_keys"] == set()


def test_embeddings_can_be_replaced():
    model, embedding, head = perturbed_model(), nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert (model.get_input_embeddings(), model.base.get_input_embeddings()) == (embedding, embedding)
    assert (model.get_output_embeddings(), model.vocab_size) == (head, VOCABULARY)


def test_an_upload_gets_every_keyword(tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(ShadowForCausalLM, "push_to_hub", recorded(ShadowForCausalLM.push_to_hub, uploads))
    hub = {
        "repo_id": "me/mine",
        "private": True,
        "token": "secret",
        "commit_message": "new",
        "commit_description": "text",
        "revision": "branch",
        "create_pr": True,
        "tags": ["shadow"],
    }
    perturbed_model().save_pretrained(tmp_path / "name", push_to_hub=True, max_shard_size="1MB", **hub)
    assert uploads == [{**hub, "max_shard_size": "1MB"}]
    assert set(hub) | {"max_shard_size"} == set(inspect.signature(ShadowForCausalLM.push_to_hub).parameters) - {"self"}
    perturbed_model().save_pretrained(tmp_path / "name", push_to_hub=True)
    assert uploads[1]["repo_id"] == "name"
    perturbed_model().save_pretrained(tmp_path / "name", token="secret", safe_serialization=True)
    assert len(uploads) == 2


def recorded(method, calls):
    """A stand-in for a method, with its signature, that notes the keywords of its calls."""

    def stand_in(self, **kwargs):
        calls.append(kwargs)

    stand_in.__signature__ = inspect.signature(method)
    return stand_in


@pytest.mark.parametrize(
    ("given", "said"),
    [({"privat": True}, "'privat' .did you mean private"), ({"safe_serialization": False}, "safetens")],
)
def test_a_save_with_a_keyword_that_nothing_reads_writes_and_publishes_nothing(given, said, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(ShadowForCausalLM, "push_to_hub", recorded(ShadowForCausalLM.push_to_hub, uploads))
    with pytest.raises(TypeError, match=said):
        perturbed_model().save_pretrained(tmp_path / "out", push_to_hub=True, **given)
    assert not uploads
    assert not (tmp_path / "out").exists()


def test_an_upload_is_private_where_the_hub_is_called(tmp_path, monkeypatch):
    """Through transformers' own ``push_to_hub``, up to the Hub's client."""
    made = []

    class StopError(Exception):
        pass

    def create_repo(self, repo_id, **kwargs):
        made.append((repo_id, kwargs))
        raise StopError

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    with pytest.raises(StopError):
        perturbed_model().save_pretrained(tmp_path, push_to_hub=True, repo_id="me/mine", private=True, token="secret")
    assert (made[0][0], made[0][1]["private"], made[0][1]["token"]) == ("me/mine", True, "secret")


# classifiers on bases without a pad token


def padless():
    torch.manual_seed(0)
    base = tiny_classifier(pad_token_id=None)
    return perturb(ShadowForSequenceClassification.from_base(base, ShadowConfig(rank=4, update_width=3))).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_mode_base_of_a_classifier_reads_padded_batches_without_a_pad_token(side):
    model, ids = padless().set_mode("base"), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, : 3 if side == "left" else None] = 0 if side == "left" else 1
    if side == "right":
        mask[0, -3:] = 0
    found = model(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    alone = [model.base(row[kept.bool()][None]).logits for row, kept in zip(ids, mask, strict=True)]
    torch.testing.assert_close(found.logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, nn.functional.cross_entropy(found.logits, torch.tensor([0, 2])))


@torch.no_grad()
def test_the_detached_form_of_such_a_classifier_has_the_runs_pad_token(tmp_path):
    model, ids = padless(), tokens(2, 9)
    assert model.detached().config.pad_token_id is None
    model.config.pad_token_id = 1  # as training sets it, from its tokenizer
    model.save_pretrained(tmp_path)
    loaded = ShadowForSequenceClassification.from_pretrained(tmp_path, base=model.base)
    ids[0, -3:] = 1
    plain = loaded.detached().eval()
    assert plain.config.pad_token_id == 1
    expected = loaded.set_mode("detached")(ids, attention_mask=(ids != 1).long()).logits
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_threads_do_not_share_what_keywords_are_known():
    """The check of keywords keeps no state: two models of other bases, called at once."""
    models, failures = [perturbed_model(), perturbed_model("gpt2")], []

    def call(model):
        for _ in range(5):
            try:
                model(tokens(1, 5))
            except TypeError as error:
                failures.append(error)

    threads = [threading.Thread(target=call, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
