"""Early checks of encoded rows: what would fail, or silently learn nothing, an hour later."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.core.head import IGNORE_INDEX
from shadowtune.errors import DataError

NAMED = 5
"""Rows named in a message."""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that the model has a row of its embedding for every token of the tokenizer, padding included.

    Args:
        tokenizer: that of the run.
        vocab_size: tokens that the model knows.

    Raises:
        DataError: with what to do about it; later it would be an index error deep inside of the model, or on a GPU
            an assertion that ends the process.
    """
    hint = (
        "add rows for the new tokens to the base (base.resize_token_embeddings(len(tokenizer)), save it with the "
        "tokenizer and train beside that) or use the tokenizer that came with the model"
    )
    pad = tokenizer.pad_token_id
    if isinstance(pad, int) and pad >= vocab_size:
        raise DataError(
            f"the pad token {tokenizer.pad_token!r} has id {pad}, but the model's vocabulary ends at {vocab_size - 1}; "
            f"choose a pad token that the model knows, such as the end token {tokenizer.eos_token!r}, or {hint}"
        )
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer has tokens up to id {highest}, but the model's vocabulary ends at {vocab_size - 1}; {hint}"
        )


def check_encoded(rows: Sequence[Mapping[str, Any]], vocab_size: int, max_positions: int | None) -> None:
    """Check that encoded rows fit the model and have something to learn.

    Args:
        rows: with "input_ids", "labels" (a list, or a class) and "row", its number in messages.
        vocab_size: of the model.
        max_positions: tokens a row may have; None if the model knows no limit.

    Raises:
        DataError: naming the first rows at fault and the way out.
    """
    if not rows:
        raise DataError("there are no rows")
    faults = {
        "have no labels, so nothing can be learned from them; give each an answer": lambda row: not _learns(row),
        f"hold tokens beyond the model's vocabulary of {vocab_size}; use the tokenizer that belongs to the model": (
            lambda row: max(row["input_ids"]) >= vocab_size
        ),
        f"are longer than the model's {max_positions} positions; set data.max_length={max_positions} (or block_size)": (
            lambda row: max_positions is not None and len(row["input_ids"]) > max_positions
        ),
    }
    for fault, is_faulty in faults.items():
        numbers = [str(row["row"]) for row in rows if is_faulty(row)]
        if numbers:
            named = ", ".join(numbers[:NAMED]) + (", ..." if len(numbers) > NAMED else "")
            raise DataError(f"{len(numbers)} of {len(rows)} rows ({named}) {fault}")


def _learns(row: Mapping[str, Any]) -> bool:
    """Say whether a row has a class, or a label after the first token, which no token predicts."""
    labels = row["labels"]
    return isinstance(labels, int) or any(label != IGNORE_INDEX for label in labels[1:])
