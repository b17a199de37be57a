"""Tiny detached models on disk in every format, and complete answers of them."""

import asyncio
import importlib.util
from pathlib import Path

import pytest

from shadowtune.data.prompt_format import PromptFormat
from shadowtune.export.exporting import FORMATS
from shadowtune.export.loading import load_model
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.requests import GenerationRequest, SamplingParams
from tests.export.support import plain_model

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
