"""The PEFT method computes, trains, saves and loads what the models of this package do."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer

import shadowtune
from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from shadowtune.model.formats.conversion import convert
from shadowtune.peft import ShadowtuneConfig
from tests.support.bases import VOCABULARY, tiny_base, tiny_classifier
from tests.support.runs import arguments, causal_rows, class_rows, snapshot
from tests.support.shadows import perturb, perturbed_classifier, perturbed_model, tokens
from tests.support.tokenizers import tiny_tokenizer

SETTINGS = {"rank": 4, "update_width": 3, "alpha": 0.7, "dropout": 0.0, "shadow_loss_weight": 0.4}


def wrapped(model):
    """A PeftModel with the weights of a model of ours, around a base of its own."""
    task = "CAUSAL_LM" if model.can_generate() else "SEQ_CLS"
    config = ShadowtuneConfig.of(model.config.shadow_config, task_type=task)
    result = get_peft_model(copy.deepcopy(model.base), config)
    for name, module in result.active_model.trained_modules().items():
        module.load_state_dict(model.trained_modules()[name].state_dict())
    return result


def batch_of(rows):
    from shadowtune.data.collate import CausalCollator, ClassificationCollator

    return (ClassificationCollator if isinstance(rows[0]["labels"], int) else CausalCollator)(0)(rows)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("variant", ["paper", "stateless"])
def test_outputs_and_gradients_are_those_of_our_model(kind, variant):
    ours = perturbed_model(kind, **{**SETTINGS, "variant": variant})
    theirs, batch = wrapped(ours), batch_of(causal_rows(4))
    ids = tokens(2, 7)
    assert not torch.equal(ours(ids).logits, ours.set_mode("base")(ids).logits)
    assert torch.equal(ours.set_mode("attached")(ids).logits, theirs.eval()(input_ids=ids).logits)
    outputs = [model.train()(**batch, num_items_in_batch=9) for model in (ours, theirs)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].shadow_loss, outputs[1].shadow_loss)
    for output in outputs:
        output.loss.backward()
    expected, found = gradients(ours), gradients(theirs)
    assert {f"base_model.shadowtune.adapters.default.{name}" for name in expected} == set(found)
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[f"base_model.shadowtune.adapters.default.{name}"]), name


def test_a_classifiers_outputs_and_gradients_are_those_of_ours():
    ours = perturbed_classifier(**SETTINGS)
    theirs, batch = wrapped(ours), batch_of(class_rows(4))
    for model in (ours.train(), theirs.train()):
        model(**batch).loss.backward()
    expected, found = gradients(ours), gradients(theirs)
    assert {"score.weight", "shadow_score.weight"} < set(expected)
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[f"base_model.shadowtune.adapters.default.{name}"]), name
    assert torch.equal(ours.eval()(tokens(2, 7)).logits, theirs.eval()(input_ids=tokens(2, 7)).logits)


def test_the_base_stays_as_it_is_and_runs_alone_while_adapters_are_disabled():
    ours, ids = perturbed_model(**SETTINGS), tokens(2, 7)
    theirs, bare = wrapped(ours), copy.deepcopy(ours.base)
    assert theirs.active_model.training
    assert not theirs.get_base_model().training
    theirs.eval()
    expected = bare(ids).logits
    with theirs.disable_adapter():
        assert torch.equal(theirs(input_ids=ids).logits, expected)
        assert all(p.requires_grad for n, p in theirs.named_parameters() if ".adapters." in n)
    assert not torch.equal(theirs(input_ids=ids).logits, expected)
    base = theirs.get_base_model()
    assert torch.equal(base(ids).logits, expected)
    assert base.state_dict().keys() == bare.state_dict().keys()
    assert theirs.unload() is base


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"speculate": 3}])
def test_generation_is_that_of_our_model(options):
    ours = perturbed_model(**SETTINGS)
    theirs, ids = wrapped(ours).eval(), tokens(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, **options}
    assert torch.equal(ours.generate(**inputs), theirs.generate(**inputs))
    with theirs.disable_adapter():
        plain = {name: value for name, value in inputs.items() if name != "speculate"}
        assert torch.equal(theirs.generate(**plain), ours.base.generate(**plain))
    assert torch.equal(theirs.detached()(ids).logits, ours.detached()(ids).logits)


def test_an_adapter_for_each_row_is_refused():
    model, ids = wrapped(perturbed_model(**SETTINGS)), tokens(2, 5)
    for run in (model, model.generate):
        with pytest.raises(ConfigError, match="set_adapter"):
            run(input_ids=ids, adapter_names=["default", "__base__"])


def test_weights_on_the_meta_device_are_refused():
    with pytest.raises(ConfigError, match="low_cpu_mem_usage"):
        get_peft_model(tiny_base(), ShadowtuneConfig.of(ShadowConfig(**SETTINGS)), low_cpu_mem_usage=True)


def test_merging_is_refused_with_the_way_out():
    model = wrapped(perturbed_model(**SETTINGS))
    for merge in (model.merge_and_unload, model.merge_adapter, perturbed_model().merge_and_unload):
        with pytest.raises(ConfigError, match=r"depends on the input.*detached\(\)"):
            merge()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    ours = perturbed_model(**SETTINGS, variant="stateless", inject_first=True)
    found, batch = [], batch_of(causal_rows(4))
    for checkpointed in (False, True):
        theirs = wrapped(ours)
        if checkpointed:
            theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            theirs.enable_input_require_grads()
            assert theirs.active_model.shadow.backbone.is_gradient_checkpointing
        theirs.train()(**batch).loss.backward()
        found.append(gradients(theirs))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


# Trainer


def trainer(model, path, **settings):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in causal_rows()]
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "prediction_loss_only": False, **settings}
    return Trainer(
        model,
        args=arguments(path, **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        compute_metrics=lambda found: {"shape": np.shape(found.predictions)[-1]},
    )


def test_a_resumed_training_ends_as_one_that_was_not_interrupted(tmp_path):
    ends = []
    for resumed in (False, True):
        model = wrapped(perturbed_model(**SETTINGS))
        model.base_model.shadowtune.requires_grad_(True)
        run = trainer(model, tmp_path)
        run.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if resumed else None)
        ends.append(snapshot(model.base_model.shadowtune))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_predictions_are_the_logits_alone(tmp_path):
    run = trainer(wrapped(perturbed_model(**SETTINGS)), tmp_path, save_strategy="no")
    assert run.evaluate()["eval_shape"] == VOCABULARY


def test_a_trainer_that_takes_the_labels_out_or_ignores_the_schedule_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        trainer(wrapped(perturbed_model(**SETTINGS)), tmp_path, label_smoothing_factor=0.1).train()
    with pytest.raises(ConfigError, match="shadow_loss_weight_end"):
        trainer(wrapped(perturbed_model(**SETTINGS, shadow_loss_weight_end=0.1)), tmp_path).train()


# files


@pytest.fixture
def saved(tmp_path):
    """A base, a perturbed shadow beside it, and both as an adapter of PEFT."""
    tiny_base().save_pretrained(tmp_path / "base")
    base = type(tiny_base()).from_pretrained(tmp_path / "base")
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(**SETTINGS))).eval()
    theirs = wrapped(model)
    theirs.active_model.set_logit_interpolation(0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path, theirs.eval()


def test_saved_adapters_load_in_every_way(saved):
    path, model = saved
    ids = tokens(2, 7)
    expected = model(input_ids=ids).logits
    values = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert values["peft_type"] == "SHADOWTUNE"
    assert "import shadowtune.peft" in values["library"]
    assert (values["r"], values["shadow_alpha"], values["auxiliary_loss_weight"]) == (4, 0.7, 0.4)
    base = tiny_base()
    loaded = PeftModel.from_pretrained(base, path / "adapter")
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    automatic = AutoPeftModelForCausalLM.from_pretrained(path / "adapter")
    assert torch.equal(automatic(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="get_peft_model"):  # transformers injects layers
        AutoModelForCausalLM.from_pretrained(path / "adapter")
    ours = ShadowForCausalLM.from_pretrained(path / "adapter", base=base)
    assert torch.equal(ours(ids).logits, expected)
    trainable = PeftModel.from_pretrained(base, path / "adapter", is_trainable=True)
    assert trainable.get_nb_trainable_parameters()[0] > 0


def test_adapters_convert_to_our_directory_and_back(saved):
    path, model = saved
    convert(str(path / "adapter"), path / "ours", "shadowtune")
    convert(str(path / "ours"), path / "again", "shadowtune-peft")
    again = PeftModel.from_pretrained(tiny_base(), path / "again")
    ids = tokens(2, 7)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_another_base_is_refused_unless_asked_for(saved):
    path, _ = saved
    other = tiny_base(seed=5)
    with pytest.raises(CheckpointError, match="wrong base"):
        PeftModel.from_pretrained(other, path / "adapter")
    with pytest.raises(CheckpointError, match="wrong base"):
        ShadowForCausalLM.from_pretrained(path / "adapter", base=other)
    config = PeftConfig.from_pretrained(path / "adapter")
    config.check_base_weights = False
    PeftModel.from_pretrained(other, path / "adapter", config=config)


def test_a_damaged_adapter_is_an_error(saved):
    path, _ = saved
    from safetensors.torch import load_file, save_file

    file = path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=name.removeprefix("base_model.shadowtune.")):
        PeftModel.from_pretrained(tiny_base(), path / "adapter")


def test_several_adapters_are_switched_saved_and_deleted(saved):
    path, model = saved
    ids = tokens(2, 7)
    first = model(input_ids=ids).logits
    model.add_adapter("other", ShadowtuneConfig.of(ShadowConfig(**SETTINGS)))
    assert torch.equal(model(input_ids=ids).logits, first)
    model.set_adapter("other")
    perturb(model.active_model, seed=7)
    second = model(input_ids=ids).logits
    assert not torch.equal(first, second)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".other." in name for name in trained)
    model.save_pretrained(path / "both")
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, first)
    loaded = PeftModel.from_pretrained(tiny_base(), path / "both")
    loaded.load_adapter(path / "both" / "other", "mine")
    loaded.set_adapter("mine")
    assert torch.equal(loaded(input_ids=ids).logits, second)
    model.delete_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, second)


def test_an_adapter_of_the_same_config_is_a_copy(saved):
    """As TRL makes the reference of an adapter that is trained further."""
    _, model = saved
    ids = tokens(2, 7)
    expected = model(input_ids=ids).logits
    model.add_adapter("ref", model.peft_config["default"])
    perturb(model.active_model, seed=9)
    model.set_adapter("ref")
    assert torch.equal(model(input_ids=ids).logits, expected)


# configs


def test_settings_go_by_the_names_of_peft():
    theirs = peft.ShadowConfig(r=6, shadow_alpha=0.3, shadow_num_hidden_layers=2, auxiliary_loss_weight=0.2)
    ours = ShadowConfig.from_peft(theirs)
    assert (ours.rank, ours.alpha, ours.num_shadow_layers, ours.shadow_loss_weight) == (6, 0.3, 2, 0.2)
    assert (ours.update_width, ours.activation, ours.inject_first) == (6, "gelu", True)
    assert ShadowConfig.from_peft(peft.ShadowConfig(**ours.to_peft())) == ours
    with pytest.raises(ConfigError, match="variant='stateless'"):
        ShadowConfig.recommended().to_peft()
    with pytest.raises(ConfigError, match="layers_to_transform"):
        ShadowConfig.from_peft(peft.ShadowConfig(layers_to_transform=[1], layers_pattern="layers"))
    with pytest.raises(ConfigError, match="another method"):
        ShadowConfig.from_peft(peft.LoraConfig())


def test_the_defaults_are_the_recommended_settings():
    assert ShadowtuneConfig().settings == ShadowConfig.recommended()
    assert ShadowtuneConfig(r=8).settings == ShadowConfig.recommended(rank=8)
    assert ShadowtuneConfig(shadow_model="x").settings.init_layers is None
    assert ShadowtuneConfig.of(ShadowConfig()).settings == ShadowConfig()
    with pytest.raises(ConfigError, match="rank"):
        ShadowtuneConfig(r=0)
    with pytest.raises(ConfigError, match="TOKEN_CLS"):
        ShadowtuneConfig(task_type="TOKEN_CLS")


def test_get_shadow_model_reads_as_peft_does(capsys):
    model = shadowtune.get_shadow_model(tiny_base(), peft.ShadowConfig(r=4))
    assert isinstance(model, ShadowForCausalLM)
    assert isinstance(shadowtune.get_shadow_model(tiny_classifier()), ShadowForSequenceClassification)
    perturb(model).eval().print_trainable_parameters()
    trained, every = model.get_nb_trainable_parameters()
    assert f"trainable params: {trained:,d} || all params: {every:,d}" in capsys.readouterr().out
    ids = tokens(2, 7)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, model.base(ids).logits)
    assert not torch.equal(model(ids).logits, model.base(ids).logits)


def flip_a_bit(file):
    """Change one bit of the last number of a tensor file."""
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.unlink()  # tensors that were read before are views of the old file
    file.write_bytes(content)


@pytest.mark.parametrize("converted", [False, True])
def test_a_flipped_bit_is_an_error_in_every_way_of_loading(saved, converted):
    path, _ = saved
    directory = path / "adapter"
    if converted:
        convert(str(path / "adapter"), path / "ours", "shadowtune")
        convert(str(path / "ours"), path / "again", "shadowtune-peft")
        directory = path / "again"
    PeftModel.from_pretrained(tiny_base(), directory)
    flip_a_bit(directory / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        PeftModel.from_pretrained(tiny_base(), directory)
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        ShadowForCausalLM.from_pretrained(directory, base=tiny_base())


def test_a_checksum_is_that_of_the_last_save(saved):
    path, _ = saved
    loaded = PeftModel.from_pretrained(tiny_base(), path / "adapter", is_trainable=True)
    perturb(loaded.active_model, seed=11)
    loaded.save_pretrained(path / "later")
    loaded.load_adapter(path / "adapter", "default")  # as a trainer resumes
    PeftModel.from_pretrained(tiny_base(), path / "later")
    averaged = peft.get_peft_model_state_dict(loaded)
    peft.set_peft_model_state_dict(loaded, {name: tensor / 2 for name, tensor in averaged.items()})


@pytest.mark.parametrize("resize", ["get_base_model", "active_model", "base"])
def test_an_adapter_of_a_resized_base_records_that_base(tmp_path, resize):
    tiny_base().save_pretrained(tmp_path / "small")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    model = get_peft_model(base, ShadowtuneConfig.of(ShadowConfig(**SETTINGS))).eval()
    perturb(model.active_model)
    target = {"get_base_model": model.get_base_model(), "active_model": model.active_model, "base": base}[resize]
    target.resize_token_embeddings(VOCABULARY + 7)
    ids = torch.tensor([[VOCABULARY + 6, 5]])
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "resized")
    resized = type(tiny_base()).from_pretrained(tmp_path / "resized")
    assert torch.equal(PeftModel.from_pretrained(resized, tmp_path / "adapter")(input_ids=ids).logits, expected)
    assert torch.equal(ShadowForCausalLM.from_pretrained(tmp_path / "adapter", base=resized)(ids).logits, expected)
    with pytest.raises(CheckpointError, match=r"vocab_size 104, but .* has vocab_size 97"):
        PeftModel.from_pretrained(tiny_base(), tmp_path / "adapter")


def test_a_shadow_model_as_base_is_refused_with_the_way_out():
    for make in (
        lambda: ShadowForCausalLM.from_base(perturbed_model()),
        lambda: get_peft_model(perturbed_model(), ShadowtuneConfig.of(ShadowConfig(**SETTINGS))),
    ):
        with pytest.raises(ConfigError, match=r"ShadowForCausalLM, which has a base itself; pass that: model\.base"):
            make()


def test_a_wrapped_base_is_refused_with_the_way_out():
    lora = get_peft_model(tiny_base(), peft.LoraConfig(target_modules=["q_proj"]))
    shadow = get_peft_model(tiny_base(), ShadowtuneConfig.of(ShadowConfig(**SETTINGS)))
    model = perturbed_model()
    for base in (lora, shadow):
        for make in (
            lambda base=base: ShadowForCausalLM.from_base(base),
            lambda base=base: shadowtune.get_shadow_model(base),
            lambda base=base: shadowtune.attach(base, model.shadow),
        ):
            with pytest.raises(ConfigError, match=r"PeftModel.*, which is not .*base\.unload\(\)"):
                make()


def test_a_model_without_its_head_is_no_base():
    with pytest.raises(UnsupportedArchitectureError, match="a model with its task head, of AutoModelForCausalLM"):
        shadowtune.get_shadow_model(tiny_base().model)
