"""From prompts to answers, by anything with ``generate``: greedy, in left-padded, cached batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowtune.config.speculation import SpeculationConfig
from shadowtune.data.collate import left_pad
from shadowtune.data.ends import end_tokens
from shadowtune.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the number of rows finished, and of all."""


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
    speculate: SpeculationConfig | None = None,
    recorded_ends: Sequence[int] = (),
    content_mark: str = "",
) -> tuple[list[str], list[list[int]]]:
    """Answer prompts greedily, rows of similar length together, each until its end token.

    Args:
        model: anything with ``generate``; it is left in eval mode.
        prompts: token ids of each prompt, as the model saw them in training.
        speculate: how an attached model's shadow drafts ahead, which changes no answer; None for token by token.
        recorded_ends: ``PromptFormat.ends`` of the model.
        content_mark: ``PromptFormat.content_mark`` of the model: the texts are what follows it.

    Returns:
        The answers in the order of the prompts: as text, without special tokens and the one that ends it, and as token
        ids up to that one.
    """
    if not prompts:
        raise DataError("there are no prompts to answer")
    model.eval()
    ends = end_tokens(model, tokenizer, recorded_ends)
    mark = tokenizer(content_mark, add_special_tokens=False)["input_ids"] if content_mark else []
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
        ended = [up_to_end(ids, ends) for ids in fresh]
        unended = [_content(ids[:-1] if ids and ids[-1] in ends else ids, mark) for ids in ended]
        decoded = tokenizer.batch_decode(unended, skip_special_tokens=True)
        for index, ids, text in zip(chosen, ended, decoded, strict=True):
            texts[index], answers[index] = text.strip(), ids
        progress(start + len(chosen), len(order))
    return texts, answers


def up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Cut off what follows the first token that ends an answer."""
    return ids[: next((place for place, token in enumerate(ids, start=1) if token in ends), len(ids))]


def _content(ids: list[int], mark: list[int]) -> list[int]:
    """Return the tokens of an answer behind the last place where the mark is, or all of them."""
    places = [place for place in range(len(ids) - len(mark) + 1) if mark and ids[place : place + len(mark)] == mark]
    return ids[places[-1] + len(mark) :] if places else ids
