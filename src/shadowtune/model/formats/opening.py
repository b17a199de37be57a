"""Which library wrote a directory."""

from typing import Any

from transformers.utils import CONFIG_NAME

from shadowtune.errors import CheckpointError
from shadowtune.model.checkpoint import find_file
from shadowtune.model.formats import peft_shadow, shadow_peft
from shadowtune.model.formats.adapter import PeerAdapter
from shadowtune.model.formats.projected import is_projected


def open_peer(path_or_id: str, **hub: Any) -> PeerAdapter | None:
    """Open the adapter of another library; None for anything else, such as a shadow of our own.

    Args:
        path_or_id: a local directory or a Hub id.
        hub: keywords of ``transformers.utils.cached_file``, such as ``revision``.

    Raises:
        CheckpointError: if it is damaged, or a projected model, which is no adapter.
    """
    try:
        if find_file(path_or_id, shadow_peft.CONFIG, **hub) is not None:
            return shadow_peft.open_shadow_peft(path_or_id, **hub)
        if find_file(path_or_id, peft_shadow.CONFIG, **hub) is not None:
            return peft_shadow.open_peft(path_or_id, **hub)
        projected = find_file(path_or_id, CONFIG_NAME, **hub) is not None and is_projected(path_or_id, **hub)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        return None  # the caller's own reading says what is wrong with the path
    if projected:
        raise CheckpointError(
            f"{path_or_id} is a detached model with a projection, not a shadow beside a base; start a shadow from it "
            f"with ShadowConfig(backbone={path_or_id!r}), or make it a plain model: shadowtune convert --format plain"
        )
    return None
