"""Constrained decoding: output fits its schema in the engine, with drafts, and at the edge."""

import asyncio
import json

import pytest
import torch

pytest.importorskip("llguidance")

from shadowtune.data.prompt_format import PromptFormat
from shadowtune.export.loading import LoadedModel
from shadowtune.export.runtimes import TorchModel
from shadowtune.serving.constrained import SchemaCompiler, close_objects
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.scheduler import Limits
from shadowtune.serving.requests import GenerationRequest, RequestError, SamplingParams
from tests.serving.engine.support import adapter, alone, ask, prompt, request, with_engine
from tests.support.bases import VOCABULARY, tiny_base
from tests.support.tokenizers import tiny_tokenizer

MARKS = '{}[]"'
SCHEMA = {
    "type": "object",
    "properties": {
        "sure": {"type": "boolean"},
        "kind": {"enum": ["tea", "coffee"]},
        "cups": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    },
    "required": ["sure", "kind", "cups"],
    "additionalProperties": False,
}


def fits(text):
    told = json.loads(text)
    assert list(told) == ["sure", "kind", "cups"] and told["kind"] in ("tea", "coffee")
    assert isinstance(told["sure"], bool) and len(told["cups"]) == 2
    return True


def served(models, base, **limits):
    loaded = {name: (model, PromptFormat()) for name, model in models.items()}
    return Engine(base, tiny_tokenizer(more=MARKS), loaded, Limits(**limits))


def wanted(model="a", temperature=0.0, **settings):
    sampling = SamplingParams(temperature=temperature, seed=settings.pop("seed", None))
    plain = {"schema": SCHEMA, "max_tokens": 100, "ignore_eos": False, "sampling": sampling}
    return request(model, **{**plain, **settings})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_fits_its_schema_and_stops_there(temperature):
    base = tiny_base()
    engine = served({"a": adapter(base)}, base)

    async def work(each):
        return await asyncio.gather(*(ask(each, wanted(temperature=temperature, seed=seed)) for seed in range(4)))

    for _, pieces in with_engine(engine, work):
        assert fits("".join(piece.text for piece in pieces)) and pieces[-1].finish_reason == "stop"


def test_drafts_change_nothing_and_neighbours_stay_as_they_are():
    base = tiny_base()
    models = {"a": adapter(base)}

    async def work(each):
        free, *constrained = await asyncio.gather(
            ask(each, request()), ask(each, wanted(speculate=True)), ask(each, wanted(speculate=False))
        )
        return free[0], [tokens for tokens, _ in constrained]

    free, (drafted, plain) = with_engine(served(models, base), work)
    assert free == alone(models["a"], prompt(5))
    assert drafted == plain


def test_a_prediction_changes_nothing():
    base = tiny_base()

    async def work(each):
        tokens, pieces = await ask(each, wanted())
        text = "".join(piece.text for piece in pieces)
        again, told = await ask(each, wanted(prediction=text))
        return tokens, again, told[-1].usage.accepted_prediction_tokens

    tokens, again, accepted = with_engine(served({"a": adapter(base)}, base), work)
    assert again == tokens and accepted > 0


def test_any_object():
    base = tiny_base()

    async def work(each):
        return await ask(
            each, wanted(schema={"type": "object", "maxProperties": 1, "additionalProperties": {"const": 1}})
        )

    _, pieces = with_engine(served({"a": adapter(base)}, base), work)
    text = "".join(piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "length" or isinstance(json.loads(text), dict)
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "string", "pattern": "("},
        {"$ref": "#/nowhere"},
        {"enum": []},
        {"type": "object", "properties": 7},
        {"enum": ["x" * 200_000]},
        {"type": "string", "minLength": 5, "maxLength": 2},
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_is_refused(schema):
    base = tiny_base()

    async def work(each):
        with pytest.raises(RequestError) as refused:
            await each.generate(wanted(schema=schema))
        return refused.value

    error = with_engine(served({"a": adapter(base)}, base), work)
    assert (error.status, error.param) == (400, "response_format") and "\n" not in str(error)


def test_a_vocabulary_that_cannot_write_it_is_an_error():
    matcher = SchemaCompiler(tiny_tokenizer(), VOCABULARY, frozenset({2})).compile({"type": "object"})
    with pytest.raises(RequestError):
        matcher.advance(int(matcher.restrict(torch.zeros(VOCABULARY)).argmax()))


def test_the_edge_fits_it_too():
    base = tiny_base()
    tokenizer = tiny_tokenizer(more=MARKS)
    opened = LoadedModel(TorchModel(base), tokenizer, PromptFormat(), frozenset({2}), 128, VOCABULARY)
    model = LocalModel(opened, "a")

    async def work():
        answers = []
        for seed in range(3):
            asked = GenerationRequest(
                "a", prompt=[5, 6], schema=SCHEMA, sampling=SamplingParams(seed=seed), max_tokens=100
            )
            pieces = [piece async for piece in await model.generate(asked)]
            answers.append(("".join(piece.text for piece in pieces), pieces[-1].finish_reason))
        await model.aclose()
        return answers

    for text, reason in asyncio.run(work()):
        assert fits(text) and reason == "stop"


def test_stop_tokens_end_and_least_tokens_hold():
    base = tiny_base()
    models = {"a": adapter(base)}
    said = alone(models["a"], prompt(5))
    stop = said[4]
    first = said.index(stop)

    async def work(each):
        stopped = await ask(each, request(stop_token_ids=(stop,)))
        later = await ask(each, request(stop_token_ids=(stop,), min_tokens=first + 3))
        return stopped, later

    (tokens, pieces), (later, _) = with_engine(served(models, base), work)
    assert tokens == said[:first] and pieces[-1].finish_reason == "stop"
    assert len(later) >= first + 3 and stop not in later[: first + 3]
    assert later[:first] == said[:first]


def test_objects_that_list_their_properties_are_closed():
    inner = {"type": "object", "properties": {"b": {"type": "integer"}}}
    schema = {"properties": {"a": inner, "c": {"items": inner}}, "$defs": {"d": inner}, "default": {"properties": {}}}
    told = close_objects(schema)
    assert told["additionalProperties"] is told["properties"]["a"]["additionalProperties"] is False
    assert (
        told["properties"]["c"]["items"]["additionalProperties"] is told["$defs"]["d"]["additionalProperties"] is False
    )
    assert told["default"] == {"properties": {}} and "additionalProperties" not in inner


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"properties": {}, "additionalProperties": True},
        {"properties": {}, "patternProperties": {"^x": {}}},
        {"properties": {}, "anyOf": [{"properties": {"a": {}}}]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
    ],
)
def test_others_stay_open(schema):
    assert close_objects(schema) == schema
