"""Logit ensemble, a baseline: two models' logits are added, z = z_large + gamma z_small (a product of experts).

The same as logit interpolation of a shadow, with two models that were trained separately: LoRA, and a small model.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast

from shadowtune.errors import CheckpointError
from shadowtune.model.files import writing_into

SMALL = "small"
"""Directory of the small model inside that of the large model's adapters."""
_WEIGHT = "ensemble.json"


class LogitEnsemble(nn.Module):
    """A causal language model whose logits are those of ``large`` plus gamma times those of ``small``.

    Args:
        large: a causal language model with adapters of PEFT.
        small: a causal language model with the same vocabulary.
        gamma: weight of the small model's logits.
    """

    def __init__(self, large: Any, small: Any, gamma: float) -> None:
        super().__init__()
        self.large, self.small, self.gamma = large, small, gamma

    @property
    def config(self) -> Any:
        """The large model's config."""
        return self.large.config

    @property
    def generation_config(self) -> Any:
        """The large model's generation config."""
        return self.large.generation_config

    @property
    def device(self) -> torch.device:
        """The large model's device."""
        device: torch.device = self.large.device
        return device

    def forward(self, **inputs: Any) -> CausalLMOutputWithPast:
        """Return the sum of the logits; ``inputs`` are those of both models, without labels."""
        inputs["use_cache"] = False
        logits = self.large(**inputs).logits
        if self.gamma:
            logits = logits + self.gamma * self.small(**inputs).logits
        return CausalLMOutputWithPast(logits=logits)

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """Generate as the large model does, with the small model's logits added before each token is chosen.

        The small model recomputes the whole sequence for each token, so long answers are slower than with a cache.
        """
        processors = LogitsProcessorList([_AddLogits(self.small, self.gamma, attention_mask)] if self.gamma else [])
        tokens: Tensor = self.large.generate(
            input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors, **settings
        )
        return tokens

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model computes its base."""
        gamma, self.gamma = self.gamma, 0.0
        try:
            with self.large.disable_adapter():
                yield
        finally:
            self.gamma = gamma


class _AddLogits(LogitsProcessor):
    """Adds gamma times a model's logits of the next token; ``mask`` (B, T) is that of the prompts."""

    def __init__(self, model: Any, gamma: float, mask: Tensor) -> None:
        self._model, self._gamma, self._mask = model, gamma, mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        fresh = input_ids.shape[1] - self._mask.shape[1]
        mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), fresh)], 1)
        output = self._model(input_ids=input_ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
        return scores + self._gamma * output.logits[:, -1].to(scores.dtype)


def write_weight(directory: Path, gamma: float) -> None:
    """Write the weight of the small model's logits, atomically."""
    with writing_into(directory) as staging:
        (staging / _WEIGHT).write_text(json.dumps({"gamma": gamma}) + "\n")


def read_weight(directory: Path) -> float:
    """Read the weight that ``write_weight`` wrote.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        return float(json.loads((directory / _WEIGHT).read_text())["gamma"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"cannot read {directory / _WEIGHT}: {' '.join(str(error).split())}") from None
