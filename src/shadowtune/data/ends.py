"""Which tokens end an answer: those that training taught first, then what else stops generation.

One rule for everyone: a model that was trained here stops at the tokens recorded with it, and at those of its
generation config; any other model at those of its generation config and at its tokenizer's end-of-sequence token.
"""

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, recorded: Sequence[int] = ()) -> list[int]:
    """Return the tokens that end an answer of a model.

    Args:
        model: anything with a ``generation_config``.
        tokenizer: of the model.
        recorded: ``PromptFormat.ends``; empty for a model that was not trained here.
    """
    return ends_of_config(model.generation_config, tokenizer, recorded)


def ends_of_config(
    generation_config: Any, tokenizer: PreTrainedTokenizerBase, recorded: Sequence[int] = ()
) -> list[int]:
    """Return what ``end_tokens`` does, by the generation config itself, which may be None."""
    others = set(configured_ends(generation_config))
    if not recorded and tokenizer.eos_token_id is not None:
        others.add(tokenizer.eos_token_id)
    return [*recorded, *sorted(others - set(recorded))]


def configured_ends(generation_config: Any) -> list[int]:
    """Return the end tokens of a generation config, which has none, one, or a list."""
    ends = None if generation_config is None else generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def ends_to_record(
    taught: Sequence[int], inside: Collection[int], generation_config: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Return the end tokens to record with a model that was trained, those of its training rows first.

    Args:
        taught: tokens that end the learned answers.
        inside: tokens that occur in learned answers before their end. They end no answer, even if they did the base's.
        generation_config: of the base.
        tokenizer: of the base.
    """
    before = ends_of_config(generation_config, tokenizer)
    return (*taught, *(token for token in before if token not in taught and token not in inside))


def record_ends(model: Any, ends: Sequence[int]) -> None:
    """Let a model's generation config stop at these tokens; nothing changes if there are none."""
    if ends and model.generation_config is not None:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
        model.generation_config._from_model_config = False  # else transformers may make it anew from the model's config
