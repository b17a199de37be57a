"""Logits to tokens: logits processors of a request's sampling settings, and drawing with a generator per request."""

import secrets
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from shadowtune.serving.requests import SamplingParams


class CountPenalty(LogitsProcessor):
    """Presence and frequency penalties over the generated tokens, as OpenAI's API defines them."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence, self._frequency, self._start = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Lower the scores (1, V) of the tokens in ``input_ids`` (1, n) after the prompt."""
        generated = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return cast(torch.FloatTensor, scores - self._frequency * counts - self._presence * (counts > 0))


def repetition_penalty(sampling: SamplingParams, generation: GenerationConfig | None) -> float:
    """Return the repetition penalty of a request: its own, else that of the model's generation config, else 1."""
    if sampling.repetition_penalty is not None:
        return sampling.repetition_penalty
    own = None if generation is None else generation.repetition_penalty
    return 1.0 if own is None else float(own)


def logits_processors(
    sampling: SamplingParams, prompt_length: int, generation: GenerationConfig | None = None
) -> LogitsProcessorList:
    """Return the processors applied to raw logits before sampling or the arg max.

    As in ``generate`` and ``evaluate``, the request sets temperature, top_p, top_k and min_p; constraints and penalties
    of the model's generation config apply unless the request overrides them.

    Args:
        sampling: the settings; a temperature of 0 leaves out the warpers.
        prompt_length: tokens of the prompt, which the presence and frequency penalties do not count.
        generation: the model's generation config.
    """
    found = LogitsProcessorList()
    if sampling.logit_bias:
        biases: list[list[list[int] | float]] = [[[token], float(bias)] for token, bias in sampling.logit_bias.items()]
        found.append(logits_process.SequenceBiasLogitsProcessor(biases))
    penalty = repetition_penalty(sampling, generation)
    if penalty != 1.0:
        found.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
    found.extend(_constraints(generation, prompt_length))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(CountPenalty(sampling.presence_penalty, sampling.frequency_penalty, prompt_length))
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            found.append(logits_process.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(logits_process.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            found.append(logits_process.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            found.append(logits_process.MinPLogitsWarper(sampling.min_p))
    return found


def _constraints(generation: GenerationConfig | None, prompt_length: int) -> list[LogitsProcessor]:
    """Return the processors for tokens that a generation config forbids or biases."""
    if generation is None:
        return []
    found: list[LogitsProcessor] = []
    if generation.no_repeat_ngram_size:
        found.append(logits_process.NoRepeatNGramLogitsProcessor(generation.no_repeat_ngram_size))
    if generation.bad_words_ids:
        found.append(logits_process.NoBadWordsLogitsProcessor(generation.bad_words_ids))
    if generation.sequence_bias:
        found.append(logits_process.SequenceBiasLogitsProcessor(generation.sequence_bias))
    if generation.suppress_tokens:
        found.append(logits_process.SuppressTokensLogitsProcessor(generation.suppress_tokens))
    if generation.begin_suppress_tokens:
        first = generation.begin_suppress_tokens
        found.append(logits_process.SuppressTokensAtBeginLogitsProcessor(first, prompt_length))
    return found


def random_generator(sampling: SamplingParams, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the random generator of one request."""
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return torch.Generator(device).manual_seed(seed % 2**63)


def sample(scores: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """Return a token id drawn from processed scores (V,), or their arg max at temperature 0."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(torch.multinomial(scores.float().softmax(-1), 1, generator=generator))
