"""A shadow that is served: its own slots, its drafts, its prompts."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.config.speculation import SpeculationConfig
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.generation import configured_ends, ends_of_config
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.serving.engine.drafting import Drafting, Text
from shadowtune.serving.engine.slots import Slots

LOG = logging.getLogger(__name__)


class Adapter:
    """One model beside the base.

    Args:
        name: what requests call it.
        model: the attached model.
        prompt_format: of its prompts; None is the tokenizer's chat template alone.
        base: the base that it must share.
        speculation: how it drafts; None if it does not.

    Raises:
        ConfigError: if the model has a base of its own.
        UnsupportedArchitectureError: if its backbone cannot be served in batches.
    """

    def __init__(
        self,
        name: str,
        model: ShadowForCausalLM,
        prompt_format: PromptFormat | None,
        base: PreTrainedModel,
        speculation: SpeculationConfig | None,
    ) -> None:
        if model.base is not base:
            raise ConfigError(
                f"{name!r} has a base of its own, and an engine serves one; load it with "
                "ShadowForCausalLM.from_pretrained(path, base=base)"
            )
        self.name, self.model, self.prompt_format = name, model.eval(), prompt_format or PromptFormat()
        self.created = int(time.time())
        self.boundaries = model.shadow.boundaries
        backbone = model.shadow.backbone
        self.slots = Slots(backbone.config, backbone.dtype, base.device)
        self.drafting = None if speculation is None else Drafting(model, speculation)
        self.feeds_back = model.shadow.draft_fusion is not None
        self.positions = positions_of(backbone.config)
        self._served = ExitStack()
        self._served.enter_context(prepacked_linear(model.shadow))

    @property
    def runs_backbone(self) -> bool:
        """Whether a pass needs this shadow's backbone: for the attached model's output, or for drafts to come."""
        return self.boundaries.reads_states or self.drafting is not None

    @cached_property
    def finite(self) -> bool:
        """Whether no weight is NaN or infinite; looked at before the first pass."""
        finite = all(bool(parameter.isfinite().all()) for parameter in self.model.shadow.parameters())
        if not finite:
            LOG.warning("adapter %r has weights that are NaN or infinite; its answers fail", self.name)
        return finite

    def close(self) -> None:
        """Give the model back as it was."""
        self._served.close()

    def initial_states(self, rows: Sequence[Text], tokens: Sequence[Sequence[int]], seen: int = 0) -> Tensor:
        """Run the shadow's backbone.

        Args:
            rows: B of this adapter's.
            tokens: the next ones of each row, of which T is the most.
            seen: tokens of each that it has seen since those in ``Text.cached``.

        Returns:
            s0 (B, T, d).
        """
        shadow, base = self.model.shadow, self.model.base
        counts = [min(len(line), max(1, row.room - row.cached - seen)) for row, line in zip(rows, tokens, strict=True)]
        ids = padded(tokens, base.device)
        inputs = self.slots.inputs(rows, [row.cached + seen for row in rows], counts, ids.shape[1])
        return shadow.initial_states(ids, base.get_input_embeddings()(ids), **inputs)


def padded(tokens: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return token ids (B, T), padded behind with 0."""
    width = max(len(line) for line in tokens)
    return torch.tensor([[*line, *[0] * (width - len(line))] for line in tokens], device=device)


def ends_of(
    config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None = None, recorded: Sequence[int] = ()
) -> frozenset[int]:
    """Return the tokens that end an answer.

    Args:
        config: of the model.
        tokenizer: its end-of-sequence token ends answers of a model with nothing recorded.
        recorded: ``PromptFormat.ends`` of the model.
    """
    return frozenset(configured_ends(config) if tokenizer is None else ends_of_config(config, tokenizer, recorded))


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a network has positions for; None if its config does not say."""
    text = config.get_text_config(decoder=True)
    known = text.to_dict().get(text.attribute_map.get("max_position_embeddings", "max_position_embeddings"))
    return known if isinstance(known, int) else None
