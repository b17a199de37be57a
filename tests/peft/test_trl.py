"""TRL's trainers with the PEFT method: the base is the reference, and lambda is never lost."""

import inspect

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from shadowtune import ShadowConfig, ShadowForCausalLM, train_in_stages
from shadowtune.errors import ConfigError
from shadowtune.peft import ShadowtuneConfig
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.runs import snapshot
from tests.support.tokenizers import tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, about its own defaults

SETTINGS = ShadowConfig.recommended(rank=4)
PROMPTS = [f"add {index} and {index}" for index in range(8)]
DATA = {
    "sft": [{"prompt": text, "completion": " yes"} for text in PROMPTS],
    "dpo": [{"prompt": text, "chosen": " yes", "rejected": " no way"} for text in PROMPTS],
    "kto": [{"prompt": text, "completion": " yes", "label": bool(i % 2)} for i, text in enumerate(PROMPTS)],
    "grpo": [{"prompt": text} for text in PROMPTS],
    "chats": [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": " yes"}]} for text in PROMPTS
    ],
    "questions": [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS],
}


def quiet(kind, path, **settings):
    common = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": []}
    common |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return kind(output_dir=str(path / "out"), **{**common, **settings})


def make(kind, path, model=None, peft_config=None, **settings):
    """A trainer of a tiny base, with a new adapter unless a model is given."""
    if model is None:
        model, peft_config = tiny_base(), peft_config or ShadowtuneConfig.of(SETTINGS)
    given = {
        "processing_class": tiny_tokenizer(),
        "train_dataset": Dataset.from_list(DATA["grpo" if kind == "rloo" else kind]),
    }
    if kind == "sft":
        return SFTTrainer(model, args=quiet(SFTConfig, path, **settings), peft_config=peft_config, **given)
    if kind == "dpo":
        return DPOTrainer(model, args=quiet(DPOConfig, path, **settings), peft_config=peft_config, **given)
    if kind == "kto":
        return KTOTrainer(model, args=quiet(KTOConfig, path, **settings), peft_config=peft_config, **given)
    options = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, **settings}
    if kind == "rloo":
        return RLOOTrainer(
            model, reward_even, args=quiet(RLOOConfig, path, **options), peft_config=peft_config, **given
        )
    return GRPOTrainer(model, reward_even, args=quiet(GRPOConfig, path, **options), peft_config=peft_config, **given)


def reward_even(completions, **kwargs):
    """Reward of the first, third, ... completion."""
    return [float(index % 2) for index in range(len(completions))]


