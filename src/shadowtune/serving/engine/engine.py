"""The backend of ``serve cloud``: decodes in a thread of its own, while asyncio takes requests and reads outputs."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.config.settings import nearest
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ShadowtuneError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.serving.background import SharedWork
from shadowtune.serving.engine.adapter import Adapter
from shadowtune.serving.engine.model_runner import ModelRunner
from shadowtune.serving.engine.request_processor import RequestProcessor
from shadowtune.serving.engine.scheduler import EngineStatistics, Limits, Scheduler
from shadowtune.serving.engine.sequence import TokenizedRequest
from shadowtune.serving.requests import GenerationRequest, ModelCard, OutputChunk, RequestError, RoutingDecision

LOG = logging.getLogger(__name__)
LoadedAdapter = tuple[ShadowForCausalLM, PromptFormat]
BASE = "base"
"""Name of the bare base among the models."""
CLOSING = "the server is closing; ask again later"
POLL_SECONDS = 0.05
LEARN_SECONDS = 1.0
"""Between two looks for something to learn from, while the engine is idle."""
JOIN_SECONDS = 5.0
"""Seconds to wait for a thread that is stopping; a pass that hangs is left behind."""


class EngineStream:
    """Output of one request, from the engine's thread to the event loop in which it was made.

    Args:
        decision: of the engine.
        on_end: called with the stream once the engine holds nothing of it any more.
    """

    def __init__(self, decision: RoutingDecision, on_end: Callable[["EngineStream"], object]) -> None:
        self.decision = decision
        self.ended = asyncio.Event()
        """Set once the engine holds nothing of it any more."""
        self.cancel: Callable[[], None] = lambda: None
        """Asks the engine to stop."""
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[OutputChunk | RequestError | None] = asyncio.Queue()
        self._on_end = on_end

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        """Iterate over the remaining chunks; raises RequestError if decoding failed."""
        while (item := await self._chunks.get()) is not None:
            if isinstance(item, RequestError):
                raise item
            yield item
        self._chunks.put_nowait(None)  # for another iteration

    async def aclose(self) -> None:
        """Stop decoding, and wait until the sequence is removed."""
        if not self.ended.is_set():
            self.cancel()
            await self.ended.wait()

    def deliver(self, item: OutputChunk | RequestError | None) -> None:
        """Add the next item, from any thread; None is the end."""
        try:
            self._loop.call_soon_threadsafe(self._add, item)
        except RuntimeError:  # the loop is closed: nobody reads
            self.cancel()
            if item is None:
                self._on_end(self)

    def _add(self, item: OutputChunk | RequestError | None) -> None:
        self._chunks.put_nowait(item)
        if item is None:
            self._on_end(self)
            self.ended.set()


class Engine:
    """Generates with the attached models of several adapters on one frozen base; belongs to one event loop at a time.

    Args:
        base: a causal language model; nothing else may run it meanwhile.
        tokenizer: its own.
        adapters: models that share the base with their prompt formats, by the names that requests use.
        limits: its capacity.
        open_adapter: how ``load`` reads a path; None takes directories of ``save_pretrained``, with or without
            ``prompt_format.json``.
        learn: directory in which draft heads learn from answers while the engine is idle; None learns nothing.

    Raises:
        UnsupportedArchitectureError: if base or a backbone cannot be served in batches.
        ConfigError: if an adapter has another base.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Mapping[str, LoadedAdapter],
        limits: Limits | None = None,
        open_adapter: Callable[[str], LoadedAdapter] | None = None,
        learn: Path | None = None,
    ) -> None:
        self._learn = learn
        self._base, self._limits = base, limits or Limits()
        self._open_adapter = open_adapter or self._open_directory
        self._runner, self._statistics = ModelRunner(base, self._limits.prefix_tokens), EngineStatistics()
        self._scheduler = Scheduler(self._runner, self._limits, self._statistics)
        self._processor = RequestProcessor(base, tokenizer, self._limits)
        self._created = int(time.time())
        self._adapters: dict[str, Adapter] = {}
        for name, loaded in adapters.items():
            self._adapters[self._check_free(name)] = self._make_adapter(name, loaded)
        self._streams: dict[EngineStream, Adapter | None] = {}
        self._tokenizing = SharedWork("shadowtune-prompts")
        self._failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="shadowtune-engine", daemon=True)
        self._thread.start()

    def counters(self) -> dict[str, float]:
        """Return the statistics by name, in any thread."""
        return self._statistics.numbers()

    def models(self) -> list[ModelCard]:
        """List the adapters, then the bare base."""
        root = self._base.config.name_or_path or self._base.config.model_type
        return [self._card(each, root) for each in self._adapters.values()] + [self._card(None, root)]

    async def generate(self, request: GenerationRequest) -> EngineStream:
        """Accept a request.

        Raises:
            RequestError: 404 if there is no such model, 400 if the request is invalid, 429 if the queue is full, 503
                once the engine closes.
        """
        adapter = self._adapter_of(request.model)
        self._check_capacity()
        tokenized = await self._tokenize(request, adapter)
        reason = "base" if adapter is None else "attached"
        stream = EngineStream(RoutingDecision("cloud", reason), lambda ended: self._streams.pop(ended, None))
        build = partial(self._processor.sequence, request, adapter, stream.deliver, tokenized)
        sequence = build() if request.schema is None else await self._tokenizing.run(object(), build)
        self._check_capacity()  # it may have changed meanwhile
        if adapter is not None and self._adapters.get(adapter.name) is not adapter:
            self._adapter_of(request.model)
            raise RequestError(f"the model {request.model!r} was loaded anew; ask again", 503)
        stream.cancel = partial(self._commands.put, partial(self._scheduler.cancel, sequence))
        self._streams[stream] = adapter
        self._commands.put(partial(self._scheduler.add, sequence))
        if self._failure is not None:  # the thread has ended since, and may not have seen this stream
            stream.deliver(self._dead())
            stream.deliver(None)
        return stream

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the token ids of a request's prompt; raises RequestError as ``generate``."""
        return (await self._tokenize(request, self._adapter_of(request.model))).prompt

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included.

        Raises:
            RequestError: if there is no such model, or an id is not in its vocabulary.
        """
        self._adapter_of(model)
        return await self._tokenizing.run(object(), partial(self._processor.validator.decode, tokens))

    def failure(self) -> str | None:
        """Return why the engine can never generate again; None while it can."""
        return self._failure

    async def load(self, name: str, path: str) -> None:
        """Load an adapter; decoding pauses while it is read.

        Raises:
            RequestError: if the name is taken, or the path holds no adapter of this base.
        """
        self._check_free(name)
        adapter = await asyncio.to_thread(self._load, name, path)
        self._adapters[self._check_free(name)] = adapter

    async def unload(self, name: str) -> None:
        """Remove an adapter: new requests for it are refused, running ones finish first.

        Raises:
            RequestError: 404 if there is no such adapter.
        """
        adapter = self._adapters.pop(name, None)
        if adapter is None:
            raise self._unknown(name)
        await asyncio.gather(*(stream.ended.wait() for stream, owner in self._streams.items() if owner is adapter))

        def retire() -> None:
            self._runner.forget(adapter)
            adapter.close()

        self._commands.put(retire)

    async def aclose(self) -> None:
        """Accept nothing more, finish running requests within ``Limits.close_seconds``, and end the thread."""
        self._closing = True
        self._commands.put(lambda: None)  # wakes the thread
        await asyncio.to_thread(self._thread.join, self._limits.close_seconds)
        if self._thread.is_alive():
            self._commands.put(partial(self._scheduler.fail, None, RequestError(CLOSING, 503)))
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)
        if self._thread.is_alive():
            self._failure = f"a pass did not end within {self._limits.close_seconds + JOIN_SECONDS:g} s of closing"
            self._fail_streams()
        await asyncio.to_thread(self._tokenizing.close, JOIN_SECONDS)

    async def _tokenize(self, request: GenerationRequest, adapter: Adapter | None) -> TokenizedRequest:
        self._processor.check(request, adapter)
        tokenize = partial(self._processor.tokenize, request, adapter)
        return await self._tokenizing.run((request.prompt_key, adapter), tokenize)

    def _check_capacity(self) -> None:
        if self._failure is not None:
            raise self._dead()
        if self._closing:
            raise RequestError(CLOSING, 503)
        if len(self._streams) >= self._limits.max_sequences + self._limits.max_queue:
            raise RequestError(f"{len(self._streams)} requests run or wait; ask again later", 429)

    def _dead(self) -> RequestError:
        return RequestError(f"the model's thread has ended: {self._failure}", 503)

    def _fail_streams(self) -> None:
        """End every stream with an error; in any thread."""
        for stream in list(self._streams):
            stream.deliver(self._dead())
            stream.deliver(None)

    def _run(self) -> None:
        """Body of the thread; whatever ends it ends all streams."""
        try:
            self._loop()
        except BaseException as error:  # the thread's end: readers of streams would wait for ever
            self._failure = type(error).__name__
            LOG.critical("the engine's thread has ended", exc_info=error)
            self._fail_streams()

    def _loop(self) -> None:
        """Run commands as they come, and steps while there are sequences."""
        with prepacked_linear(self._base):
            while not self._closing or self._scheduler.busy or not self._commands.empty():
                if not self._scheduler.busy:
                    self._next_command()()
                while not self._commands.empty():
                    self._commands.get()()
                self._scheduler.step()
        for adapter in self._adapters.values():
            adapter.close()

    def _next_command(self) -> Callable[[], None]:
        """Wait for a command; meanwhile draft heads learn, step by step."""
        while True:
            learners = [each.learner for each in list(self._adapters.values()) if each.learner is not None]
            more = any(learner.step() for learner in learners)
            with contextlib.suppress(queue.Empty):
                if not learners:
                    return self._commands.get()
                return self._commands.get_nowait() if more else self._commands.get(timeout=LEARN_SECONDS)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Pause the thread within this context; entered from any other thread."""
        paused, resume = threading.Event(), threading.Event()

        def pause() -> None:
            paused.set()
            resume.wait()

        self._commands.put(pause)
        while not paused.wait(POLL_SECONDS):
            if self._closing or not self._thread.is_alive():
                resume.set()
                raise RequestError(CLOSING, 503)
        try:
            yield
        finally:
            resume.set()

    def _load(self, name: str, path: str) -> Adapter:
        with self._paused():  # loading registers hooks on the base
            try:
                return self._make_adapter(name, self._open_adapter(path))
            except ShadowtuneError as error:
                raise RequestError(str(error), 400, "path") from None

    def _open_directory(self, path: str) -> LoadedAdapter:
        return ShadowForCausalLM.from_pretrained(path, base=self._base), PromptFormat.load(Path(path))

    def _make_adapter(self, name: str, loaded: LoadedAdapter) -> Adapter:
        adapter = Adapter(name, *loaded, self._base, self._limits.speculation)
        if self._learn is not None:
            adapter.learn_in(self._learn)
        return adapter

    def _card(self, adapter: Adapter | None, root: str) -> ModelCard:
        length, conversations = self._processor.max_model_len(adapter), self._processor.takes_conversations(adapter)
        if adapter is None:
            return ModelCard(BASE, self._created, length, root, conversations)
        fields = adapter.prompt_format.further_fields
        return ModelCard(adapter.name, adapter.created, length, root, conversations, fields)

    def _adapter_of(self, name: str) -> Adapter | None:
        """Return the adapter that a request names, None for the bare base; raises RequestError 404."""
        if name != BASE and name not in self._adapters:
            raise self._unknown(name)
        return self._adapters.get(name)

    def _unknown(self, name: str) -> RequestError:
        names = [*self._adapters, BASE]
        hint = f"{nearest(name, names)}; there are {', '.join(names)}"
        return RequestError(f"no model {name!r} is served here{hint}", 404, "model")

    def _check_free(self, name: str) -> str:
        if not name or name == BASE or name in self._adapters:
            raise RequestError(f"the name {name!r} is taken; choose another", 400, "name")
        return name
