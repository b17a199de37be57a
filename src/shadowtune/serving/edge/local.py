"""The detached model as an Answerer: one request at a time in a thread of its own, the others in a bounded queue."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

from shadowtune.data.encoding import prompt_ids
from shadowtune.errors import DataError
from shadowtune.export.opening import OpenModel
from shadowtune.export.runtimes import GgufModel
from shadowtune.serving.background import DaemonThread, SharedWork
from shadowtune.serving.constrained import Follower, Schemas
from shadowtune.serving.conversation import check_characters, conversation_ids, longest_token
from shadowtune.serving.edge.generation import steps
from shadowtune.serving.edge.signals import NOTHING, Chosen, Signals, signals_of
from shadowtune.serving.requests import Decision, FinishReason, ModelCard, Piece, Request, RequestError, Token, Usage
from shadowtune.serving.wording import Wording

LOGGER = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0
"""For which an answer that was told to stop is waited for; a model that hangs is left behind."""


class LocalAnswer:
    """An answer of a detached model that is on its way."""

    def __init__(
        self, opened: OpenModel, request: Request, ids: list[int], limit: int, follower: Follower | None = None
    ) -> None:
        self.decision = Decision("edge", "detached")
        self.signals: Signals = NOTHING
        """How sure the model was; complete once the last piece has come."""
        self.prompt_tokens = len(ids)
        self.owner = request.owner
        self.future: Future[None] = Future()
        """Of its run."""
        self._opened, self._request, self._ids, self._limit, self._follower = opened, request, ids, limit, follower
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._ended, self._stopped = asyncio.Event(), threading.Event()
        self.future.add_done_callback(lambda _: self._tell(self._end))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Give the pieces as they come.

        Raises:
            RequestError: if the model fails.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        failure = None if self.future.cancelled() else self.future.exception()
        if isinstance(failure, RequestError):
            raise failure
        if failure is not None:
            raise RequestError(f"the edge's model failed: {type(failure).__name__}", 500) from failure

    async def aclose(self) -> None:
        """Stop at the next token, and wait until the thread is free."""
        self.stop()
        await self._ended.wait()

    def stop(self) -> None:
        """Ask it to stop at the next token."""
        self._stopped.set()
        self.future.cancel()  # if it still stands in line

    @property
    def ended(self) -> bool:
        """Whether it holds nothing any more."""
        return self._ended.is_set()

    async def wait(self) -> None:
        """Wait until it holds nothing any more."""
        await self._ended.wait()

    def run(self) -> None:
        """Answer, in the model's thread."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            for piece in self._answer():
                self._tell(partial(self._pieces.put_nowait, piece))
        except BaseException as error:  # who reads the answer gets it
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.future.set_result(None)

    def _tell(self, what: "partial[None] | object") -> None:
        try:
            self._loop.call_soon_threadsafe(what)  # type: ignore[arg-type]
        except RuntimeError:  # the loop is closed: nobody listens
            self._stopped.set()

    def _end(self) -> None:
        self._ended.set()
        self._pieces.put_nowait(None)

    def _answer(self) -> Iterator[Piece]:
        request = self._request
        ends = (frozenset() if request.ignore_eos else self._opened.ends) | set(request.stop_tokens)
        wording = Wording(self._opened.tokenizer, request.stop, request.min_tokens)
        said: list[Chosen] = []
        made, reason = 0, "length"
        going = steps(self._opened, self._ids, request, self._limit, self._follower)
        try:
            for step in going:
                said.append(step.token)
                made = step.made
                if step.token.id in ends:
                    reason = "stop"
                    break
                text = wording.add(step.token.id) if step.text is None else wording.say(step.text)
                yield Piece(text, self._told(step.token), running=Usage(len(self._ids), made))
                if wording.stopped or step.complete:
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
        close_seconds: for which what was begun may go on after ``aclose``.
    """

    def __init__(self, opened: OpenModel, name: str, max_queue: int = 32, close_seconds: float = 30.0) -> None:
        self._opened, self._name, self._max_queue, self._close_seconds = opened, name, max_queue, close_seconds
        self._created = int(time.time())
        self._thread, self._reading = DaemonThread("edge-model"), SharedWork("edge-prompts")
        self._answers: set[LocalAnswer] = set()
        self._line: list[LocalAnswer] = []
        self._served: dict[str, int] = {}
        self._longest_token = longest_token(opened.tokenizer)
        self._schemas = Schemas(opened.tokenizer, opened.vocabulary, opened.ends)
        self._closing = False
        self._failure: str | None = None

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

    def failure(self) -> str | None:
        """Why it can never answer again; None while it can."""
        return self._failure

    async def answer(self, request: Request) -> LocalAnswer:
        """Put a request in line.

        Raises:
            RequestError: 400 if its prompt cannot be read or is too long, 404 for another model, 429 if the line is
                full, 503 if the model is being closed, or can answer no more.
        """
        self._check_room(request)
        self._check_tokens("logit_bias", request.sampling.logit_bias)
        self._check_tokens("stop_token_ids", request.stop_tokens)
        check_characters(request, self._opened.max_length, self._longest_token)
        ids = await self._reading.run(request.prompt_key, partial(self._encode, request))
        limit = self._room(request, len(ids))
        follower = None
        if request.schema is not None and not isinstance(self._opened.runtime, GgufModel):
            follower = await self._reading.run(object(), partial(self._schemas.follower, request.schema))
        self._check_room(request)  # meanwhile there may be less of it
        answer = LocalAnswer(self._opened, request, ids, limit, follower)
        self._answers.add(answer)
        self._line.append(answer)
        self._thread.submit(self._next).add_done_callback(self._note)
        return answer

    async def tokenize(self, request: Request) -> list[int]:
        """Return the token ids of a request's prompt; raises RequestError as ``answer``."""
        self._check_name(request.model)
        check_characters(request, self._opened.max_length, self._longest_token)
        return await self._reading.run(request.prompt_key, partial(self._encode, request))

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included; raises RequestError for ids that are none."""
        self._check_name(model)
        self._check_tokens("tokens", tokens)
        decode = partial(self._opened.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(await self._reading.run(object(), partial(decode, list(tokens))))

    async def aclose(self) -> None:
        """Accept nothing more, finish what was begun, as far as the time allows, and end the thread."""
        self._closing = True
        waiting = [asyncio.ensure_future(answer.wait()) for answer in self._begun()]
        if waiting:
            await asyncio.wait(waiting, timeout=self._close_seconds)
        for answer in self._begun():
            answer.stop()
        if waiting:
            await asyncio.wait(waiting, timeout=CLOSE_SECONDS)
        for task in waiting:
            task.cancel()
        if self._begun() or not await asyncio.to_thread(self._thread.close, CLOSE_SECONDS):
            self._failure = f"the model did not stop within {self._close_seconds + CLOSE_SECONDS:g} s of closing"
        await asyncio.to_thread(self._reading.close, CLOSE_SECONDS)

    def _next(self) -> None:
        """Run the waiting answer of the owner who was served the least since the line was last empty."""
        for answer in [answer for answer in self._line if answer.future.done()]:
            self._line.remove(answer)
        line = list(self._line)
        if not line:
            return
        answer = min(line, key=lambda each: self._served.get(each.owner, 0))  # of equals the first
        self._line.remove(answer)
        self._served = {each.owner: self._served.get(each.owner, 0) for each in line}
        self._served[answer.owner] += 1
        answer.run()

    def _note(self, future: "Future[None]") -> None:
        """Note what no answer can recover from: errors that are no ``Exception``."""
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failure = type(error).__name__
            LOGGER.critical("the edge's model can answer no more", exc_info=error)
            for answer in list(self._line):
                answer.stop()

    def _begun(self) -> list[LocalAnswer]:
        self._answers = {answer for answer in self._answers if not answer.ended}
        return list(self._answers)

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise RequestError(f"there is no model {name!r}; this server has {self._name}", 404, "model")

    def _check_room(self, request: Request) -> None:
        self._check_name(request.model)
        if self._failure is not None:
            raise RequestError(f"the edge's model can answer no more: {self._failure}", 503)
        if self._closing:
            raise RequestError("the server is shutting down; ask another one", 503)
        if len(self._begun()) > self._max_queue:
            raise RequestError(f"{self._max_queue} requests wait already; ask again later", 429)

    def _encode(self, request: Request) -> list[int]:
        opened, place = self._opened, "prompt" if request.messages is None else "messages"
        try:
            if request.messages is not None:
                return conversation_ids(request, opened.prompt_format, opened.tokenizer)
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
        if request.min_tokens > wanted:
            message = f"min_tokens {request.min_tokens} is more than the {wanted} tokens that the answer may have"
            raise RequestError(message, param="min_tokens")
        return wanted
