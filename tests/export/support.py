"""A detached tiny shadow on disk."""

from tests.support.shadows import perturbed_model
from tests.support.tokenizers import tiny_tokenizer

NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_shadow_layers": 2}
"""A mirror of half the width: projected, with a head of its own."""


def plain_model(kind="llama", **settings):
    """The plain model of a perturbed shadow, and a tokenizer that fits."""
    return perturbed_model(kind, **{"num_shadow_layers": 2, **settings}).detached(), tiny_tokenizer()
