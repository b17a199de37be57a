"""The bare base as the reference model of preference training, without a second copy of it."""

from typing import Any

import torch
from transformers import PreTrainedModel

from shadowtune.model.configuration import ShadowModelConfig


class ReferenceModel(PreTrainedModel):
    """Runs the base of a shadow model alone. It has no parameters: a trainer finds none to copy, shard or move.

    Its calls are calls of the shadow model in mode "base". So they work where a trainer has sharded that model, and the
    fused head of TRL's trainers, which these put on both models, is the shadow model's.

    Args:
        model: a ``ShadowForCausalLM`` or ``ShadowForSequenceClassification``.
    """

    config_class = ShadowModelConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.config)
        vars(self)["shadow_model"] = model  # beside the registered modules, which would be parameters of this one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base without gradients; arguments and result are those of the shadow model in mode "base"."""
        model = vars(self)["shadow_model"]
        with torch.no_grad(), model.disable_adapter():
            return model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base, likewise."""
        return self(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """The base's device."""
        device: torch.device = vars(self)["shadow_model"].device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype."""
        dtype: torch.dtype = vars(self)["shadow_model"].base.dtype
        return dtype
