"""Backend of a detached model: one request at a time in a thread of its own, the others in a bounded queue."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from shadowtune.export.loading import LoadedModel
from shadowtune.export.runtimes import GgufModel
from shadowtune.serving.background import DaemonThread, SharedWork
from shadowtune.serving.constrained import SchemaCompiler, SchemaMatcher
from shadowtune.serving.detokenizer import IncrementalDetokenizer
from shadowtune.serving.edge.confidence import NO_SIGNALS, Signals, TokenStatistics, signals_of, with_deferral
from shadowtune.serving.edge.generation import decoding_steps
from shadowtune.serving.requests import (
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    ModelCard,
    OutputChunk,
    RequestError,
    RoutingDecision,
    Usage,
)
from shadowtune.serving.validation import RequestValidator

LOGGER = logging.getLogger(__name__)
StopsBefore = Callable[[TokenStatistics, int], bool]
"""(a chosen token, number of the prompt's tokens) -> whether the answer stops before it."""
CLOSE_SECONDS = 10.0
"""Seconds to wait for an answer that was asked to stop; a model that hangs is abandoned."""


class LocalStream:
    """The generation stream of a detached model."""

    def __init__(
        self,
        opened: LoadedModel,
        request: GenerationRequest,
        ids: list[int],
        limit: int,
        matcher: SchemaMatcher | None = None,
        prefix: tuple[int, ...] = (),
        stops_before: StopsBefore | None = None,
    ) -> None:
        self.decision = RoutingDecision("edge", "detached")
        self.generated = list(prefix)
        """Tokens of the answer so far, without the one that ends it."""
        self.statistics: list[TokenStatistics] = []
        """Of each token that was chosen, with the one that ends the answer; complete once the last chunk has come."""
        self.stopped_before: str | None = None
        """Text of the token that ``stops_before`` refused, which ended the stream; None if it did not."""
        self._stops_before = stops_before
        self.signals: Signals = NO_SIGNALS
        """Confidence of the answer; complete once the last chunk has come."""
        self.owner = request.owner
        self.future: Future[None] = Future()
        """Done when its run is."""
        self._opened, self._request, self._ids, self._limit, self._follower = opened, request, ids, limit, matcher
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[OutputChunk | None] = asyncio.Queue()
        self.ended = asyncio.Event()
        """Set once it holds nothing any more."""
        self._stopped = threading.Event()
        self.future.add_done_callback(lambda _: self._call(self._end))

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        """Yield the chunks as they come.

        Raises:
            RequestError: if the model fails.
        """
        while (chunk := await self._chunks.get()) is not None:
            yield chunk
        failure = None if self.future.cancelled() else self.future.exception()
        if isinstance(failure, RequestError):
            raise failure
        if failure is not None:
            raise RequestError(f"the edge's model failed: {type(failure).__name__}", 500) from failure

    async def aclose(self) -> None:
        """Stop at the next token, and wait until the thread is free."""
        self.stop()
        await self.ended.wait()

    def stop(self) -> None:
        """Request a stop at the next token."""
        self._stopped.set()
        self.future.cancel()  # if it has not begun

    def run(self) -> None:
        """Generate the answer, in the model's thread."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            for chunk in self._generate():
                self._call(partial(self._chunks.put_nowait, chunk))
        except BaseException as error:  # raised to the reader of the stream
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.future.set_result(None)

    def _call(self, function: Callable[[], None]) -> None:
        """Call a function in the event loop."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: there is no reader
            self._stopped.set()

    def _end(self) -> None:
        self.ended.set()
        self._chunks.put_nowait(None)

    def _generate(self) -> Generator[OutputChunk, None, None]:
        request = self._request
        ends = (frozenset() if request.ignore_eos else self._opened.ends) | set(request.stop_token_ids)
        detokenizer = IncrementalDetokenizer(self._opened.tokenizer, request.stop, request.min_tokens)
        tokens: list[TokenStatistics] = []
        begun = count = len(self.generated)
        finish: FinishReason = "length"
        if begun:
            yield OutputChunk("".join(map(detokenizer.add, self.generated)), usage_so_far=Usage(len(self._ids), count))
        remaining = replace(request, min_tokens=max(0, request.min_tokens - begun))
        ids, limit = self._ids + self.generated, max(0, self._limit - begun)
        steps = decoding_steps(self._opened, ids, remaining, limit, self._follower)
        try:
            for step in steps:
                if self._stops_before is not None and self._stops_before(step.token, len(self._ids)):
                    self.stopped_before = str(self._opened.tokenizer.decode([step.token.id], skip_special_tokens=True))
                    return
                tokens.append(step.token)
                count = begun + step.count
                if step.token.id in ends:
                    finish = "stop"
                    break
                self.generated.append(step.token.id)
                text = detokenizer.add(step.token.id) if step.text is None else detokenizer.add_text(step.text)
                yield OutputChunk(text, self._logprobs(step.token), usage_so_far=Usage(len(self._ids), count))
                if detokenizer.stopped or step.complete:
                    finish = "stop"
                    break
                if self._stopped.is_set():
                    return
        finally:
            steps.close()
        self.statistics = self._with_deferral(tokens, count - begun)
        self.signals = signals_of(self.statistics)
        yield OutputChunk(detokenizer.flush(), (), finish, Usage(len(self._ids), count))

    def _with_deferral(self, tokens: list[TokenStatistics], count: int) -> list[TokenStatistics]:
        """Evaluate the deferral head on a complete answer of llama.cpp, unless it left out tokens of a character."""
        runtime = self._opened.runtime
        if not isinstance(runtime, GgufModel) or runtime.deferral_head is None or len(tokens) != count or not tokens:
            return tokens
        found = runtime.deferral_logits(self._ids, [token.id for token in tokens])
        head = runtime.deferral_head
        return [with_deferral(token, logits, head) for token, logits in zip(tokens, found, strict=True)]

    def _logprobs(self, token: TokenStatistics) -> tuple[GeneratedToken, ...]:
        if self._request.top_logprobs is None:
            return ()
        text = partial(self._opened.tokenizer.decode, skip_special_tokens=False)
        top = tuple((other, str(text([other])), logprob) for other, logprob in token.top)
        return (GeneratedToken(token.id, str(text([token.id])), token.logprob, top),)


class LocalModel:
    """A backend that generates with a detached model.

    Args:
        opened: the model with its tokenizer.
        name: the model's name in requests.
        max_queue: most requests waiting while one runs.
        close_seconds: seconds for which ``aclose`` lets running and waiting requests finish.
    """

    def __init__(self, opened: LoadedModel, name: str, max_queue: int = 32, close_seconds: float = 30.0) -> None:
        self._opened, self._name, self._max_queue, self._close_seconds = opened, name, max_queue, close_seconds
        self._created = int(time.time())
        self._thread, self._tokenizing = DaemonThread("edge-model"), SharedWork("edge-prompts")
        self._streams: set[LocalStream] = set()
        self._queue: list[LocalStream] = []
        self._turns: dict[str, int] = {}
        self._validator = RequestValidator(opened.tokenizer, opened.vocabulary)
        self._schemas = SchemaCompiler(opened.tokenizer, opened.vocabulary, opened.ends)
        self._closing = False
        self._failure: str | None = None

    def models(self) -> list[ModelCard]:
        """Return the one model."""
        opened = self._opened
        runtime, form = type(opened.runtime).__name__, opened.prompt_format
        reads = (form.takes_conversations(opened.tokenizer), form.further_fields)
        return [ModelCard(self._name, self._created, opened.max_length, runtime, *reads)]

    def counters(self) -> dict[str, float]:
        """Return the numbers of running and waiting requests."""
        active = len(self._active())
        return {"running": min(active, 1), "waiting": max(active - 1, 0)}

    def failure(self) -> str | None:
        """Return why it can never answer again; None while it can."""
        return self._failure

    async def generate(
        self, request: GenerationRequest, prefix: tuple[int, ...] = (), stops_before: StopsBefore | None = None
    ) -> LocalStream:
        """Queue a request.

        Args:
            request: the request; with a schema it has neither of the following.
            prefix: tokens with which the answer begins; the stream yields their text first.
            stops_before: called for each further token, in the model's thread; the stream ends, without a finish
                reason, before the first one for which it returns true.

        Raises:
            RequestError: 400 if its prompt is invalid or too long, 404 for another model, 429 if the queue is full, 503
                if the model is closing or has failed.
        """
        self._check_available(request)
        ids = await self._tokenize(request)
        limit = self._validator.max_new_tokens(request, len(ids), self._opened.max_length)
        matcher = None
        if request.schema is not None and not isinstance(self._opened.runtime, GgufModel):
            matcher = await self._tokenizing.run(object(), partial(self._schemas.compile, request.schema))
        self._check_available(request)  # again: it may have changed meanwhile
        stream = LocalStream(self._opened, request, ids, limit, matcher, prefix, stops_before)
        self._streams.add(stream)
        self._queue.append(stream)
        self._thread.submit(self._run_next).add_done_callback(self._record_failure)
        return stream

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the token ids of a request's prompt; raises RequestError as ``generate`` does."""
        self._check_name(request.model)
        return await self._tokenize(request)

    async def answer_tokens(self, text: str) -> list[int]:
        """Return the token ids of an answer's text."""
        return await self._tokenizing.run(object(), partial(self._validator.token_ids, text, "prediction"))

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included; raises RequestError for invalid ids."""
        self._check_name(model)
        return await self._tokenizing.run(object(), partial(self._validator.decode, tokens))

    async def aclose(self) -> None:
        """Refuse new requests, let the others finish as far as time allows, and end the threads."""
        self._closing = True
        waits = [asyncio.ensure_future(stream.ended.wait()) for stream in self._active()]
        if waits:
            await asyncio.wait(waits, timeout=self._close_seconds)
            for stream in self._active():
                stream.stop()
            await asyncio.wait(waits, timeout=CLOSE_SECONDS)
        for task in waits:
            task.cancel()
        if self._active() or not await asyncio.to_thread(self._thread.close, CLOSE_SECONDS):
            self._failure = f"the model did not stop within {self._close_seconds + CLOSE_SECONDS:g} s of closing"
        await asyncio.to_thread(self._tokenizing.close, CLOSE_SECONDS)

    def _run_next(self) -> None:
        """Run the first waiting request of the owner who was served least since the queue was last empty."""
        for stream in [stream for stream in self._queue if stream.future.done()]:
            self._queue.remove(stream)
        queue = list(self._queue)
        if not queue:
            return
        stream = min(queue, key=lambda each: self._turns.get(each.owner, 0))
        self._queue.remove(stream)
        self._turns = {each.owner: self._turns.get(each.owner, 0) for each in queue}
        self._turns[stream.owner] += 1
        stream.run()

    def _record_failure(self, future: "Future[None]") -> None:
        """Record an error from which the thread cannot recover: one that is no ``Exception``."""
        if not future.cancelled() and (error := future.exception()) is not None:
            self._failure = type(error).__name__
            LOGGER.critical("the edge's model can answer no more", exc_info=error)
            for stream in list(self._queue):
                stream.stop()

    def _active(self) -> list[LocalStream]:
        """Return the streams that run or wait."""
        self._streams = {stream for stream in self._streams if not stream.ended.is_set()}
        return list(self._streams)

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise RequestError(f"there is no model {name!r}; this server has {self._name}", 404, "model")

    def _check_available(self, request: GenerationRequest) -> None:
        self._check_name(request.model)
        if self._failure is not None:
            raise RequestError(f"the edge's model can answer no more: {self._failure}", 503)
        if self._closing:
            raise RequestError("the server is shutting down; ask another one", 503)
        if len(self._active()) > self._max_queue:
            raise RequestError(f"{self._max_queue} requests wait already; ask again later", 429)

    async def _tokenize(self, request: GenerationRequest) -> list[int]:
        longest = self._opened.max_length
        self._validator.check(request, longest)
        encode = partial(self._validator.prompt, request, self._opened.prompt_format, longest)
        return await self._tokenizing.run(request.prompt_key, encode)
