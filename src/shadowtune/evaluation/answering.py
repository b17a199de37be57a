"""One prompt, one answer."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from shadowtune.config.checking import check_range
from shadowtune.config.speculation import SpeculationConfig
from shadowtune.data.generation import end_tokens
from shadowtune.data.prompt_format import PromptFormat
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


NEUTRAL = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""What leaves each of these out. How tokens are drawn is for who asks to say, here as over HTTP, not for the base's
generation config; its penalties (``repetition_penalty`` and the like) belong to the model and hold everywhere."""


class _Streamer(TextStreamer):
    """Hands finished pieces of text to a function, without the tokens that end an answer."""

    def __init__(self, tokenizer: Any, ends: Collection[int], write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._write, self._begun = ends, write, False

    def put(self, value: Any) -> None:
        """Take the prompt, or the next tokens."""
        tokens = value if self.next_tokens_are_prompt else value[[int(token) not in self._ends for token in value]]
        if len(tokens):
            super().put(tokens)

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
    prompt_format: PromptFormat | None = None,
) -> Answer:
    """Answer one prompt.

    Args:
        model: anything with ``generate``.
        prompt: the user's words, in the rows' template if there was one.
        sampling: how tokens are chosen. Penalties of the model's generation config hold as well.
        chat_template: whether the prompt is put into the tokenizer's chat template, if it has one.
        stream: called with each piece of the answer as it comes; not possible with beams.
        prompt_format: of the run: says what stands around the prompt, in place of ``chat_template``, and what ends an
            answer.

    Raises:
        DataError: if the prompt is empty or longer than the model's positions.
    """
    form = prompt_format or PromptFormat(chat_template=chat_template)
    ids, ends = form.wrap(prompt, tokenizer), end_tokens(model, tokenizer, form.ends)
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
        arguments |= {**NEUTRAL, "temperature": sampling.temperature, "top_p": sampling.top_p}
    live = stream is not None and sampling.num_beams == 1
    if live:
        arguments["streamer"] = _Streamer(tokenizer, ends, stream)  # type: ignore[arg-type]
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
        eos_token_id=ends or None,
        **arguments,
    )
    seconds = time.perf_counter() - start
    fresh = output[0, len(ids) :].tolist()
    said = fresh[:-1] if fresh and fresh[-1] in ends else fresh
    text = str(tokenizer.decode(said, skip_special_tokens=True)).lstrip(" ")
    if stream is not None and not live:
        stream(text)
    counted = None if speculator is None or not speculator.statistics.passes else speculator.statistics.tokens_per_pass
    return Answer(text, len(fresh), seconds, len(fresh) / seconds, counted)
