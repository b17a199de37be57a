"""``attach``: run somebody else's model with a shadow, and take it away again.

Nothing of the base is replaced, renamed or set. While attached, a hook on the base's decoder begins each call with the
active shadow; the hooks on its blocks (``attach/hooks.py``) take the state from there.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.cache import check_same_past, split_cache
from shadowtune.attach.hooks import check_fit, install_hooks
from shadowtune.compatibility import CACHE, pop_cache, set_cache
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
        **kwargs: Any,
    ) -> ShadowState:
        """Run the shadow backbone over the call's inputs and return the state s0."""


class _BeginCall:
    """Pre-hook on the decoder: starts the active shadow of an attachment."""

    def __init__(self, attachment: "Attachment") -> None:
        self.attachment = attachment

    def __call__(self, decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.attachment._before_decoder(args, kwargs)


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
        self._handles.append(decoder.register_forward_pre_hook(_BeginCall(self), with_kwargs=True))
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
            AttachError: if the name is taken, the shadow is attached already, it was made for another base, or this
                handle has been detached.
        """
        if not self._handles:
            raise AttachError(f"cannot add {name!r}: this handle has been detached; call attach(base, shadow) again")
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
            self._active = active if active in self._shadows else None

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

    def _before_decoder(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the active shadow's backbone and send its state down with the base's own arguments."""
        if "shadow" in kwargs or self._active is None:
            return None
        if len(args) > 1:
            raise AttachError("call an attached base with keywords: input_ids=..., attention_mask=...")
        kwargs = {"input_ids": args[0], **kwargs} if args else dict(kwargs)
        call = {name: kwargs.pop(name, None) for name in _SHARED}
        cache = pop_cache(kwargs)
        if (call["input_ids"] is None) == (call["inputs_embeds"] is None):
            return None  # the base says what is wrong
        shadow = self._shadows[self._active]
        config = self._base.config.get_text_config(decoder=True)
        use_cache = call["use_cache"]
        if use_cache is None:
            use_cache = bool(config.use_cache) and not self._base.training
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        shadow_cache = base_cache = None
        if cache is not None:
            shadow_cache, base_cache = split_cache(cache, shadow.num_cache_layers, len(self._blocks))
            check_same_past(shadow_cache, base_cache)
        embeds = call["inputs_embeds"]
        if embeds is None:
            embeds = self._base.get_input_embeddings()(call["input_ids"])
        state = shadow.begin(
            call["input_ids"],
            embeds,
            call["attention_mask"],
            call["position_ids"],
            shadow_cache,
            use_cache,
            **kwargs,
        )
        call |= {CACHE: base_cache, "use_cache": use_cache}
        return (), {**kwargs, **call, "shadow": state, "whole_cache": cache}

    def _after_decoder(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Check that the state went all the way, and give the caller its own cache back."""
        if "whole_cache" in kwargs:
            output.last_hidden_state = kwargs["shadow"].arrive(len(self._blocks), output.last_hidden_state)
            if kwargs["whole_cache"] is not None:
                set_cache(output, kwargs["whole_cache"])
        return output

    @property
    def _blocks(self) -> nn.ModuleList:
        return architecture_of(self._base.config).blocks_of(self._base)


_SHARED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache")
"""Arguments of a decoder that an attachment reads, beside the cache; the others go to both networks as they are."""


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
    decoder = architecture_of(base.config).decoder_of(base)
    if any(isinstance(hook, _BeginCall) for hook in decoder._forward_pre_hooks.values()):
        raise AttachError("a shadow is attached to this base already; use handle.add(shadow, name), or handle.detach()")
    check_fit(base, shadow.boundaries)
    attachment = Attachment(base)
    attachment.add(shadow, name)
    return attachment
