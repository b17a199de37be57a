"""An adapter while it is served: its key-value cache, its drafter, its prompt format."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.serving.engine.drafting import BatchDrafter, SequenceState
from shadowtune.serving.engine.kv_cache import KVCache
from shadowtune.serving.engine.learning import DraftHeadLearner

LOG = logging.getLogger(__name__)


class Adapter:
    """One attached model beside the base.

    Args:
        name: by which requests name it.
        model: the attached model.
        prompt_format: of its prompts; None is the tokenizer's chat template alone.
        base: the base that it must share.
        speculation: how it drafts; None never drafts.

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
        self.cache = KVCache(backbone.config, backbone.dtype, base.device)
        self.drafter = None if speculation is None else BatchDrafter(model, speculation)
        self.needs_last_hidden = model.shadow.draft_head is not None
        self.max_positions = max_positions(backbone.config)
        self._contexts = ExitStack()
        self._contexts.enter_context(prepacked_linear(model.shadow))
        self.learner: DraftHeadLearner | None = None
        """Trains the draft head; None if it does not learn."""

    @property
    def runs_backbone(self) -> bool:
        """Whether a pass needs this shadow's backbone: for the attached model's output, or for later drafts."""
        return self.boundaries.reads_states or self.drafter is not None

    @cached_property
    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        finite = all(bool(parameter.isfinite().all()) for parameter in self.model.shadow.parameters())
        if not finite:
            LOG.warning("adapter %r has weights that are NaN or infinite; its answers fail", self.name)
        return finite

    def learn_in(self, directory: Path) -> None:
        """Let the draft head learn from the answers, in a directory of all adapters; if it cannot, log one line."""
        if self.drafter is None or not self.needs_last_hidden:
            LOG.warning(
                "adapter %r does not learn: it has no draft head (shadow.draft_rank), or never drafts", self.name
            )
            return
        try:
            own = directory / quote(self.name, safe="")
            self.learner = DraftHeadLearner(self.name, self.model, own, self._repack)
        except CheckpointError as error:
            LOG.warning("adapter %r answers without learning: %s", self.name, error)

    def _repack(self) -> None:
        """Drop copies of the weights, after a change of them."""
        self._contexts.close()
        self._contexts.enter_context(prepacked_linear(self.model.shadow))

    def close(self) -> None:
        """Undo the prepacking of the model's linear layers, and save what the draft head learned from."""
        self._contexts.close()
        if self.learner is not None:
            self.learner.close()

    def initial_states(
        self, sequences: Sequence[SequenceState], tokens: Sequence[Sequence[int]], seen: int = 0
    ) -> Tensor:
        """Run the shadow's backbone.

        Args:
            sequences: B of this adapter's.
            tokens: the next tokens of each sequence; T is the longest.
            seen: tokens that the backbone has processed since ``SequenceState.cached``.

        Returns:
            s0 (B, T, d).
        """
        shadow, base = self.model.shadow, self.model.base
        rooms = [max(1, sequence.max_length - sequence.cached - seen) for sequence in sequences]
        counts = [min(len(line), room) for line, room in zip(tokens, rooms, strict=True)]
        ids = pad_right(tokens, base.device)
        starts = [sequence.cached + seen for sequence in sequences]
        inputs = self.cache.inputs(sequences, starts, counts, ids.shape[1])
        return shadow.initial_states(ids, base.get_input_embeddings()(ids), **inputs)


def pad_right(tokens: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return token ids (B, T), right-padded with 0."""
    width = max(len(line) for line in tokens)
    return torch.tensor([[*line, *[0] * (width - len(line))] for line in tokens], device=device)


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions of a network; None if its config does not have it."""
    known = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return known if isinstance(known, int) else None
