"""Trees of drafts: a chain of drafted tokens, each with alternatives as leaves, verified in one pass.

The nodes of a pass are the last token, g drafts, then the k alternatives of each draft. Each attends to the text and
to its own ancestors: node j of the chain to the nodes 0 .. j, an alternative of draft j + 1 to these and to itself.
After the pass the keys and values of a chosen alternative move behind those of the accepted chain.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

TREE_ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask of any form."""


class DraftTree:
    """The shape of a tree, and its masks and positions.

    Args:
        length: g.
        alternatives: k.
        device: of the networks.
    """

    def __init__(self, length: int, alternatives: int, device: torch.device) -> None:
        self.chain = 1 + length
        steps = torch.arange(length, device=device).repeat_interleave(alternatives)
        self.depths = torch.cat([torch.arange(self.chain, device=device), steps + 1])
        """Of each node below the last token, (n,)."""
        nodes = torch.arange(len(self.depths), device=device)
        on_chain = (nodes < self.chain) & (nodes < self.depths[:, None])
        self._visible = on_chain | (nodes == nodes[:, None])

    def mask(self, first: int, past: Tensor | None, slots: int, network: Any) -> Tensor:
        """Return the mask (B or 1, 1, n - first, slots + n) of the nodes from ``first`` on.

        Args:
            first: index of the first node.
            past: (B, slots), 0 at slots that are masked; None if there are none.
            slots: of the cache before the pass.
            network: that gets it; its attention takes zeros and ones as bool, or as something to add.
        """
        own = self._visible[first:]
        text = own.new_ones(1, len(own), slots) if past is None else past[:, None].bool().expand(-1, len(own), -1)
        visible = torch.cat([text, own.expand(len(text), -1, -1)], -1).unsqueeze(1)
        if network.config._attn_implementation != "eager":
            return visible
        added = torch.zeros(visible.shape, dtype=network.dtype, device=visible.device)
        return added.masked_fill_(~visible, torch.finfo(network.dtype).min)


def takes_trees(*networks: Any) -> bool:
    """Whether the attention of all networks takes a tree as mask."""
    return all(network.config._attn_implementation in TREE_ATTENTION for network in networks)


def move_slot(cache: Cache, sequence: int, source: int, target: int) -> None:
    """Copy keys and values of one sequence from one slot of a cache to another, in every layer."""
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        for stored in (layer.keys, layer.values):
            assert stored is not None
            stored[sequence, :, target] = stored[sequence, :, source].clone()
