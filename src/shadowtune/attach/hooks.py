"""Forward hooks by which a shadow's state passes from block to block.

A hook on each block looks for the keyword ``shadow`` of that very call and, without it, does nothing. transformers
hands unknown keywords down to every block, its checkpointing recomputes a block without running hooks again, and hooks
that read a keyword compile without graph breaks.
"""

from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.self_check import check_base
from shadowtune.core.boundary import Boundaries
from shadowtune.errors import AttachError, UnsupportedArchitectureError


class _EnterFirst:
    """Pre-hook on the first block."""

    def __call__(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        state = kwargs.get("shadow")
        if state is None:
            return None
        return (state.enter(0, args[0]), *args[1:]), kwargs


class _EnterNext:
    """Hook on a block's output, which is the input of block ``depth``."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __call__(self, block: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        state = kwargs.get("shadow")
        return output if state is None else state.enter(self.depth, output)


def install_hooks(base: PreTrainedModel) -> list[RemovableHandle]:
    """Put the inert hooks on the blocks of ``base``; each call that carries ``shadow=`` uses them.

    Several owners may put theirs on the same base: a state crosses each boundary once.

    Raises:
        UnsupportedArchitectureError: if the base has no row in the table, or would not hand the shadow's state and its
            own cache down to its blocks (``attach/self_check.py``).
        AttachError: if the base has fewer than two blocks.
    """
    architecture = architecture_of(base.config)
    blocks = architecture.blocks_of(base)
    if len(blocks) < 2:
        raise AttachError(f"the base has {len(blocks)} block(s); a shadow works between blocks and needs at least 2")
    handles = [blocks[0].register_forward_pre_hook(_EnterFirst(), with_kwargs=True)]
    for depth in range(1, len(blocks)):
        handles.append(blocks[depth - 1].register_forward_hook(_EnterNext(depth), with_kwargs=True))
    try:
        check_base(base, architecture)
    except UnsupportedArchitectureError:
        for handle in handles:
            handle.remove()
        raise
    return handles


def check_fit(base: PreTrainedModel, boundaries: Boundaries) -> None:
    """Raise AttachError unless the boundaries were made for a base of this width and depth."""
    blocks = len(architecture_of(base.config).blocks_of(base))
    width = base.config.get_text_config(decoder=True).hidden_size
    embedding_width = cast(nn.Embedding, base.get_input_embeddings()).embedding_dim
    if embedding_width != width:
        raise UnsupportedArchitectureError(
            f"the base's embeddings have width {embedding_width} but its blocks {width}; a shadow needs them equal"
        )
    depth = boundaries.count + (0 if boundaries.config.inject_first else 1)
    shadow_width = boundaries.injection_downs.shape[1]
    if (shadow_width, depth) != (width, blocks):
        raise AttachError(
            f"the shadow was made for a base of width {shadow_width} and {depth} blocks, this base "
            f"({base.config.name_or_path or base.config.model_type}) has width {width} and {blocks} blocks"
        )
