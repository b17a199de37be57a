"""Decode with a detached model, token by token, in the thread that runs it."""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from shadowtune.export.loading import LoadedModel
from shadowtune.export.runtimes import GgufModel, Stepwise
from shadowtune.serving.constrained import SchemaMatcher
from shadowtune.serving.edge.confidence import (
    TokenStatistics,
    statistics_from_logits,
    statistics_from_top,
    with_deferral,
)
from shadowtune.serving.requests import GenerationRequest, RequestError, SamplingParams
from shadowtune.serving.sampling import logits_processors, random_generator, repetition_penalty, sample

TOP_TOKENS = 64
"""Alternatives requested of llama.cpp for each token; the entropy of the others is bounded from above."""


@dataclass(frozen=True)
class DecodingStep:
    """The next token of an answer."""

    token: TokenStatistics
    text: str | None
    """The text it completes; None if only its id is known."""
    count: int
    """Tokens generated so far."""
    complete: bool = False
    """Whether the schema allows nothing more."""


def decoding_steps(
    opened: LoadedModel, ids: list[int], request: GenerationRequest, limit: int, matcher: SchemaMatcher | None = None
) -> Generator[DecodingStep, None, None]:
    """Yield up to ``limit`` tokens after the prompt ``ids``; closing the iterator frees the runtime.

    The caller stops at end tokens. llama.cpp stops by itself at those it knows, and never samples them where they are
    to be ignored; its presence and frequency penalties count the prompt's tokens too. ``follower`` masks the logits by
    the request's JSON schema; with a GGUF file llama.cpp's own grammar does.

    Raises:
        RequestError: for ``min_tokens`` with a GGUF file, or if no token can be sampled.
    """
    runtime, top = opened.runtime, request.top_logprobs or 0
    if limit < 1:
        return
    if isinstance(runtime, GgufModel):
        if request.min_tokens:
            raise RequestError("min_tokens is not supported by a GGUF file; leave it out", param="min_tokens")
        settings = _llama_settings(request.sampling, request.ignore_eos, opened.max_length, opened.generation)
        if request.schema is not None:
            settings["json_schema"] = dict(request.schema)
        for new in runtime.stream(ids, limit, max(top, TOP_TOKENS), **settings):
            token = statistics_from_top(new.id, new.logprob, new.likely, opened.vocabulary, top)
            yield DecodingStep(token, new.text, new.made)
        return
    assert isinstance(runtime, Stepwise)
    warp, source = logits_processors(request.sampling, len(ids), opened.generation), random_generator(request.sampling)
    steps, sequence = runtime.steps(ids), list(ids)
    output = next(steps)
    ends = sorted(opened.ends | set(request.stop_token_ids))
    for count in range(1, limit + 1):
        logits = torch.tensor(output.logits)
        allowed = logits.clone() if matcher is None else matcher.restrict(logits)
        if count <= request.min_tokens:
            allowed[ends] = -torch.inf
        if not math.isfinite(float(allowed.max())):
            raise RequestError("the model's logits are not finite, or no token may follow", 500)
        scores: Any = warp(torch.tensor([sequence]), allowed[None])  # type: ignore[arg-type]
        chosen = sample(scores[0], request.sampling, source)
        if matcher is not None and chosen not in ends:
            matcher.advance(chosen)
        complete = matcher is not None and matcher.complete
        token = with_deferral(statistics_from_logits(logits, chosen, top), output.deferral, opened.deferral_head)
        yield DecodingStep(token, None, count, complete)
        if count < limit:
            sequence.append(chosen)
            output = steps.send(chosen)


def _llama_settings(
    sampling: SamplingParams, ignore_eos: bool, length: int, generation: GenerationConfig | None
) -> dict[str, Any]:
    """Return a request's sampling as llama.cpp's settings, in the order in which ``serving.sampling`` applies it."""
    settings: dict[str, Any] = {
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or 0.0,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": repetition_penalty(sampling, generation),
        "repeat_last_n": length,
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
        "ignore_eos": ignore_eos,
    }
    if sampling.seed is not None:
        settings["seed"] = sampling.seed % (2**32 - 1)  # the largest number asks for a random seed
    return settings
