"""One request, one answer, and how long it took."""

import time
from collections.abc import Callable

from shadowtune.serving.edge.local import LocalAnswer
from shadowtune.serving.edge.signals import NOTHING
from shadowtune.serving.requests import Answerer, Request, Usage
from shadowtune.serving.simulation.records import Answered


async def measure(
    answerer: Answerer,
    request: Request,
    score: Callable[[str], float],
    tokenize: Callable[[str], list[int]],
    clock: Callable[[], float] = time.perf_counter,
) -> Answered:
    """Ask, and wait for the whole answer.

    Args:
        answerer: with nothing else to do.
        request: what is asked.
        score: gives an answer between 0 and 1.
        tokenize: the same for both sides, so that their answers can be compared token by token.
        clock: tells the seconds.

    Raises:
        RequestError: if it cannot be answered.
    """
    begun = clock()
    answer = await answerer.answer(request)
    first, text, usage = None, "", Usage(0, 0)
    async for piece in answer:
        first = clock() if first is None else first
        text += piece.text
        usage = piece.usage or usage
    ended = clock()
    return Answered(
        text,
        score(text),
        ended - begun,
        (ended if first is None else first) - begun,
        usage.prompt_tokens,
        usage.completion_tokens,
        tokenize(text),
        answer.signals if isinstance(answer, LocalAnswer) else NOTHING,
    )
