"""Adapters made by the real libraries, perturbed and saved, and the logits that these libraries give."""

from pathlib import Path
from typing import Any

import peft
import shadow_peft
import torch

from tests.support.bases import fill, tiny_base, tiny_classifier
from tests.support.shadows import tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def batch(right_padding: bool = False) -> dict[str, torch.Tensor]:
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    if right_padding:
        ids[1, 7:], mask[1, 7:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def base_for(task: str, model_type: str, directory: Path | None = None) -> Any:
    base = tiny_base(model_type) if task == "causal_lm" else tiny_classifier(model_type)
    if directory is not None:
        base.save_pretrained(directory)
    return base


def _randomize(module: torch.nn.Module) -> None:
    fill(module, seed=7)


def shadow_peft_adapter(
    directory: Path, model_type: str = "llama", task: str = "causal_lm", shadow_model: Any = None, **settings: Any
) -> tuple[Any, Any]:
    """Save a perturbed adapter of shadow-peft; return attached and detached logits of the model that was saved."""
    values = {"injection_hidden_size": 4, "gate_hidden_size": 3, "alpha": 0.7, **settings}
    inner = shadow_peft.get_shadow_model(
        base_for(task, model_type), shadow_peft.ShadowConfig(**values), shadow_model=shadow_model
    )
    for name in ("shadow_model", "shadow_hidden_projection", "shadow_injection_model", "shadow_update_model"):
        _randomize(inner.get_submodule(name))
    model = _wrap_shadow_peft(inner, task)
    if task == "classification":
        _randomize(model.shadow_classifier_head)
        with torch.no_grad():
            model.classifier_head.weight.mul_(-1.5)
    model.eval().save_pretrained(directory)
    return shadow_peft_logits(model, task)


def _wrap_shadow_peft(inner: Any, task: str) -> Any:
    kind = shadow_peft.ShadowForCausalLM if task == "causal_lm" else shadow_peft.ShadowForSequenceClassification
    return kind(inner)


@torch.no_grad()
def shadow_peft_logits(model: Any, task: str = "causal_lm") -> tuple[Any, Any]:
    output = model(**batch(task == "classification"))
    return output.logits, output.shadow_logits


def load_shadow_peft(
    directory: Path, model_type: str = "llama", task: str = "causal_lm", shadow_model: Any = None
) -> Any:
    kind = shadow_peft.ShadowForCausalLM if task == "causal_lm" else shadow_peft.ShadowForSequenceClassification
    model = kind.from_pretrained(base_for(task, model_type), str(directory), shadow_model=shadow_model)
    return shadow_peft_logits(model.eval(), task)


def peft_adapter(
    directory: Path, base: Path, model_type: str = "llama", task: str = "causal_lm", **settings: Any
) -> tuple[Any, Any]:
    """Save a perturbed adapter of PEFT beside ``base``, which is saved too; return its logits."""
    values = {"r": 4, "update_hidden_size": 3, "shadow_alpha": 0.7, **settings}
    base_for(task, model_type, base)
    kind = type(base_for(task, model_type))
    extra = {} if task == "causal_lm" else {"num_labels": 3}
    config = peft.ShadowConfig(task_type="CAUSAL_LM" if task == "causal_lm" else "SEQ_CLS", **values)
    model = peft.get_peft_model(kind.from_pretrained(base, **extra), config)
    with torch.no_grad():
        for index, parameter in enumerate(p for n, p in model.named_parameters() if "shadow_" in n or p.requires_grad):
            generator = torch.Generator().manual_seed(index)
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(directory)
    return peft_logits(model, task)


@torch.no_grad()
def peft_logits(model: Any, task: str = "causal_lm") -> tuple[Any, Any]:
    inputs = batch(task == "classification")
    return model(**inputs).logits, model.base_model.unload_shadow()(**inputs).logits


def load_peft(directory: Path, base: Any, task: str = "causal_lm") -> tuple[Any, Any]:
    return peft_logits(peft.PeftModel.from_pretrained(base, directory).eval(), task)


def ours(model: Any, task: str = "causal_lm") -> tuple[Any, Any]:
    inputs = batch(task == "classification")
    with torch.no_grad():
        attached = model.set_mode("attached")(**inputs).logits
        return attached, model.set_mode("detached")(**inputs).logits


def assert_same(actual: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def small(directory, **sizes):
    """Save a small base in ``directory`` and return its path."""
    tiny_base(seed=5, **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, **sizes}).save_pretrained(
        directory
    )
    return str(directory)
