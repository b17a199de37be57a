"""From logits to a token: OpenAI's penalties and biases, transformers' warpers, a generator for each request."""

import secrets
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from shadowtune.serving.requests import Sampling


class CountPenalty(LogitsProcessor):
    """Presence and frequency penalties over the answer's own tokens, as OpenAI's API defines them."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence, self._frequency, self._start = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Lower the scores (1, V) of the tokens in ``input_ids`` (1, n) behind the prompt."""
        said = input_ids[:, self._start :]
        counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return cast(torch.FloatTensor, scores - self._frequency * counts - self._presence * (counts > 0))


class Bias(LogitsProcessor):
    """Adds a number to the logits of some tokens."""

    def __init__(self, biases: dict[int, float]) -> None:
        self._tokens, self._values = torch.tensor(list(biases)), torch.tensor(list(biases.values()))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Shift the scores (1, V)."""
        tokens, values = self._tokens.to(scores.device), self._values.to(scores)
        return cast(torch.FloatTensor, scores.index_add(1, tokens, values[None]))


def penalty_of(sampling: Sampling, generation: GenerationConfig | None) -> float:
    """Return the repetition penalty of a request: its own, else that of the model's generation config, else 1."""
    if sampling.repetition_penalty is not None:
        return sampling.repetition_penalty
    own = None if generation is None else generation.repetition_penalty
    return 1.0 if own is None else float(own)


def processors(
    sampling: Sampling, prompt_length: int, generation: GenerationConfig | None = None
) -> LogitsProcessorList:
    """Return what turns raw logits into those that are drawn from, or whose largest is taken.

    The rule is the same as in ``generate`` and ``evaluate``: how tokens are drawn (temperature, top_p, top_k, min_p) is
    the request's; what the model's generation config forbids or penalizes holds, where the request does not say
    otherwise.

    Args:
        sampling: the settings; a temperature of 0 leaves out what only matters in drawing.
        prompt_length: tokens of the prompt, which the penalties do not count.
        generation: the model's generation config.
    """
    found = LogitsProcessorList()
    if sampling.logit_bias:
        found.append(Bias(sampling.logit_bias))
    penalty = penalty_of(sampling, generation)
    if penalty != 1.0:
        found.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
    found.extend(_forbidden(generation, prompt_length))
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


def _forbidden(generation: GenerationConfig | None, prompt_length: int) -> list[LogitsProcessor]:
    """Return what keeps a model from tokens that its generation config forbids."""
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


def generator(sampling: Sampling, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the source of chance of one request."""
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    return torch.Generator(device).manual_seed(seed % 2**63)


def choose(scores: Tensor, sampling: Sampling, source: torch.Generator) -> int:
    """Choose a token by processed scores (V,)."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(torch.multinomial(scores.float().softmax(-1), 1, generator=source))
