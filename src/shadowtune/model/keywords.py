"""Keyword arguments of the models' ``forward``: which ones there are, and errors for what would be lost without notice.

transformers' models take any keyword and hand it down; one that nothing reads changes nothing, and a misspelt
``labels`` trains on nothing. Here an unknown keyword is an error.
"""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.utils import TransformersKwargs

from shadowtune.compatibility import CACHE_NAMES
from shadowtune.config.checking import nearest
from shadowtune.errors import ConfigError

PASSED_ON = ("cache_position", "mm_token_type_ids", "return_dict", "token_type_ids", "tokenizer")
"""Keywords that tokenizers, trainers, ``generate`` and earlier versions of transformers send to every model."""


def known_keywords(*modules: nn.Module) -> frozenset[str]:
    """Return the keywords that the ``forward`` of some of the modules names, and those of all transformers models."""
    names = {name for module in modules for name in inspect.signature(type(module).forward).parameters}
    return frozenset({*names, *TransformersKwargs.__annotations__, *CACHE_NAMES, *PASSED_ON} - {"self", "kwargs"})


def check_keywords(given: Iterable[str], known: frozenset[str], model: nn.Module) -> None:
    """Raise TypeError for the first keyword that is not known, with the nearest one that is."""
    for name in given:
        if name not in known:
            raise TypeError(
                f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}{nearest(name, known)}"
            )


def check_labels(labels: Any, shift_labels: Any, num_items_in_batch: Any, loses_terms: bool) -> None:
    """Check that a trainer which counts labels also passes them.

    Args:
        labels: the call's.
        shift_labels: the call's.
        num_items_in_batch: the call's; transformers' Trainer passes it in training, even where it keeps the labels.
        loses_terms: whether a loss computed outside of the model would not be the one that the model computes.

    Raises:
        ConfigError: if the trainer computes the loss by itself, from the logits.
    """
    if labels is None and shift_labels is not None:
        raise ConfigError(
            "shift_labels without labels: a trainer that computes the loss itself would leave out the shadow's terms; "
            "pass labels as well"
        )
    if labels is None and num_items_in_batch is not None and loses_terms:
        raise ConfigError(
            "the batch has no labels but num_items_in_batch: the trainer took them out to compute the loss itself "
            "(label_smoothing_factor or compute_loss_func), and the shadow's loss would never exist; leave these "
            "options out"
        )