def changed(before, model):
    return {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_trainers_train_boundaries_and_shadow_and_leave_the_base(kind, tmp_path):
    trainer = make(kind, tmp_path)
    before = snapshot(trainer.model)
    trainer.train()
    names = changed(before, trainer.model)
    assert any(".boundaries." in name for name in names)
    assert any(".backbone." in name for name in names)
    assert all(".adapters." in name for name in names)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_reference_is_the_base_itself(kind, tmp_path):
    trainer = make(kind, tmp_path)
    assert trainer.ref_model is None
    bases = {id(p) for p in trainer.model.parameters() if p.shape == torch.Size([97, 32])}
    assert len(bases) == len({id(p) for p in tiny_base().parameters() if p.shape == torch.Size([97, 32])})


@pytest.mark.parametrize("mode", ["attached", "detached"])
def test_the_gradient_of_sft_is_that_of_the_models_own_loss(mode, tmp_path):
    trainer = make("sft", tmp_path, gradient_checkpointing=False)
    model = trainer.model.train()
    model.set_mode(mode)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "injection_ups" in name:
                parameter.normal_(std=0.02)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    found = []
    for loss in (lambda: model(**batch).loss, lambda: trainer.compute_loss(model, dict(batch))):
        loss().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_an_adapter_that_is_trained_further_is_its_own_reference(tmp_path):
    model = get_peft_model(tiny_base(), ShadowtuneConfig.of(SETTINGS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    trainer = make("dpo", tmp_path, model=model)
    assert list(model.peft_config) == ["default", "ref"]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses == [] or losses[0] == pytest.approx(0.693, abs=0.2)
    ids = torch.arange(5, 12)[None]
    trained = model(input_ids=ids).logits
    model.set_adapter("ref")
    assert not torch.equal(model(input_ids=ids).logits, trained)


def test_dpo_credits_the_shadow_as_it_credits_the_attached_model(tmp_path):
    """At equal log-probabilities the shadow's gradient is lambda times that of its own DPO loss."""
    trainer = make("dpo", tmp_path, gradient_checkpointing=False)
    model = trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(model, batch).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and ".backbone." in n}
    model.zero_grad()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = model.set_mode("detached")(**inputs).logits[:, :-1].log_softmax(-1)
    log_probs = logits.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * (labels[:, 1:] != -100)
    chosen, rejected = log_probs.sum(1).chunk(2)
    weight = 0.5 * trainer.beta  # of the sigmoid where attached model and reference are equal
    (-weight * (chosen - rejected)).mean().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


REFUSED = {
    "orpo": (ORPOTrainer, ORPOConfig, "dpo", {"max_length": 40}),
    "cpo": (CPOTrainer, CPOConfig, "dpo", {"max_length": 40}),
    "gkd": (GKDTrainer, GKDConfig, "chats", {"max_new_tokens": 6, "max_length": 64}),
    "distillation": (DistillationTrainer, DistillationConfig, "questions", {"max_completion_length": 6}),
    "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig, "grpo", {"max_new_tokens": 6, "max_length": 64}),
}
"""Trainers that compute their loss from logits or hidden states."""


def refused(kind, path, model, peft_config):
    trainer, config, data, settings = REFUSED[kind]
    given = {"processing_class": tiny_tokenizer(), "train_dataset": Dataset.from_list(DATA[data])}
    if "teacher_model" in inspect.signature(trainer).parameters:
        given["teacher_model"] = tiny_base(seed=3)
    if kind == "online_dpo":
        given["reward_funcs"] = reward_even
    return trainer(model, args=quiet(config, path, **settings), peft_config=peft_config, **given)


@pytest.mark.parametrize("kind", list(REFUSED))
def test_trainers_that_would_lose_lambda_are_errors(kind, tmp_path):
    with pytest.raises(ConfigError, match="Distillation"):
        refused(kind, tmp_path, tiny_base(), ShadowtuneConfig.of(SETTINGS)).train()


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_distillation_trains_a_model_only_without_lambda(weight, tmp_path):
    settings = ShadowConfig.recommended(rank=4, shadow_loss_weight=weight)
    trainer = refused("distillation", tmp_path, ShadowForCausalLM.from_base(tiny_base(), settings), None)
    before = snapshot(trainer.model)
    if weight:
        with pytest.raises(ConfigError, match="Distillation"):
            trainer.train()
    else:
        trainer.train()
        assert {name.split(".")[1] for name in changed(before, trainer.model)} == {"boundaries"}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trainers_switch_dropout_off(kind, tmp_path):
    config = ShadowtuneConfig.of(ShadowConfig.recommended(rank=4, dropout=0.5))
    model = make(kind, tmp_path, peft_config=config).model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "injection_ups" in name:
                parameter.normal_(std=0.1)
        ids = torch.arange(5, 12)[None]
        expected, found = model.eval()(input_ids=ids).logits, model.train()(input_ids=ids).logits
    assert torch.equal(expected, found) == (kind == "dpo")  # whose disable_dropout is true by default


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_reward_model_trains_only_without_lambda(weight, tmp_path):
    rows = [{"chosen": f"{text} yes", "rejected": f"{text} no"} for text in PROMPTS]
    config = ShadowtuneConfig.of(ShadowConfig.recommended(rank=4, shadow_loss_weight=weight), task_type="SEQ_CLS")
    trainer = RewardTrainer(
        tiny_classifier(num_labels=1),
        args=quiet(RewardConfig, tmp_path),
        processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(rows),
        peft_config=config,
    )
    before = snapshot(trainer.model)
    if weight:
        with pytest.raises(ConfigError, match="Reward"):
            trainer.train()
    else:
        trainer.train()
        assert any("score" in name for name in changed(before, trainer.model))


@pytest.mark.parametrize(
    "settings",
    [{"distillation_weight": 0.5}, {"matching_weight": 0.5}, {"draft_rank": 4}, {"shadow_loss_weight_end": 0.1}],
)
def test_terms_that_a_trainer_would_drop_are_errors(settings, tmp_path):
    name = next(iter(settings))
    with pytest.raises(ConfigError, match=name):
        make("sft", tmp_path, peft_config=ShadowtuneConfig.of(ShadowConfig.recommended(rank=4, **settings))).train()


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_one_call_trains_in_stages(kind, tmp_path):
    base = tiny_base()
    model = ShadowForCausalLM.from_base(base, SETTINGS) if kind == "ours" else None
    trainer = make("sft", tmp_path, model=model)
    trainer.eval_dataset = trainer.train_dataset
    inner = trainer.model if kind == "ours" else trainer.model.active_model
    steps = []
    before = snapshot(inner.shadow)
    original = inner.freeze_unused
    inner.freeze_unused = lambda: (steps.append(changed(before, inner.shadow)), original())
    entries = train_in_stages(trainer, shadow_epochs=0.5)
    assert steps[0]
    assert all(name.startswith("backbone.") for name in steps[0])
    alone = {name for name in changed(before, inner.shadow) if name not in steps[0]}
    assert alone
    assert all(name.startswith("boundaries.") for name in alone)
    assert entries["steps"] == 2
    assert "fit_seconds" in entries
    assert inner.mode == "attached"
    assert inner.shadow.config.shadow_loss_weight == 1.0
    assert all(parameter.requires_grad for parameter in inner.shadow.parameters())


def test_drafts_are_used_in_grpo_where_asked(tmp_path, monkeypatch):
    from shadowtune.model.speculation.decoding import Speculator

    used = []
    original = Speculator.__call__
    monkeypatch.setattr(
        Speculator, "__call__", lambda self, *args, **kwargs: used.append(1) or original(self, *args, **kwargs)
    )
    make("grpo", tmp_path).train()
    assert not used
    make("grpo", tmp_path, generation_kwargs={"speculate": True}).train()
    assert used


@pytest.mark.parametrize("given", ["base", "reference"])
def test_without_peft_the_base_is_passed_as_the_reference(given, tmp_path):
    model = ShadowForCausalLM.from_base(tiny_base(), SETTINGS)
    args = quiet(DPOConfig, tmp_path, gradient_checkpointing=False)
    dataset = Dataset.from_list(DATA["dpo"])
    trainer = DPOTrainer(
        model,
        ref_model=model.base if given == "base" else model.reference(),
        args=args,
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(model.train(), batch)
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)  # boundaries start at zero: model and reference are equal
    before = snapshot(model)
    trainer.train()
    assert all(name.startswith("shadow.") for name in changed(before, model))
    assert changed(before, model)


def test_mode_base_is_the_base_under_the_fused_head_too(tmp_path):
    trainer = make("sft", tmp_path, model=ShadowForCausalLM.from_base(tiny_base(), SETTINGS))
    model = trainer.model.eval()
    with torch.no_grad():
        model.shadow.boundaries.injection_ups.normal_()
    ids = torch.arange(5, 12)[None]
    with torch.no_grad(), model.disable_adapter():
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        logits = model.base(ids).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(found, logits.gather(2, ids[:, 1:, None])[..., 0])
