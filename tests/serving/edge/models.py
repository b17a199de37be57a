"""Tiny detached models on disk in every format, and complete answers of them."""

import asyncio
import importlib.util
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from shadowtune.config.serving import CloudConfig, PolicyConfig, ServerConfig
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.export.exporting import FORMATS
from shadowtune.export.loading import load_model, wrap_model
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.edge.remote import RemoteEndpoint
from shadowtune.serving.edge.router import Router
from shadowtune.serving.http.app import create_app
from shadowtune.serving.requests import GenerationRequest, SamplingParams
from tests.export.support import plain_model
from tests.serving.engine.support import adapter, engine
from tests.support.bases import tiny_base

FORMAT = PromptFormat("say {text}", chat_template=False)
PROMPT = [5, 6, 7, 8]
NEEDED = {"safetensors": "torch", "onnx": "onnxruntime", "gguf": "xllamacpp"}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"))
    for kind, package in NEEDED.items()
]
GREEDY = SamplingParams(temperature=0)


def write(kind: str, folder: Path, end: int | None = None) -> Path:
    """Write a tiny model in one format; ``end`` is the token that ends its answers."""
    model, tokenizer = plain_model()
    if end is not None:
        model.generation_config.eos_token_id = end
    path = folder / ("model.gguf" if kind == "gguf" else kind)
    if kind != "gguf":
        path.mkdir()
    FORMATS[kind].write(model, tokenizer, path, "f32", FORMAT)
    return path


def local(kind: str, folder: Path, end: int | None = None, **settings) -> LocalModel:
    """Open a tiny model as a backend named "tiny"."""
    return LocalModel(load_model(write(kind, folder, end)), "tiny", **settings)


def ask(**fields) -> GenerationRequest:
    """A greedy request for 6 tokens after PROMPT."""
    return GenerationRequest(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "sampling": GREEDY, **fields})


async def gather(backend, request: GenerationRequest):
    """Return the chunks of a stream, and the stream."""
    answer = await backend.generate(request)
    return [piece async for piece in answer], answer


def answered(backend, request: GenerationRequest):
    """The same, and close the backend."""

    async def run():
        try:
            return await gather(backend, request)
        finally:
            await backend.aclose()

    return asyncio.run(run())


def text(chunks) -> str:
    """The text of a stream's chunks."""
    return "".join(chunk.text for chunk in chunks)


def through_both_sides(seed: int, request: GenerationRequest, policy: PolicyConfig):
    """Ask a router between an adapter's engine, as the cloud "big", and its detached model, as the edge "tiny".

    Returns:
        The chunks of the cloud alone, of the edge alone and of the router, and the router's decision.
    """
    model, tokenizer = adapter(tiny_base(), seed=seed), plain_model()[1]

    async def run():
        cloud_engine = engine({"big": model})
        app = create_app(cloud_engine, ServerConfig(), "cloud")
        cloud = RemoteEndpoint(CloudConfig("http://cloud", model="big"), httpx2.ASGITransport(app))
        edge = LocalModel(wrap_model(model.detached(), tokenizer, FORMAT), "tiny")
        router = Router(edge, cloud, policy)
        own, _ = await gather(cloud_engine, replace(request, model="big"))
        alone, _ = await gather(edge, request)
        chunks, stream = await gather(router, request)
        await router.aclose()
        await cloud_engine.aclose()
        return own, alone, chunks, stream.decision

    return asyncio.run(run())
