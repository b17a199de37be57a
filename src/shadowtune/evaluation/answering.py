"""One prompt, one answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from shadowtune.config.checking import check_range
from shadowtune.config.speculation import SpeculationConfig
from shadowtune.data.encoding import prompt_ids
from shadowtune.errors import DataError
from shadowtune.model.methods import context_length
from shadowtune.model.speculation.decoding import Speculator


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 chooses the likeliest token."""
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0
    speculate: SpeculationConfig | None = None
    """How the shadow drafts ahead; None for token by token."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, max_new_tokens=(1, None), temperature=(0, None), top_p=(0, 1.000001), num_beams=(1, None))


@dataclass(frozen=True)
class Answer:
    """What came back."""

    answer: str
    new_tokens: int
    seconds: float
    tokens_per_second: float
    tokens_per_pass: float | None = None
    """With drafts: tokens that a pass of the attached model gave."""


class _Streamer(TextStreamer):
    """Hands finished pieces of text to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._begun = write, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass the text on, without the spaces that it begins with where a prompt ends before one."""
        text = text if self._begun else text.lstrip(" ")
        self._begun = self._begun or bool(text)
        self._write(text)


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    chat_template: bool = True,
    stream: Callable[[str], None] | None = None,
) -> Answer:
    """Answer one prompt.

    Args:
        model: anything with ``generate``.
        prompt: the user's words; they are put into the tokenizer's chat template, if it has one.
        stream: called with each piece of the answer as it comes; not possible with beams.

    Raises:
        DataError: if the prompt is empty or longer than the model's positions.
    """
    ids = prompt_ids(prompt, tokenizer, chat_template)
    if not prompt.strip():
        raise DataError("the prompt is empty")
    positions = context_length(model)
    if positions is not None and len(ids) + sampling.max_new_tokens > positions:
        raise DataError(
            f"prompt ({len(ids)} tokens) and answer ({sampling.max_new_tokens}) exceed the model's {positions} "
            "positions; shorten the prompt or lower --max-new-tokens"
        )
    torch.manual_seed(sampling.seed)
    arguments: dict[str, Any] = {"do_sample": sampling.temperature > 0, "num_beams": sampling.num_beams}
    if sampling.temperature > 0:
        arguments |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    live = stream is not None and sampling.num_beams == 1
    if live:
        arguments["streamer"] = _Streamer(tokenizer, stream)  # type: ignore[arg-type]
    speculator = None
    if sampling.speculate is not None:
        speculator = Speculator(sampling.speculate, arguments.get("streamer"))
        arguments["custom_generate"] = speculator
    inputs = torch.tensor([ids], device=model.device)
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **arguments,
    )
    seconds = time.perf_counter() - start
    fresh = output[0, len(ids) :]
    text = str(tokenizer.decode(fresh, skip_special_tokens=True)).lstrip(" ")
    if stream is not None and not live:
        stream(text)
    counted = None if speculator is None or not speculator.counts.passes else speculator.counts.tokens_per_pass
    return Answer(text, len(fresh), seconds, len(fresh) / seconds, counted)
