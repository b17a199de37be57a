"""Shadows that are not at their start, where W_up = 0 hides nearly every mistake."""

from typing import Any

import torch

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.model.modeling import ShadowPreTrainedModel
from tests.support.bases import VOCABULARY, tiny_base, tiny_classifier


def perturb(model: ShadowPreTrainedModel, seed: int = 1, scale: float = 0.3) -> ShadowPreTrainedModel:
    """Add reproducible noise to every trained parameter, so that the shadow changes every output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(scale * noise.to(parameter.dtype))
    return model


def perturbed_model(model_type: str = "llama", seed: int = 1, **settings: Any) -> ShadowForCausalLM:
    """A tiny base with a perturbed shadow, in eval mode; ``settings`` are those of ``ShadowConfig``."""
    settings = {"rank": 4, "update_width": 3, "alpha": 0.7, **settings}
    torch.manual_seed(seed)
    model = ShadowForCausalLM.from_base(tiny_base(model_type), ShadowConfig(**settings))
    return perturb(model, seed).eval()


def perturbed_classifier(model_type: str = "llama", seed: int = 1, **settings: Any) -> ShadowForSequenceClassification:
    """A tiny classifier with a perturbed shadow, in eval mode; ``settings`` are those of ``ShadowConfig``."""
    settings = {"rank": 4, "update_width": 3, "alpha": 0.7, **settings}
    torch.manual_seed(seed)
    model = ShadowForSequenceClassification.from_base(tiny_classifier(model_type), ShadowConfig(**settings))
    return perturb(model, seed).eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Reproducible token ids (rows, length), none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
