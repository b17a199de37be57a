"""Checks at attach that a base passes the shadow's state and its own cache down to its blocks.

The signatures of decoder and blocks are always checked. Bases that this package's tests do not cover (an untested
version of a dependency, an architecture that a user added) also run two tokens. So an incompatible release of
transformers is an error here, and not a wrong result later.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from shadowtune.attach.architectures import ARCHITECTURES, Architecture
from shadowtune.attach.sharding import device_of, gathering_blocks
from shadowtune.compatibility import CACHE, cache_of
from shadowtune.errors import UnsupportedArchitectureError
from shadowtune.versions import untested_versions

TESTED = frozenset(ARCHITECTURES)
"""Architectures of the table as this package ships it."""


def check_base(base: PreTrainedModel, architecture: Architecture) -> None:
    """Check a base that has the hooks of ``attach/forward.py``.

    Raises:
        UnsupportedArchitectureError: if the shadow's state or the key-value cache would not reach the blocks.
    """
    decoder, blocks = architecture.decoder_of(base), architecture.blocks_of(base)
    for module in {type(each): each for each in (decoder, *blocks)}.values():
        _check_keywords(module)
    if CACHE not in inspect.signature(decoder.forward).parameters:
        raise UnsupportedArchitectureError(
            f"{type(decoder).__name__} has no argument {CACHE!r} for the key-value cache, as models of this version of "
            f"transformers have; {_installed()}"
        )
    model_type = base.config.get_text_config(decoder=True).model_type
    if untested_versions() or model_type not in TESTED:
        _check_two_tokens(base, decoder, blocks)


def _check_keywords(module: nn.Module) -> None:
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} takes no unknown keywords, by which the shadow's state reaches the blocks; "
            f"{_installed()}"
        )


class _Probe:
    """Replaces a ``ShadowState``: records which blocks it reaches and changes nothing."""

    cache = None

    def __init__(self) -> None:
        self.reached: list[int] = []

    def before_block(self, depth: int, hidden_states: Tensor) -> Tensor:
        if depth not in self.reached:
            self.reached.append(depth)
        return hidden_states

    def finalize(self, blocks: int, hidden_states: Tensor) -> Tensor:
        return hidden_states


@torch.no_grad()
def _check_two_tokens(base: PreTrainedModel, decoder: nn.Module, blocks: nn.ModuleList) -> None:
    """Run two tokens in one pass, one after the other with a cache, and the second one alone at its position.

    With the cache the second token's result must be that of the first pass and not that of the token alone.
    """
    if any(parameter.is_meta for parameter in base.parameters()):
        return
    ids = torch.tensor([[1, 2]]).to(device_of(base))
    positions = torch.arange(2, device=ids.device)[None]
    with _evaluating(base), gathering_blocks(decoder, blocks):
        probe = _Probe()
        together = decoder(input_ids=ids, position_ids=positions, use_cache=False, shadow=probe).last_hidden_state
        if probe.reached != list(range(len(blocks))):
            raise UnsupportedArchitectureError(
                f"the shadow's state reached blocks {probe.reached} of {len(blocks)} in {type(decoder).__name__}; "
                + _installed()
            )
        cache = DynamicCache(config=base.config.get_text_config(decoder=True))
        for index in range(2):
            one = {"input_ids": ids[:, index : index + 1], "position_ids": positions[:, index : index + 1]}
            output = decoder(**one, use_cache=True, shadow=_Probe(), **{CACHE: cache})
        alone = decoder(input_ids=ids[:, 1:], position_ids=positions[:, 1:], use_cache=False, shadow=_Probe())
    second = together[:, 1].float()
    cached, uncached = output.last_hidden_state[:, 0].float(), alone.last_hidden_state[:, 0].float()
    held = cache.get_seq_length() if cache_of(output) is cache else 0
    if held != 2 or not (second - cached).norm() <= (second - uncached).norm() / 2:
        raise UnsupportedArchitectureError(
            f"{type(decoder).__name__} does not use the key-value cache that it gets as {CACHE!r}: two tokens "
            f"give other hidden states with it than without; {_installed()}"
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Context without dropout; afterwards each module is in its former mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _installed() -> str:
    """Name the installed versions if they are the likely reason."""
    untested = untested_versions()
    if not untested:
        return "this base is not supported (see ARCHITECTURES in the package shadowtune.attach)"
    return f"installed is {'; '.join(f'{name} {found}' for name, found in untested.items())}: install a tested version"
