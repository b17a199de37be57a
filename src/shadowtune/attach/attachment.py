"""``attach``: run an existing model with a shadow, and remove the shadow again.

Nothing of the base is replaced, renamed or set. While attached, a hook on the base's decoder begins each call with the
active shadow; the hooks of ``attach/forward.py`` do the rest.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from shadowtune.attach.architectures import architecture_of, check_unwrapped
from shadowtune.attach.forward import AttachableShadow, begin_call, check_fit, install_hooks
from shadowtune.compatibility import pop_cache
from shadowtune.errors import AttachError


class Attachment:
    """Shadows attached to one base, of which at most one is active. A context manager that detaches on exit.

    While attached, every call of the base, ``generate`` included, runs with the active shadow.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._shadows: dict[str, AttachableShadow] = {}
        self._active: str | None = None
        self._handles = install_hooks(base)
        decoder = architecture_of(base.config).decoder_of(base)
        self._handles.append(decoder.register_forward_pre_hook(_BeforeDecoder(self), with_kwargs=True))

    @property
    def names(self) -> list[str]:
        """Names of the attached shadows, in the order of their attachment."""
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
        """Remove one shadow; if it was the active one, calls run the base alone."""
        del self._shadows[self._known(name)]
        if self._active == name:
            self._active = None

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Context in which calls run the base alone."""
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

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the decoder's arguments with the active shadow's state; None leaves them as they are."""
        if "shadow" in kwargs or self._active is None:
            return None
        if len(args) > 1:
            raise AttachError("call an attached base with keywords: input_ids=..., attention_mask=...")
        inputs = {"input_ids": args[0], **kwargs} if args else dict(kwargs)
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            return None  # the base raises its own error
        cache = pop_cache(inputs)
        config = self._base.config.get_text_config(decoder=True)
        use_cache = inputs.pop("use_cache", None)
        if use_cache is None:
            use_cache = bool(config.use_cache) and not self._base.training
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        return (), begin_call(self._base, self._shadows[self._active], inputs, cache, use_cache)


class _BeforeDecoder:
    """Pre-hook on the decoder, which begins the call with the active shadow of an attachment."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.attachment._begin(args, kwargs)


def attach(base: PreTrainedModel, shadow: AttachableShadow, name: str = "default") -> Attachment:
    """Attach a shadow to a base, so that calling the base runs both.

    Args:
        base: a causal language model or sequence classifier of a supported architecture. Its weights, keys and
            objects stay as they are.
        shadow: the shadow, for instance ``ShadowForCausalLM(...).shadow``.
        name: by which ``Attachment.switch`` selects it.

    Returns:
        The handle: ``detach()`` restores the base exactly, ``add()`` attaches further shadows, ``switch()`` chooses.

    Raises:
        AttachError: if something is attached to this base already, or the shadow was made for another base.
        ConfigError: if the base is no transformers model, such as a ``PeftModel``.
        UnsupportedArchitectureError: if the base's architecture is not in the table.
    """
    check_unwrapped(base)
    decoder = architecture_of(base.config).decoder_of(base)
    if any(isinstance(hook, _BeforeDecoder) for hook in decoder._forward_pre_hooks.values()):
        raise AttachError("a shadow is attached to this base already; use handle.add(shadow, name), or handle.detach()")
    check_fit(base, shadow.boundaries)
    attachment = Attachment(base)
    attachment.add(shadow, name)
    return attachment
