"""Tiny engines, and the reference output: greedy ``generate`` of the model alone."""

import asyncio
from typing import Any

import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.requests import GenerationRequest, OutputChunk, RequestError, SamplingParams
from tests.support.bases import tiny_base
from tests.support.shadows import perturb, tokens
from tests.support.tokenizers import tiny_tokenizer

GREEDY = SamplingParams(temperature=0)


def adapter(base: Any, seed: int = 1, **settings: Any) -> ShadowForCausalLM:
    """A perturbed shadow beside this very base."""
    settings = {"rank": 4, "update_width": 3, "alpha": 0.7, **settings}
    torch.manual_seed(seed)
    return perturb(ShadowForCausalLM.from_base(base, ShadowConfig(**settings)), seed).eval()


def engine(models: dict[str, ShadowForCausalLM], base: Any = None, open_adapter: Any = None, **limits: Any) -> Engine:
    """An engine over models of one base."""
    base = base if base is not None else next(iter(models.values())).base
    loaded = {name: (model, PromptFormat()) for name, model in models.items()}
    return Engine(base, tiny_tokenizer(), loaded, Limits(**limits), open_adapter)


def one_model(model_type: str = "llama", **settings: Any) -> dict[str, ShadowForCausalLM]:
    return {"a": adapter(tiny_base(model_type), **settings)}


def prompt(length: int, seed: int | None = None) -> list[int]:
    return tokens(1, length, seed=length if seed is None else seed)[0].tolist()


def request(model: str = "a", length: int = 5, **settings: Any) -> GenerationRequest:
    """A greedy request that runs to its end and tells its tokens."""
    plain = {"prompt": prompt(length), "max_tokens": 12, "sampling": GREEDY, "ignore_eos": True, "top_logprobs": 0}
    return GenerationRequest(model, **{**plain, **settings})


async def pieces_of(answer: Any) -> list[OutputChunk]:
    return [piece async for piece in answer]


async def ask(served: Engine, asked: GenerationRequest) -> tuple[list[int], list[OutputChunk]]:
    """The tokens told, and all pieces."""
    pieces = await pieces_of(await served.generate(asked))
    return [token.id for piece in pieces for token in piece.tokens], pieces


async def ask_all(served: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    """The tokens of answers that are given at once."""
    return [ids for ids, _ in await asyncio.gather(*(ask(served, asked) for asked in requests))]


def with_engine(served: Engine, work: Any) -> Any:
    """Run ``work(engine)`` in an event loop and close the engine, whatever happens."""

    async def main() -> Any:
        try:
            return await asyncio.wait_for(work(served), 120)
        finally:
            await served.aclose()

    return asyncio.run(main())


def answers(served: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    """The tokens of all answers, asked for at once."""
    return with_engine(served, lambda each: ask_all(each, requests))


@torch.no_grad()
def alone(model: Any, ids: list[int], new: int = 12) -> list[int]:
    """What greedy ``generate`` says of one prompt, without an end."""
    inputs = torch.tensor([ids])
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    return model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)[0, len(ids) :].tolist()


class Collected(list):
    """Takes what an engine delivers, outside any event loop."""

    def __call__(self, item: OutputChunk | RequestError | None) -> None:
        self.append(item)
