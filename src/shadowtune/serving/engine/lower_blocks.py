"""Lower blocks: those below an adapter's first injection compute the same for every adapter, so once for a prompt.

With ``ShadowConfig.injection_start`` the first blocks of the base get no injection. Their keys and values, and the
hidden states that they hand up, depend on the tokens alone. They are kept for the beginnings of prompts; an adapter
that starts at the same block then runs only the blocks above over these tokens, whichever adapter computed them.
"""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.serving.engine.prefix_cache import LayerPrefix, PrefixCache

LOG = logging.getLogger(__name__)
LEAST_SHARE = 1 / 8
"""Share of the base's blocks from which on leaving them out saves more than it costs."""


class LowerBlocks:
    """What the lower blocks computed for prompts, and decoders without these blocks.

    Args:
        base: a causal language model.
        max_tokens: most tokens kept for each number of lower blocks; 0 keeps none.
        one_mask: whether all blocks of the base take the same attention mask, which a decoder without the first needs.
    """

    def __init__(self, base: PreTrainedModel, max_tokens: int, one_mask: bool) -> None:
        self._base, self._max_tokens, self._one_mask = base, max_tokens, one_mask
        self._prefixes: dict[int, PrefixCache] = {}
        self._uppers: dict[int, Any] = {}

    def prefixes(self, first: int) -> PrefixCache | None:
        """Return what is kept of the blocks below ``first``: their layers, then the hidden states (1, 1, tokens, d).

        None if these blocks are too few, or cannot be left out.
        """
        if self._max_tokens == 0 or self.upper(first) is None:
            return None
        return self._prefixes.setdefault(first, PrefixCache(self._max_tokens))

    def upper(self, first: int) -> Any:
        """Return the base's decoder without the blocks below ``first``, or None; it takes their output as embeddings.

        It is another object around the same modules: the base stays as it is.
        """
        if first not in self._uppers:
            blocks = len(architecture_of(self._base.config).blocks_of(self._base))
            wanted = self._one_mask and first >= LEAST_SHARE * blocks
            self._uppers[first] = upper_decoder(self._base, first) if wanted else None
        return self._uppers[first]


def hidden_prefix(states: Tensor) -> LayerPrefix:
    """Return hidden states (1, T, d) as a layer of a ``PrefixCache``."""
    return (states.unsqueeze(1),)


@torch.no_grad()
def upper_decoder(base: PreTrainedModel, first: int) -> Any:
    """Return a decoder that runs the blocks from ``first`` on; None if it does not compute what the base's does.

    A base that scales its embeddings or adds positions to them would do so to the lower blocks' output, too; this is
    found by running both over three tokens.
    """
    architecture = architecture_of(base.config)
    decoder: Any = architecture.decoder_of(base)
    blocks = architecture.blocks_of(base)
    if "." in architecture.blocks or first < 1:
        return None
    upper = copy.copy(decoder)
    upper._modules = {**decoder._modules, architecture.blocks: nn.ModuleList(list(blocks)[first:])}
    seen = list[Tensor]()
    handle = blocks[first - 1].register_forward_hook(lambda block, args, output: seen.append(output))
    try:
        whole = decoder(input_ids=torch.tensor([[0, 1, 2]], device=base.device), use_cache=False).last_hidden_state
    finally:
        handle.remove()
    part = upper(inputs_embeds=seen[0], use_cache=False).last_hidden_state
    if not torch.allclose(part.float(), whole.float(), rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        LOG.info("the lower %d blocks of %s are computed for each adapter", first, base.config.model_type)
        return None
    return upper
