import asyncio

import pytest

from shadowtune.serving.engine.engine import EngineStream
from shadowtune.serving.requests import OutputChunk, RequestError, RoutingDecision

DECISION = RoutingDecision("cloud", "attached")


def test_pieces_come_in_order_and_the_end_can_be_read_again():
    async def main():
        ended = []
        answer = EngineStream(DECISION, ended.append)
        for item in (OutputChunk("a"), OutputChunk("b", finish_reason="stop"), None):
            await asyncio.to_thread(answer.deliver, item)
        texts = [piece.text async for piece in answer]
        again = [piece.text async for piece in answer]
        return texts, again, ended == [answer]

    assert asyncio.run(main()) == (["a", "b"], [], True)


def test_an_error_is_raised_where_the_pieces_end():
    async def main():
        answer = EngineStream(DECISION, lambda ended: None)
        for item in (OutputChunk("a"), RequestError("it failed", 500), None):
            answer.deliver(item)
        reading = answer.__aiter__()
        first = await reading.__anext__()
        with pytest.raises(RequestError, match="it failed"):
            await reading.__anext__()
        await answer.aclose()
        return first.text

    assert asyncio.run(main()) == "a"


def test_closing_asks_to_stop_once_and_waits_for_the_end():
    async def main():
        answer, asked = EngineStream(DECISION, lambda ended: None), []
        answer.cancel = lambda: asked.append(1)
        closing = asyncio.create_task(answer.aclose())
        await asyncio.sleep(0)
        assert not closing.done()
        answer.deliver(None)
        await closing
        await answer.aclose()
        return asked

    assert asyncio.run(main()) == [1]


def test_a_stream_whose_loop_is_closed_cancels_and_is_released():
    ended, asked = [], []

    async def main():
        answer = EngineStream(DECISION, ended.append)
        answer.cancel = lambda: asked.append(1)
        return answer

    answer = asyncio.run(main())
    answer.deliver(OutputChunk("a"))
    assert (len(asked), ended) == (1, [])
    answer.deliver(None)
    assert ended == [answer]
