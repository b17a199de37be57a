import asyncio

import pytest

from shadowtune.data.prompt_format import PromptFormat
from shadowtune.export.loading import wrap_model
from shadowtune.serving.edge.confidence import NO_SIGNALS
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.requests import (
    GenerationRequest,
    OutputChunk,
    RequestError,
    RoutingDecision,
    SamplingParams,
    Usage,
)
from shadowtune.serving.simulation.records import measure
from tests.support.bases import tiny_base
from tests.support.tokenizers import tiny_tokenizer


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Slow:
    """Answers "one two", with 2 seconds to its acceptance, 3 to its first piece and 4 to its second."""

    def __init__(self, clock, pieces=None):
        last = OutputChunk(" two", finish_reason="stop", usage=Usage(7, 4))
        self._clock, self._pieces = clock, [(3, OutputChunk("one")), (4, last)] if pieces is None else pieces
        self.decision = RoutingDecision("cloud", "fake")

    async def generate(self, request):
        self._clock.now += 2
        return self

    async def __aiter__(self):
        for seconds, piece in self._pieces:
            self._clock.now += seconds
            yield piece


def measured(pieces=None):
    clock = Clock()
    scored = measure(
        Slow(clock, pieces), GenerationRequest("m"), lambda text: float(text == "one two"), lambda t: [len(t)], clock
    )
    return asyncio.run(scored)


def test_seconds_run_from_asking_to_the_first_piece_and_to_the_last():
    answered = measured()
    assert (answered.first_seconds, answered.seconds) == (5, 9)
    assert (answered.text, answered.score, answered.tokens) == ("one two", 1, [7])
    assert (answered.prompt_tokens, answered.completion_tokens) == (7, 4)
    assert answered.signals == NO_SIGNALS


def test_an_answer_without_pieces_is_an_empty_one():
    answered = measured([])
    assert (answered.text, answered.score, answered.seconds, answered.first_seconds) == ("", 0, 2, 2)


def test_a_model_of_ours_tells_how_sure_it_was_and_a_failure_is_an_error():
    tokenizer = tiny_tokenizer()
    model = LocalModel(wrap_model(tiny_base(), tokenizer, PromptFormat()), "m")

    async def ask(name):
        request = GenerationRequest(name, prompt=[5, 6, 7], max_tokens=3, sampling=SamplingParams(temperature=0))
        return await measure(model, request, lambda text: 0.5, lambda text: tokenizer(text)["input_ids"])

    answered = asyncio.run(ask("m"))
    assert 0 < answered.signals.logprob < 1
    assert answered.signals.length == answered.completion_tokens
    assert 0 < answered.first_seconds <= answered.seconds
    with pytest.raises(RequestError, match="no model"):
        asyncio.run(ask("other"))
