"""How base and shadow run in one forward call: hooks on the base, and the start of a call.

The hooks look for the keyword ``shadow`` of the running call, a ``ShadowState``, and do nothing without it. They apply
the boundaries between the blocks, and after the last block finish the decoder's output. So every caller runs the same
way: the models and ``attach`` begin with ``begin_call``, the serving engine with a state of several adapters; then
the base's decoder is called with ``shadow=state``.

transformers passes unknown keywords down to every block, its checkpointing recomputes a block without running hooks
again, and hooks that read a keyword compile without graph breaks.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.cache import check_same_past, split_cache
from shadowtune.attach.self_check import check_base
from shadowtune.attach.sharding import check_layout
from shadowtune.compatibility import CACHE, set_cache
from shadowtune.core.boundary import Boundaries, ShadowState
from shadowtune.core.shared_prompt import injected_tokens
from shadowtune.errors import AttachError, UnsupportedArchitectureError


class AttachableShadow(Protocol):
    """What a base needs of a shadow to run with it."""

    boundaries: Boundaries

    @property
    def num_cache_layers(self) -> int:
        """Cache layers of the shadow's backbone."""

    def begin(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool,
        run_shadow: bool = False,
        **kwargs: Any,
    ) -> ShadowState:
        """Run the shadow's backbone on the call's inputs where s0 is needed; return the state."""


def begin_call(
    base: PreTrainedModel,
    shadow: AttachableShadow,
    inputs: dict[str, Any],
    cache: Cache | None,
    use_cache: bool,
    shadow_states: Tensor | None = None,
    run_shadow: bool = False,
) -> dict[str, Any]:
    """Run the shadow's backbone and prepare the base's decoder for the same call.

    Args:
        base: on which ``install_hooks`` has been called.
        shadow: made for this base.
        inputs: keywords of the call: ``input_ids`` (B, T) or ``inputs_embeds`` (B, T, d), ``attention_mask``,
            ``position_ids``, and others, which both networks get. ``injection_from`` (B,) is taken out of them: the
            number of each sequence's leading tokens, padding not counted, that run as in the bare base. Without it the
            config's ``injection_after`` decides; in a call that continues a cache, every token is then injected.
        cache: of both networks (``attach/cache.py``); None without one.
        use_cache: whether both networks write to it.
        shadow_states: s0 (B, T, d), if the backbone has already run on these tokens.
        run_shadow: whether the backbone runs even if the attached model does not need s0.

    Returns:
        All keywords for the decoder, among them the state, as ``shadow``.

    Raises:
        AttachError: if the cache does not fit, or the networks' pasts in it differ.
    """
    inputs = dict(inputs)
    starts = inputs.pop("injection_from", None)
    shadow_cache = base_cache = None
    if cache is not None:
        blocks = len(architecture_of(base.config).blocks_of(base))
        shadow_cache, base_cache = split_cache(cache, shadow.num_cache_layers, blocks)
        if shadow_states is None:
            check_same_past(shadow_cache, base_cache)
    if shadow_states is not None:
        state = ShadowState(shadow.boundaries, shadow_states)
    else:
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        ids, embeds, mask, positions = (inputs.get(name) for name in names)
        if embeds is None:
            embeds = base.get_input_embeddings()(ids)
        others = {name: value for name, value in inputs.items() if name not in names}
        state = shadow.begin(ids, embeds, mask, positions, shadow_cache, use_cache, run_shadow, **others)
    state.cache = cache
    state.injected = _injected(shadow.boundaries.config.injection_after, starts, inputs, base_cache)
    return {**inputs, CACHE: base_cache, "use_cache": use_cache, "shadow": state}


