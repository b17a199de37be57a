"""Collators: encoded examples to batches, padded or packed."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shadowtune.core.losses import IGNORE_INDEX

TEACHER_LOGITS = ("teacher_tokens", "teacher_log_probabilities")
"""Optional keys of an example with the teacher's k most likely next tokens, (T, k) each."""


@dataclass(frozen=True)
class CausalCollator:
    """Pads examples of causal language modelling on the right."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return "input_ids", "attention_mask" (0 at padding) and "labels" (-100 at padding), all (B, T) int64.

        ``TEACHER_LOGITS`` become (B, T, k), 0 at padding.
        """
        batch = _pad_right(examples, self.pad_token_id)
        batch["labels"] = _stack([example["labels"] for example in examples], IGNORE_INDEX)
        return batch | {
            name: pad_sequence([example[name] for example in examples], batch_first=True)
            for name in _teacher_keys(examples)
        }


@dataclass(frozen=True)
class PackedCollator:
    """Concatenates examples of causal language modelling into a single sequence, without padding.

    Position ids restart with each example; without a mask and a cache, transformers keeps attention inside of it.

    Args:
        with_bounds: whether to give flash attention the bounds of the examples, which it would otherwise compute in
            each block.
    """

    with_bounds: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return "input_ids", "position_ids" and "labels" (-100 at each first token), all (1, total tokens) int64.

        The bounds are "cu_seq_lens_q" and "cu_seq_lens_k", (examples + 1,) int32, and "max_length_q" and
        "max_length_k", the tokens of the longest example. ``TEACHER_LOGITS`` become (1, total tokens, k).
        """
        packed = {
            "input_ids": [token for example in examples for token in example["input_ids"]],
            "position_ids": [position for example in examples for position in range(len(example["input_ids"]))],
            # No token of its own example predicts the first one.
            "labels": [label for example in examples for label in (IGNORE_INDEX, *example["labels"][1:])],
        }
        batch: dict[str, Any] = {name: torch.tensor([values]) for name, values in packed.items()}
        batch |= {
            name: torch.cat([example[name] for example in examples]).unsqueeze(0) for name in _teacher_keys(examples)
        }
        if self.with_bounds:
            lengths = [len(example["input_ids"]) for example in examples]
            bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch


@dataclass(frozen=True)
class ClassificationCollator:
    """Pads examples of classification on the right.

    Args:
        class_weights: weight of each class in the loss, in the order of their numbers.
    """

    pad_token_id: int
    class_weights: tuple[float, ...] | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return "input_ids" and "attention_mask" (0 at padding), both (B, T) int64, and "labels".

        The labels are (B,) int64 for one class, (B, C) float32 for several, (B,) float32 for regression. With weights,
        "example_weights" are those of the labels, (B,) float32.
        """
        labels = [example["labels"] for example in examples]
        batch = _pad_right(examples, self.pad_token_id) | {"labels": torch.tensor(labels)}
        if self.class_weights is not None:
            batch["example_weights"] = torch.tensor([self.class_weights[label] for label in labels])
        return batch


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad prompts on the left, for generation.

    Returns:
        "input_ids" and "attention_mask" (0 at padding), both (B, T) int64.
    """
    return {
        "input_ids": _stack(prompts, pad_token_id, left=True),
        "attention_mask": _stack([[1] * len(prompt) for prompt in prompts], 0, left=True),
    }


def _teacher_keys(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in TEACHER_LOGITS if name in examples[0]]


def _pad_right(examples: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    return {
        "input_ids": _stack([example["input_ids"] for example in examples], pad_token_id),
        "attention_mask": _stack([[1] * len(example["input_ids"]) for example in examples], 0),
    }


def _stack(sequences: Sequence[Sequence[int]], filler: int, left: bool = False) -> Tensor:
    width = max(len(each) for each in sequences)
    fill = [[filler] * (width - len(each)) for each in sequences]
    pairs = zip(fill, sequences, strict=True) if left else zip(sequences, fill, strict=True)
    return torch.tensor([[*first, *second] for first, second in pairs])
