"""``attach``: forward hooks that let a shadow's state pass from block to block, and their removal.

Nothing of the base is replaced, renamed or set. A hook on each block looks for the keyword ``shadow`` of that very call
and, without it, does nothing. transformers hands unknown keywords down to every block, its checkpointing recomputes a
block without running hooks again, and hooks that read a keyword compile without graph breaks.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.cache import split_cache
from shadowtune.core.boundary import Boundaries
from shadowtune.core.state import ShadowState
from shadowtune.errors import AttachError


class AttachableShadow(Protocol):
    """What ``attach`` needs of a shadow."""

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
    ) -> ShadowState:
        """Run the shadow backbone over the call's inputs and return the state s0."""


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

    Raises:
        UnsupportedArchitectureError: if the base has no row in the table.
        AttachError: if the base has fewer than two blocks.
    """
    blocks = architecture_of(base.config).blocks_of(base)
    if len(blocks) < 2:
        raise AttachError(f"the base has {len(blocks)} block(s); a shadow works between blocks and needs at least 2")
    handles = [blocks[0].register_forward_pre_hook(_EnterFirst(), with_kwargs=True)]
    for depth in range(1, len(blocks)):
        handles.append(blocks[depth - 1].register_forward_hook(_EnterNext(depth), with_kwargs=True))
    return handles


def has_hooks(base: PreTrainedModel) -> bool:
    """Whether ``install_hooks`` has been called on this base and not undone."""
    first = architecture_of(base.config).blocks_of(base)[0]
    return any(isinstance(hook, _EnterFirst) for hook in first._forward_pre_hooks.values())


class Attachment:
    """Shadows attached to one base, of which at most one is active. A context manager that detaches at its end.

    While attached, every call of the base, ``generate`` included, runs with the active shadow.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._shadows: dict[str, AttachableShadow] = {}
        self._active: str | None = None
        self._handles = install_hooks(base)
        decoder = architecture_of(base.config).decoder_of(base)
        self._handles.append(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._after_decoder, with_kwargs=True))

    @property
    def names(self) -> list[str]:
        """Names of the attached shadows, in the order in which they came."""
        return list(self._shadows)

    @property
    def active(self) -> str | None:
        """Name of the shadow that calls run with now; None while disabled."""
        return self._active

    def add(self, shadow: AttachableShadow, name: str) -> None:
        """Attach one more shadow and make it the active one.

        Raises:
            AttachError: if the name is taken, the shadow is attached already, or it was made for another base.
        """
        if name in self._shadows:
            raise AttachError(f"a shadow named {name!r} is attached already; choose another name or remove it first")
        if any(known is shadow for known in self._shadows.values()):
            raise AttachError(f"this shadow is attached already; it cannot be attached a second time as {name!r}")
        check_fit(self._base, shadow.boundaries)
        self._shadows[name] = shadow
        self._active = name

    def switch(self, name: str) -> None:
        """Make another attached shadow the active one."""
        self._active = self._known(name)

    def remove(self, name: str) -> None:
        """Forget one shadow; if it was the active one, calls run with the base alone."""
        del self._shadows[self._known(name)]
        if self._active == name:
            self._active = None

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context calls run with the base alone."""
        active, self._active = self._active, None
        try:
            yield
        finally:
            self._active = active

    def detach(self) -> None:
        """Remove every hook: the base is exactly what it was. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._shadows.clear()
        self._active = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _known(self, name: str) -> str:
        if name not in self._shadows:
            raise AttachError(
                f"no shadow named {name!r} is attached; attached are {', '.join(self._shadows) or 'none'}"
            )
        return name

    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "shadow" in kwargs or self._active is None:
            return None
        if args:
            kwargs = {**kwargs, "input_ids": args[0]}
            if len(args) > 1:
                raise AttachError("call an attached base with keywords: input_ids=..., attention_mask=...")
        shadow = self._shadows[self._active]
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        use_cache = self._base.config.use_cache and not self._base.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self._base.config)
        shadow_cache, base_cache = (None, None)
        if cache is not None:
            blocks = architecture_of(self._base.config).blocks_of(self._base)
            shadow_cache, base_cache = split_cache(cache, shadow.num_cache_layers, len(blocks))
        embeds = kwargs.get("inputs_embeds")
        state = shadow.begin(
            kwargs.get("input_ids"),
            self._base.get_input_embeddings()(kwargs["input_ids"]) if embeds is None else embeds,
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
            shadow_cache,
            use_cache,
        )
        return (), {
            **kwargs,
            "use_cache": use_cache,
            "past_key_values": base_cache,
            "shadow": state,
            "whole_cache": cache,
        }

    def _after_decoder(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("whole_cache") is not None:
            output.past_key_values = kwargs["whole_cache"]
        return output


def check_fit(base: PreTrainedModel, boundaries: Boundaries) -> None:
    """Raise AttachError unless the boundaries were made for a base of this width and depth."""
    blocks = len(architecture_of(base.config).blocks_of(base))
    width = base.config.get_text_config(decoder=True).hidden_size
    depth = boundaries.count + (0 if boundaries.config.inject_first else 1)
    shadow_width = boundaries.injection_downs.shape[1]
    if (shadow_width, depth) != (width, blocks):
        raise AttachError(
            f"the shadow was made for a base of width {shadow_width} and {depth} blocks, this base "
            f"({base.config.name_or_path or base.config.model_type}) has width {width} and {blocks} blocks"
        )


def attach(base: PreTrainedModel, shadow: AttachableShadow, name: str = "default") -> Attachment:
    """Attach a shadow to a base, so that calling the base runs both.

    Args:
        base: a causal language model or sequence classifier of a supported architecture. Its weights, keys and
            objects stay as they are.
        shadow: the shadow, for instance ``ShadowForCausalLM(...).shadow``.
        name: what ``Attachment.switch`` will call it.

    Returns:
        The handle: ``detach()`` restores the base exactly, ``add()`` brings further shadows, ``switch()`` chooses.

    Raises:
        AttachError: if something is attached to this base already, or the shadow was made for another base.
        UnsupportedArchitectureError: if the base has no row in the table of architectures.
    """
    if has_hooks(base):
        raise AttachError("a shadow is attached to this base already; use handle.add(shadow, name), or handle.detach()")
    check_fit(base, shadow.boundaries)
    attachment = Attachment(base)
    attachment.add(shadow, name)
    return attachment