def _injected(
    marker: tuple[int, ...] | None, starts: Tensor | None, inputs: dict[str, Any], base_cache: Cache | None
) -> Tensor | None:
    """Return which tokens get injections, (B, T, 1) bool; None for all. Arguments as in ``begin_call``."""
    ids, embeds, mask, positions = (
        inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    )
    if starts is None and marker is None:
        return None
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    past = 0 if base_cache is None else base_cache.get_seq_length()
    if starts is not None:
        shape = cast(Tensor, embeds if ids is None else ids).shape[:2]
        return (_token_indices(shape, mask, positions, past, starts.device) >= starts[:, None]).unsqueeze(-1)
    assert marker is not None
    if past != 0:
        return None
    if ids is None:
        raise AttachError(
            "shadow.injection_after is found in input_ids, but the call has inputs_embeds; pass injection_from, the "
            "number of leading tokens of each sequence without injections"
        )
    mask = None if mask is None else mask[:, : ids.shape[1]]  # a static cache's is as long as the cache
    return injected_tokens(ids, marker, mask, positions).unsqueeze(-1)


def _token_indices(
    shape: torch.Size, mask: Tensor | None, positions: Tensor | None, past: int | Tensor, device: torch.device
) -> Tensor:
    """Index of each token in its sequence, padding not counted, (B, T) or (1, T)."""
    if positions is not None:
        return positions
    if mask is not None and mask.shape[1] == past + shape[1]:
        return mask.long().cumsum(1)[:, -shape[1] :] - 1
    return (torch.arange(shape[1], device=device) + past).unsqueeze(0)


def install_hooks(base: PreTrainedModel) -> list[RemovableHandle]:
    """Put the hooks on decoder and blocks of ``base``; calls without ``shadow=`` are unchanged.

    Several models may install theirs on the same base: a state acts once at each block.

    Raises:
        UnsupportedArchitectureError: if the base's architecture is not in the table, or the base would not pass the
            shadow's state and its own cache down to its blocks (``attach/self_check.py``).
        AttachError: if the base has fewer than two blocks, or transformers sharded it by FSDP at loading.
    """
    check_layout(base)
    architecture = architecture_of(base.config)
    decoder, blocks = architecture.decoder_of(base), architecture.blocks_of(base)
    if len(blocks) < 2:
        raise AttachError(f"the base has {len(blocks)} block(s); a shadow works between blocks and needs at least 2")
    handles = [blocks[0].register_forward_pre_hook(_BeforeFirst(), with_kwargs=True)]
    for depth in range(1, len(blocks)):
        handles.append(blocks[depth - 1].register_forward_hook(_BeforeNext(depth), with_kwargs=True))
    handles.append(decoder.register_forward_hook(_AfterLast(len(blocks)), with_kwargs=True))
    try:
        check_base(base, architecture)
    except UnsupportedArchitectureError:
        for handle in handles:
            handle.remove()
        raise
    return handles


class _BeforeFirst:
    """Pre-hook on the first block."""

    def __call__(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        state = kwargs.get("shadow")
        if state is None:
            return None
        return (state.before_block(0, args[0]), *args[1:]), kwargs


class _BeforeNext:
    """Hook on a block's output, which is the input of block ``depth``."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __call__(self, block: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        state = kwargs.get("shadow")
        return output if state is None else state.before_block(self.depth, output)


class _AfterLast:
    """Hook on the decoder's output: final hidden states, and the caller's cache in place of the base's part of it."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def __call__(self, decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        state = kwargs.get("shadow")
        if state is not None:
            output.last_hidden_state = state.finalize(self.blocks, output.last_hidden_state)
            if state.cache is not None:
                set_cache(output, state.cache)
        return output


def check_fit(base: PreTrainedModel, boundaries: Boundaries) -> None:
    """Raise AttachError unless the boundaries were made for a base of this width and depth."""
    blocks = len(architecture_of(base.config).blocks_of(base))
    width = base.config.get_text_config(decoder=True).hidden_size
    embedding_width = cast(nn.Embedding, base.get_input_embeddings()).embedding_dim
    if embedding_width != width:
        raise UnsupportedArchitectureError(
            f"the base's embeddings have width {embedding_width} but its blocks {width}; a shadow needs them equal"
        )
    depth = boundaries.first + boundaries.count
    shadow_width = boundaries.injection_downs.shape[1]
    if (shadow_width, depth) != (width, blocks):
        raise AttachError(
            f"the shadow was made for a base of width {shadow_width} and {depth} blocks, this base "
            f"({base.config.name_or_path or base.config.model_type}) has width {width} and {blocks} blocks"
        )
