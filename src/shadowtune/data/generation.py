"""Generate greedy answers in batches, and the tokens that end an answer.

A model trained here stops at the tokens recorded in its ``PromptFormat`` and at those of its generation config; any
other model at those of its generation config and at its tokenizer's end-of-sequence token.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.data.collate import left_pad
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the number of finished prompts, and of all."""


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
    speculate: SpeculationConfig | None = None,
    form: PromptFormat | None = None,
) -> tuple[list[str], list[list[int]]]:
    """Answer prompts greedily, each until its end token; prompts of similar length share a batch.

    Args:
        model: any model with ``generate``; left in eval mode.
        tokenizer: of the model.
        prompts: token ids of each prompt.
        max_new_tokens: limit of tokens per answer.
        batch_size: prompts per batch.
        progress: called after each batch.
        speculate: settings of speculative decoding, which changes no answer; None decodes token by token.
        form: prompt format of the model: the ends of an answer, and the mark behind which its text begins.

    Returns:
        The answers in the order of the prompts: as text without special tokens, and as token ids up to and including
        the end token.

    Raises:
        DataError: if there are no prompts.
    """
    if not prompts:
        raise DataError("there are no prompts to answer")
    model.eval()
    form = form or PromptFormat()
    ends = end_tokens(model, tokenizer, form.ends)
    mark = tokenizer(form.content_mark, add_special_tokens=False)["input_ids"] if form.content_mark else []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts, answers = [""] * len(prompts), [[0]] * len(prompts)
    drafting = {} if speculate is None else {"speculate": speculate}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = left_pad([prompts[index] for index in chosen], tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        output = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends or None,
            **drafting,
        )
        fresh = output[:, batch["input_ids"].shape[1] :].tolist()
        ended = [_up_to_end(ids, ends) for ids in fresh]
        unended = [_after_mark(ids[:-1] if ids and ids[-1] in ends else ids, mark) for ids in ended]
        decoded = tokenizer.batch_decode(unended, skip_special_tokens=True)
        for index, ids, text in zip(chosen, ended, decoded, strict=True):
            texts[index], answers[index] = text.strip(), ids
        progress(start + len(chosen), len(order))
    return texts, answers


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((count for count, token in enumerate(ids, start=1) if token in ends), len(ids))]


def _after_mark(ids: list[int], mark: list[int]) -> list[int]:
    """Return the tokens after the last occurrence of the mark, or all of them."""
    starts = [start for start in range(len(ids) - len(mark) + 1) if mark and ids[start : start + len(mark)] == mark]
    return ids[starts[-1] + len(mark) :] if starts else ids


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, recorded: Sequence[int] = ()) -> list[int]:
    """Return the tokens that end an answer of a model.

    Args:
        model: has a ``generation_config``.
        tokenizer: of the model.
        recorded: ``PromptFormat.ends``; empty for a model that was not trained here.
    """
    return ends_of_config(model.generation_config, tokenizer, recorded)


def ends_of_config(
    generation_config: Any, tokenizer: PreTrainedTokenizerBase, recorded: Sequence[int] = ()
) -> list[int]:
    """As ``end_tokens``, for a generation config, which may be None."""
    others = set(configured_ends(generation_config))
    if not recorded and tokenizer.eos_token_id is not None:
        others.add(tokenizer.eos_token_id)
    return [*recorded, *sorted(others - set(recorded))]


def configured_ends(generation_config: Any) -> list[int]:
    """Return the end tokens of a generation config: none, one, or several."""
    ends = None if generation_config is None else generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def ends_to_record(
    learned: Sequence[int], inside: Collection[int], generation_config: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Return the end tokens to record with a trained model, those of its training answers first.

    Args:
        learned: tokens that end the training answers.
        inside: tokens that occur in training answers before their end; they end no answer, even if they did the base's.
        generation_config: of the base.
        tokenizer: of the base.
    """
    before = ends_of_config(generation_config, tokenizer)
    return (*learned, *(token for token in before if token not in learned and token not in inside))


def record_ends(model: Any, ends: Sequence[int]) -> None:
    """Write end tokens into a model's generation config; nothing changes if there are none."""
    if ends and model.generation_config is not None:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
        model.generation_config._from_model_config = False  # otherwise transformers may rebuild it from the config
