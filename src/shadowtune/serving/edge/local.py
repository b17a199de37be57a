"""The detached model as an Answerer: one request at a time in a thread of its own, the others in a bounded queue."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from shadowtune.data.encoding import prompt_ids
from shadowtune.errors import DataError
from shadowtune.export.opening import OpenModel
from shadowtune.serving.edge.generation import steps
from shadowtune.serving.edge.signals import NOTHING, Chosen, Signals, signals_of
from shadowtune.serving.requests import Decision, FinishReason, ModelCard, Piece, Request, RequestError, Token, Usage
from shadowtune.serving.wording import Wording


class LocalAnswer:
    """An answer of a detached model that is on its way."""

    def __init__(self, opened: OpenModel, request: Request, ids: list[int], limit: int) -> None:
        self.decision = Decision("edge", "detached")
        self.signals: Signals = NOTHING
        """How sure the model was; complete once the last piece has come."""
        self.prompt_tokens = len(ids)
        self._opened, self._request, self._ids, self._limit = opened, request, ids, limit
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._ended, self._stopped = asyncio.Event(), threading.Event()

    def start(self, executor: ThreadPoolExecutor) -> None:
        """Stand in line for the thread."""
        self._future = executor.submit(self._run)
        self._future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._end))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Give the pieces as they come.

        Raises:
            RequestError: if the model fails.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        failure = None if self._future.cancelled() else self._future.exception()
        if failure is not None:
            raise RequestError(f"the edge's model failed: {type(failure).__name__}", 500) from failure

    async def aclose(self) -> None:
        """Stop at the next token, and wait until the thread is free."""
        self._stopped.set()
        self._future.cancel()  # if it still stands in line
        await self._ended.wait()

    @property
    def ended(self) -> bool:
        """Whether it holds nothing any more."""
        return self._ended.is_set()

    async def wait(self) -> None:
        """Wait until it holds nothing any more."""
        await self._ended.wait()

    def _end(self) -> None:
        self._ended.set()
        self._pieces.put_nowait(None)

    def _run(self) -> None:
        for piece in self._answer():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def _answer(self) -> Iterator[Piece]:
        request, ends = self._request, self._opened.ends
        wording = Wording(self._opened.tokenizer, request.stop)
        said: list[Chosen] = []
        made, reason = 0, "length"
        going = steps(self._opened, self._ids, request, self._limit)
        try:
            for step in going:
                said.append(step.token)
                made = step.made
                if step.token.id in ends and not request.ignore_eos:
                    reason = "stop"
                    break
                text = wording.add(step.token.id) if step.text is None else wording.say(step.text)
                yield Piece(text, self._told(step.token))
                if wording.stopped:
                    reason = "stop"
                    break
                if self._stopped.is_set():
                    return
        finally:
            going.close()  # type: ignore[attr-defined]
        self.signals = signals_of(said)
        finish: FinishReason = "stop" if reason == "stop" else "length"
        yield Piece(wording.end(), (), finish, Usage(len(self._ids), made))

    def _told(self, token: Chosen) -> tuple[Token, ...]:
        if self._request.top_logprobs is None:
            return ()
        text = partial(self._opened.tokenizer.decode, skip_special_tokens=False)
        top = tuple((other, str(text([other])), logprob) for other, logprob in token.top)
        return (Token(token.id, str(text([token.id])), token.logprob, top),)


class LocalModel:
    """A detached model that answers requests.

    Args:
        opened: the model with its tokenizer.
        name: that requests name it by.
        max_queue: requests that may wait while one is answered.
    """

    def __init__(self, opened: OpenModel, name: str, max_queue: int = 32) -> None:
        self._opened, self._name, self._max_queue = opened, name, max_queue
        self._created = int(time.time())
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="edge-model")
        self._answers: set[LocalAnswer] = set()
        self._closing = False

    def models(self) -> list[ModelCard]:
        """The one model."""
        opened = self._opened
        runtime, form = type(opened.runtime).__name__, opened.prompt_format
        reads = (form.takes_conversations(opened.tokenizer), form.further_fields)
        return [ModelCard(self._name, self._created, opened.max_length, runtime, *reads)]

    def counters(self) -> dict[str, float]:
        """Requests that are answered and that wait, at this moment."""
        begun = len(self._begun())
        return {"running": min(begun, 1), "waiting": max(begun - 1, 0)}

    async def answer(self, request: Request) -> LocalAnswer:
        """Put a request in line.

        Raises:
            RequestError: 400 if its prompt cannot be read or is too long, 404 for another model, 429 if the line is
                full, 503 if the model is being closed.
        """
        if request.model != self._name:
            raise RequestError(f"there is no model {request.model!r}; this server has {self._name}", 404, "model")
        if self._closing:
            raise RequestError("the server is shutting down; ask another one", 503)
        if len(self._begun()) > self._max_queue:
            raise RequestError(f"{self._max_queue} requests wait already; ask again later", 429)
        ids = self._encode(request)
        self._check_tokens("logit_bias", request.sampling.logit_bias)
        answer = LocalAnswer(self._opened, request, ids, self._room(request, len(ids)))
        answer.start(self._executor)
        self._answers.add(answer)
        return answer

    async def aclose(self) -> None:
        """Accept nothing more, finish what was begun, and end the thread."""
        self._closing = True
        for answer in self._begun():
            await answer.wait()
        self._executor.shutdown()

    def _begun(self) -> list[LocalAnswer]:
        self._answers = {answer for answer in self._answers if not answer.ended}
        return list(self._answers)

    def _encode(self, request: Request) -> list[int]:
        opened, place = self._opened, "prompt" if request.messages is None else "messages"
        try:
            if request.messages is not None:
                extra = (request.tools, request.chat_template_kwargs, request.fields)
                return opened.prompt_format.encode(request.messages, opened.tokenizer, *extra)
            given = request.prompt or ()
            ids = prompt_ids(given, opened.tokenizer, False) if isinstance(given, str) else list(given)
        except DataError as error:
            raise RequestError(str(error), param=place) from None
        if not ids:
            raise RequestError("the prompt is empty", param="prompt")
        self._check_tokens("prompt", ids)
        return ids

    def _check_tokens(self, place: str, ids: Iterable[int]) -> None:
        last = self._opened.vocabulary - 1
        if not all(0 <= token <= last for token in ids):
            raise RequestError(f"{place} has token ids outside 0 to {last}", param=place)

    def _room(self, request: Request, prompt: int) -> int:
        """Return how many tokens the answer may have."""
        room = self._opened.max_length - prompt
        wanted = request.wanted(room)
        if room < 1 or wanted > room:
            asked = f"{prompt} tokens" + ("" if request.max_tokens is None else f" and an answer of {wanted}")
            raise RequestError(
                f"a prompt of {asked} does not fit the model's {self._opened.max_length} positions; shorten it",
                param="messages" if request.prompt is None else "prompt",
            )
        if wanted < 1:
            raise RequestError(f"max_tokens must be at least 1, got {wanted}", param="max_tokens")
        return wanted
