"""From encoded rows to batches, padded or packed."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shadowtune.core.head import IGNORE_INDEX

TAUGHT = ("teacher_tokens", "teacher_log_probabilities")
"""What rows may carry of a teacher's predictions, (T, k) each: the entry of a token is for the one after it."""


@dataclass(frozen=True)
class CausalCollator:
    """Pads rows for causal language modelling on the right."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return "input_ids", "attention_mask" (0 at padding) and "labels" (-100 at padding), all (B, T) int64.

        What rows carry of a teacher becomes (B, T, k), 0 at padding.
        """
        batch = _pad_right(rows, self.pad_token_id)
        batch["labels"] = _stack([row["labels"] for row in rows], IGNORE_INDEX)
        taught = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in _taught(rows)}
        return batch | taught


@dataclass(frozen=True)
class PackedCollator:
    """Puts rows for causal language modelling one behind the other into a single row, without padding.

    Positions start anew with each document; without a mask and a cache, transformers keeps attention inside of it.

    Args:
        with_bounds: whether to tell flash attention where documents begin, which it would work out in each block.
    """

    with_bounds: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return "input_ids", "position_ids" and "labels" (-100 at each first token), all (1, total tokens) int64.

        The bounds are "cu_seq_lens_q" and "cu_seq_lens_k", (documents + 1,) int32, and "max_length_q" and
        "max_length_k", the tokens of the longest document. What rows carry of a teacher becomes (1, total tokens, k).
        """
        packed = {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
            # No token of its own document predicts the first one.
            "labels": [label for row in rows for label in (IGNORE_INDEX, *row["labels"][1:])],
        }
        batch: dict[str, Any] = {name: torch.tensor([values]) for name, values in packed.items()}
        batch |= {name: torch.cat([row[name] for row in rows]).unsqueeze(0) for name in _taught(rows)}
        if self.with_bounds:
            lengths = [len(row["input_ids"]) for row in rows]
            bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


@dataclass(frozen=True)
class ClassificationCollator:
    """Pads rows for classification on the right."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return "input_ids" and "attention_mask" (0 at padding), both (B, T), and "labels" (B,), all int64."""
        return _pad_right(rows, self.pad_token_id) | {"labels": torch.tensor([row["labels"] for row in rows])}


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad prompts on the left, so that generation goes on at the end of each.

    Returns:
        "input_ids" and "attention_mask" (0 at padding), both (B, T) int64.
    """
    return {
        "input_ids": _stack(prompts, pad_token_id, left=True),
        "attention_mask": _stack([[1] * len(prompt) for prompt in prompts], 0, left=True),
    }


def _taught(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in TAUGHT if name in rows[0]]


def _pad_right(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    return {
        "input_ids": _stack([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": _stack([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def _stack(rows: Sequence[Sequence[int]], filler: int, left: bool = False) -> Tensor:
    width = max(len(row) for row in rows)
    fill = [[filler] * (width - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True) if left else zip(rows, fill, strict=True)
    return torch.tensor([[*first, *second] for first, second in pairs])
