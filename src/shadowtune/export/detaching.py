"""Writing a trained shadow as a plain transformers directory, checked to compute the same."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from shadowtune.data.chat_template import save_tokenizer
from shadowtune.data.encoding import prompt_ids
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ShadowtuneError
from shadowtune.export.card import Card, describe_prompt, write_card
from shadowtune.export.exporting import check_free, staged
from shadowtune.model.checkpoint import write_older_keys
from shadowtune.model.detached import write_plain
from shadowtune.model.methods import AUTO_CLASSES

BUILT_IN_PROMPTS = (
    "The capital of France is",
    "Request: wake me at 7 tomorrow.\nIntent:",
    "In 1969, people first",
    "Why is the sky blue? Because",
)
"""Texts to compare models on where there are no held-out examples."""

EXACT, LOOSE = 1e-5, 0.05
"""Largest difference of logits: in float32, of the largest logit; in less precision, of their standard deviation."""


def built_in_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of the built-in prompts."""
    return [prompt_ids(text, tokenizer, chat_template=False) for text in BUILT_IN_PROMPTS]


def write_detached(
    model: Any,
    tokenizer: Tokenizer,
    directory: Path,
    card: Card,
    prompts: Sequence[list[int]],
    dtype: torch.dtype | None = None,
    prompt_format: PromptFormat | None = None,
) -> PreTrainedModel:
    """Write the detached shadow of ``model`` into a new directory, and return the model that was read back.

    Args:
        model: a ShadowForCausalLM or ShadowForSequenceClassification; its mode is kept.
        tokenizer: written beside the weights.
        directory: must be empty or not exist; it is created only if the check succeeds.
        card: for README.md.
        prompts: token ids on which detached mode, the plain model and the written files must have equal logits.
        dtype: of the written weights; by default the shadow's own.
        prompt_format: of the model's prompts; by default the tokenizer's chat template alone.

    Raises:
        ShadowtuneError: if the directory exists, or logits differ.
    """
    check_free(directory)
    plain = model.detached()
    before = model.mode
    try:
        _compare(
            model.set_mode("detached"), plain, prompts, _full_precision(model), "the plain model and detached mode"
        )
    finally:
        model.set_mode(before)
    if dtype is not None:
        for parameter in plain.parameters():  # not the rotations' frequencies, which stay float32
            parameter.data = parameter.data.to(dtype)
    with staged(directory) as staging:
        write_plain(plain, staging)
        form = prompt_format or PromptFormat()
        if card.task == "classification":  # its input is the text alone
            tokenizer.save_pretrained(str(staging))
            form.save(staging)
        else:
            form = save_tokenizer(tokenizer, form, staging)
            card = card if card.prompt else replace(card, prompt=describe_prompt(form, tokenizer))
        write_older_keys(staging)
        parameters = sum(parameter.numel() for parameter in plain.parameters())
        write_card(staging, card, "detached", directory.name, form.has_saved_template(tokenizer), parameters)
        loaded: PreTrainedModel = (
            AUTO_CLASSES[card.task].from_pretrained(staging, trust_remote_code=False).to(plain.device).eval()
        )
        _compare(plain, loaded, prompts, True, f"the files for {directory} and the model")
    return loaded


def _full_precision(model: Any) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in model.parameters())


@torch.no_grad()
def _compare(first: Any, second: Any, prompts: Sequence[list[int]], exact: bool, what: str) -> None:
    """Raise ShadowtuneError if two models differ on any prompt."""
    for number, prompt in enumerate(prompts, 1):
        expected, found = _logits(first, prompt), _logits(second, prompt)
        limit = EXACT * max(1.0, expected.abs().max().item()) if exact else LOOSE * expected.std().item()
        difference = (found - expected).abs().max().item()
        if not difference <= limit:  # not-a-number is a difference too
            raise ShadowtuneError(
                f"{what} differ by {difference:.2g} in the logits of prompt {number} (limit {limit:.2g}); "
                "nothing is kept"
            )


def _logits(model: Any, prompt: list[int]) -> Tensor:
    ids = torch.tensor([prompt], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float()
