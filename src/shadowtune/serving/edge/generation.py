"""One answer of a detached model, token by token, in the thread that runs it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from shadowtune.export.opening import OpenModel
from shadowtune.export.runtimes import GgufModel, Stepwise
from shadowtune.serving.constrained import Follower
from shadowtune.serving.edge.signals import Chosen, read_likely, read_logits
from shadowtune.serving.requests import Request, RequestError, Sampling
from shadowtune.serving.sampling import choose, generator, penalty_of, processors

LIKELY = 64
"""Of the likeliest tokens that llama.cpp tells of; the entropy of the others is bounded."""


@dataclass(frozen=True)
class Step:
    """The next token of an answer."""

    token: Chosen
    text: str | None
    """What became readable with it; None if only its id is known."""
    made: int
    """Tokens so far."""
    complete: bool = False
    """Whether the schema lets nothing follow."""


def steps(
    opened: OpenModel, ids: list[int], request: Request, limit: int, follower: Follower | None = None
) -> Iterator[Step]:
    """Give up to ``limit`` tokens after ``ids``, by the request's sampling; closing this frees the runtime.

    llama.cpp stops at the ends that it knows; whoever reads this stops at the others. Where ends are to be ignored it
    never chooses them. Its presence and frequency penalties count the prompt's tokens too. A schema is followed by
    ``follower``, in a GGUF file by llama.cpp's own grammar; llama.cpp knows no ``min_tokens``.
    """
    runtime, top = opened.runtime, request.top_logprobs or 0
    if isinstance(runtime, GgufModel):
        if request.min_tokens:
            raise RequestError("min_tokens is not supported by a GGUF file; leave it out", param="min_tokens")
        settings = _llama_settings(request.sampling, request.ignore_eos, opened.max_length, opened.generation)
        if request.schema is not None:
            settings["json_schema"] = dict(request.schema)
        for heard in runtime.stream(ids, limit, max(top, LIKELY), **settings):
            token = read_likely(heard.id, heard.logprob, heard.likely, opened.vocabulary, top)
            yield Step(token, heard.text, heard.made)
        return
    assert isinstance(runtime, Stepwise)
    warp, source = processors(request.sampling, len(ids), opened.generation), generator(request.sampling)
    going, said = runtime.steps(ids), list(ids)
    logits = torch.tensor(next(going))
    late = sorted(opened.ends | set(request.stop_tokens))
    for made in range(1, limit + 1):
        allowed = logits.clone() if follower is None else follower.restrict(logits)
        if made <= request.min_tokens:
            allowed[late] = -torch.inf
        if not math.isfinite(float(allowed.max())):
            raise RequestError("the model's logits are not finite, or no token may follow", 500)
        scores: Any = warp(torch.tensor([said]), allowed[None])  # type: ignore[arg-type]
        chosen = choose(scores[0], request.sampling, source)
        if follower is not None and chosen not in late:
            follower.advance(chosen)
        complete = follower is not None and follower.complete
        yield Step(read_logits(logits, chosen, top), None, made, complete)
        if made < limit:
            said.append(chosen)
            logits = torch.tensor(going.send(chosen))


def _llama_settings(
    sampling: Sampling, ignore_eos: bool, length: int, generation: GenerationConfig | None
) -> dict[str, Any]:
    """Say a request's sampling in llama.cpp's words, in the order in which ``serving.sampling`` applies it."""
    settings: dict[str, Any] = {
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or 0.0,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": penalty_of(sampling, generation),
        "repeat_last_n": length,
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
        "ignore_eos": ignore_eos,
    }
    if sampling.seed is not None:
        settings["seed"] = sampling.seed % (2**32 - 1)  # the largest number asks for chance
    return settings
