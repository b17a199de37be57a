"""A base's own penalties hold in generate, in evaluate and in both servers, unless a request overrides them."""

import pytest
import torch
from transformers import GenerationConfig

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.data.generation import generate_answers
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.evaluation.generation import GenerationOptions as Asked
from shadowtune.evaluation.generation import generate_answer
from shadowtune.export.exporting import FORMATS
from shadowtune.export.loading import load_model
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.requests import GenerationRequest, SamplingParams
from shadowtune.serving.sampling import logits_processors, repetition_penalty
from tests.export.support import plain_model
from tests.serving.edge.models import KINDS, answered
from tests.support.shadows import perturbed_model, tokens
from tests.support.tokenizers import tiny_tokenizer

PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (4, 7, 9)]


def said(backend, name, prompt, count=10, **sampling):
    request = GenerationRequest(
        name, prompt=prompt, max_tokens=count, ignore_eos=True, sampling=SamplingParams(temperature=0, **sampling)
    )
    pieces, _ = answered(backend(), request)
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("speculation", [None, SpeculationConfig()], ids=["plain", "drafting"])
def test_the_engine_penalizes_as_generate_and_evaluate_do(speculation):
    model, tokenizer = perturbed_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    for settings in ({"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(4, 60))}):
        model.generation_config = GenerationConfig(**settings)

        def engine():
            served = {"a": (model, PromptFormat())}
            return Engine(model.base, tokenizer, served, Limits(speculation=speculation))

        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            expected = model.generate(ids, max_new_tokens=10, do_sample=False)[0, len(prompt) :].tolist()
            assert said(engine, "a", prompt) == tokenizer.decode(expected, skip_special_tokens=True), settings
    model.generation_config = GenerationConfig(repetition_penalty=1.8)
    plain = [said(engine, "a", prompt, repetition_penalty=1.0) for prompt in PROMPTS]
    assert plain != [said(engine, "a", prompt) for prompt in PROMPTS], "the request's own number holds"


@pytest.mark.parametrize("kind", KINDS)
def test_the_edge_penalizes_in_every_format(kind, tmp_path):
    model, tokenizer = plain_model()
    model.generation_config = GenerationConfig(repetition_penalty=1.8, eos_token_id=2)
    path = tmp_path / ("model.gguf" if kind == "gguf" else kind)
    if kind != "gguf":
        path.mkdir()
    FORMATS[kind].write(model, tokenizer, path, "f32", PromptFormat())
    opened = load_model(path)
    assert repetition_penalty(SamplingParams(), opened.generation) == pytest.approx(1.8)
    model.generation_config.eos_token_id = None
    for prompt in PROMPTS:
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        if 2 in expected.tolist():
            continue  # llama.cpp never chooses an end that is ignored
        found = said(lambda: LocalModel(opened, "tiny"), "tiny", prompt, 8)
        assert found == tokenizer.decode(expected, skip_special_tokens=True)


def test_generate_and_evaluate_take_the_models_penalty_and_no_way_of_drawing():
    model, tokenizer = perturbed_model(), tiny_tokenizer()
    model.generation_config = GenerationConfig(repetition_penalty=1.8, eos_token_id=2, top_k=1, temperature=0.1)
    greedy = generate_answer(model, tokenizer, "say one", Asked(8)).answer
    ids = PromptFormat().prompt_ids("say one", tokenizer)
    assert generate_answers(model, tokenizer, [ids], 8)[0] == [greedy.strip()]
    drawn = {
        generate_answer(model, tokenizer, "say one", Asked(8, temperature=2.0, seed=seed)).answer for seed in range(4)
    }
    assert len(drawn) > 1, "the base's top_k=1 would leave nothing to draw from"


def test_a_request_without_a_penalty_has_the_models():
    assert repetition_penalty(SamplingParams(), None) == 1.0
    assert repetition_penalty(SamplingParams(), GenerationConfig(repetition_penalty=1.4)) == 1.4
    assert repetition_penalty(SamplingParams(repetition_penalty=1.0), GenerationConfig(repetition_penalty=1.4)) == 1.0
    assert len(logits_processors(SamplingParams(temperature=0), 3, GenerationConfig(repetition_penalty=1.4))) == 1
