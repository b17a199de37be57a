"""Generation of one answer to one prompt, whole or streamed."""

import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from shadowtune.config.settings import check_range
from shadowtune.config.shadow import SpeculationConfig
from shadowtune.data.generation import end_tokens
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ConfigError, DataError
from shadowtune.export.loading import LoadedModel
from shadowtune.model.methods import context_length
from shadowtune.model.speculation.decoding import Speculator
from shadowtune.serving.detokenizer import IncrementalDetokenizer
from shadowtune.serving.edge.generation import decoding_steps
from shadowtune.serving.requests import GenerationRequest, SamplingParams


@dataclass(frozen=True)
class GenerationOptions:
    """Options of ``generate_answer``."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0
    speculate: SpeculationConfig | None = None
    """Speculative decoding with the shadow as the drafter; None to decode without drafts."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, max_new_tokens=(1, None), temperature=(0, None), top_p=(0, 1.000001), num_beams=(1, None))


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer with its cost."""

    answer: str
    new_tokens: int
    seconds: float
    tokens_per_second: float
    tokens_per_pass: float | None = None
    """With drafts: new tokens for each pass of the attached model."""


NEUTRAL = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""Values that disable these filters: sampling is the caller's choice, here as over HTTP, not that of the base's
generation config. Its penalties (``repetition_penalty`` and the like) belong to the model and hold everywhere."""


class _Streamer(TextStreamer):
    """Passes finished pieces of text to a function, without the end-of-answer tokens."""

    def __init__(self, tokenizer: Any, ends: Collection[int], write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._write, self._begun = ends, write, False

    def put(self, value: Any) -> None:
        """Take the prompt, or the next tokens."""
        tokens = value if self.next_tokens_are_prompt else value[[int(token) not in self._ends for token in value]]
        if len(tokens):
            super().put(tokens)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass the text on, without the leading spaces that follow the prompt."""
        text = text if self._begun else text.lstrip(" ")
        self._begun = self._begun or bool(text)
        self._write(text)


@torch.inference_mode()
def generate_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerationOptions,
    chat_template: bool = True,
    stream: Callable[[str], None] | None = None,
    prompt_format: PromptFormat | None = None,
) -> GeneratedAnswer:
    """Answer one prompt.

    Args:
        model: anything with ``generate``, or an exported model.
        prompt: the user's text, in the template of the training examples if there was one.
        options: generation options. Penalties of the model's generation config hold as well.
        chat_template: whether the tokenizer's chat template is applied, if it has one.
        stream: called with each piece of the answer as it is generated; with beams, once with the whole answer.
        prompt_format: that of the run; it replaces ``chat_template`` and defines the end of an answer.

    Raises:
        DataError: if the prompt is empty or longer than the model's positions.
        ConfigError: if an exported model is to use beams or drafts.
    """
    form = prompt_format or PromptFormat(chat_template=chat_template)
    ids = form.wrap(prompt, tokenizer)
    if not prompt.strip():
        raise DataError("the prompt is empty")
    positions = model.max_length if isinstance(model, LoadedModel) else context_length(model)
    if positions is not None and len(ids) + options.max_new_tokens > positions:
        raise DataError(
            f"prompt ({len(ids)} tokens) and answer ({options.max_new_tokens}) exceed the model's {positions} "
            "positions; shorten the prompt or lower --max-new-tokens"
        )
    if isinstance(model, LoadedModel):
        if options.num_beams > 1 or options.speculate is not None:
            raise ConfigError("an exported model decodes token by token; leave --num-beams and --speculate out")
        return stream_answer(model, ids, options, stream)
    ends = end_tokens(model, tokenizer, form.ends)
    torch.manual_seed(options.seed)
    arguments: dict[str, Any] = {"do_sample": options.temperature > 0, "num_beams": options.num_beams}
    if options.temperature > 0:
        arguments |= {**NEUTRAL, "temperature": options.temperature, "top_p": options.top_p}
    live = stream is not None and options.num_beams == 1
    if live:
        arguments["streamer"] = _Streamer(tokenizer, ends, stream)  # type: ignore[arg-type]
    speculator = None
    if options.speculate is not None:
        speculator = Speculator(options.speculate, arguments.get("streamer"))
        arguments["custom_generate"] = speculator
    inputs = torch.tensor([ids], device=model.device)
    start = time.perf_counter()
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
        **arguments,
    )
    seconds = time.perf_counter() - start
    tokens = output[0, len(ids) :].tolist()
    content = tokens[:-1] if tokens and tokens[-1] in ends else tokens
    text = str(tokenizer.decode(content, skip_special_tokens=True)).lstrip(" ")
    if stream is not None and not live:
        stream(text)
    counted = None if speculator is None or not speculator.statistics.passes else speculator.statistics.tokens_per_pass
    return GeneratedAnswer(text, len(tokens), seconds, len(tokens) / seconds, counted)


def stream_answer(
    opened: LoadedModel,
    ids: list[int],
    options: GenerationOptions,
    stream: Callable[[str], None] | None = None,
) -> GeneratedAnswer:
    """Answer one prompt token by token, as the edge's server does.

    Args:
        opened: the model.
        ids: token ids of the prompt.
        options: ``num_beams`` and ``speculate`` do not apply.
        stream: called with each piece of the answer; what it raises ends the generation.
    """
    sampling = SamplingParams(options.temperature, options.top_p, seed=options.seed)
    request = GenerationRequest("", prompt=ids, max_tokens=options.max_new_tokens, sampling=sampling)
    detokenizer, text, count = IncrementalDetokenizer(opened.tokenizer), "", 0

    def add(chunk: str) -> None:
        nonlocal text
        chunk = chunk if text else chunk.lstrip(" ")
        text += chunk
        if stream is not None and chunk:
            stream(chunk)

    start = time.perf_counter()
    with contextlib.closing(decoding_steps(opened, ids, request, options.max_new_tokens)) as steps:
        for step in steps:
            count = step.count
            if step.token.id in opened.ends:
                break
            add(detokenizer.add(step.token.id) if step.text is None else detokenizer.add_text(step.text))
    add(detokenizer.flush())
    seconds = time.perf_counter() - start
    return GeneratedAnswer(text, count, seconds, count / seconds)
