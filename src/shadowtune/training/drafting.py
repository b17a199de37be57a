"""The drafter last: it learns what the attached model itself answers to the training prompts; nothing else learns then.

In speculative decoding its proposals are judged by what the model says, not by what the data say.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.training import TrainConfig
from shadowtune.core.head import IGNORE_INDEX
from shadowtune.data.answers import generate_answers
from shadowtune.model.causal_lm import ShadowForCausalLM

DIRECTORY = "drafting"
"""What this part leaves of its own, in the directory of the run."""


def settings_of(config: TrainConfig) -> TrainConfig:
    """Return the settings of this part: its own epochs, whole ones at least, and nothing to measure on the way."""
    return replace(
        config,
        epochs=max(1.0, config.drafting_epochs),
        max_steps=None,
        data=replace(config.data, validation=None),
        drafting_epochs=0.0,
        fit_head_mixing=False,
    )


def chosen_rows(config: TrainConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows whose prompts are answered: all, or a random part of them for less than one epoch."""
    if config.drafting_epochs >= 1:
        return rows
    return random.Random(config.seed).sample(rows, math.ceil(config.drafting_epochs * len(rows)))


def own_answers(
    model: ShadowForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Answer the prompts of encoded rows greedily; return rows in which these answers are labelled.

    Args:
        model: in mode "attached".
        rows: with ``input_ids`` and ``labels``; what stands before the first label, one token at least, is the prompt.
        report: called with lines for the user.
    """
    begins = [
        next(place for place, label in enumerate(row["labels"]) if place and label != IGNORE_INDEX) for row in rows
    ]
    prompts = [row["input_ids"][:begin] for row, begin in zip(rows, begins, strict=True)]
    longest = max(len(row["input_ids"]) - begin for row, begin in zip(rows, begins, strict=True))
    report(f"the model answers {len(rows)} training prompts, for its drafter to learn from")
    _, answers = generate_answers(model, tokenizer, prompts, longest)
    said = zip(rows, prompts, answers, strict=True)
    return [
        {**row, "input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}
        for row, prompt, answer in said
    ]


@contextmanager
def only_the_drafter(model: ShadowForCausalLM) -> Iterator[None]:
    """Within this context nothing but the draft fusion is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    assert model.shadow.draft_fusion is not None
    model.shadow.draft_fusion.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
