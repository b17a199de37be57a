"""``Engine``: an ``Answerer`` whose passes run in a thread of their own, while asyncio asks and listens."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.config.checking import nearest
from shadowtune.core.prepacked_linear import prepacked_linear
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import ShadowtuneError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.serving.background import SharedWork
from shadowtune.serving.engine.adapters import Adapter
from shadowtune.serving.engine.answer import EngineAnswer
from shadowtune.serving.engine.counters import Counters
from shadowtune.serving.engine.intake import Intake
from shadowtune.serving.engine.limits import Limits
from shadowtune.serving.engine.networks import Networks
from shadowtune.serving.engine.scheduler import Scheduler
from shadowtune.serving.requests import Decision, ModelCard, Request, RequestError

LOG = logging.getLogger(__name__)
Loaded = tuple[ShadowForCausalLM, PromptFormat]
BASE = "base"
"""Name of the bare base among the models."""
CLOSING = "the server is closing; ask again later"
POLL_SECONDS = 0.05
LAST_SECONDS = 5.0
"""For which a thread that was told to stop is waited for; a pass that hangs is left behind."""


class Engine:
    """Answers with the attached models of several shadows on one frozen base; belongs to one event loop at a time.

    Args:
        base: a causal language model; nothing else may run it meanwhile.
        tokenizer: its own.
        adapters: models that share the base, by the names that requests call them by, with their prompts' formats.
        limits: how much at once.
        open_adapter: how ``load`` reads a path; None takes directories that ``save_pretrained`` wrote, with a
            ``prompt_format.json`` or without.

    Raises:
        UnsupportedArchitectureError: if base or a backbone cannot be served in batches.
        ConfigError: if an adapter has another base.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Mapping[str, Loaded],
        limits: Limits | None = None,
        open_adapter: Callable[[str], Loaded] | None = None,
    ) -> None:
        self._base, self._limits = base, limits or Limits()
        self._open_adapter = open_adapter or self._open_directory
        self._networks, self._counters = Networks(base), Counters()
        self._scheduler = Scheduler(self._networks, self._limits, self._counters)
        self._intake = Intake(base, tokenizer, self._limits)
        self._created = int(time.time())
        self._adapters: dict[str, Adapter] = {}
        for name, loaded in adapters.items():
            self._adapters[self._free(name)] = self._adapter(name, loaded)
        self._open: dict[EngineAnswer, Adapter | None] = {}
        self._reading = SharedWork("shadowtune-prompts")
        self._failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="shadowtune-engine", daemon=True)
        self._thread.start()

    def counters(self) -> dict[str, float]:
        """What it has done and does now, by name; at any time, in any thread."""
        return self._counters.numbers()

    def models(self) -> list[ModelCard]:
        """The adapters, and the bare base."""
        root = self._base.config.name_or_path or self._base.config.model_type
        base = ModelCard(BASE, self._created, self._intake.longest(None), root, self._intake.reads(None))
        return [self._card(each, root) for each in self._adapters.values()] + [base]

    def _card(self, adapter: Adapter, root: str) -> ModelCard:
        fields = adapter.prompt_format.further_fields
        reads = self._intake.reads(adapter)
        return ModelCard(adapter.name, adapter.created, self._intake.longest(adapter), root, reads, fields)

    async def answer(self, request: Request) -> EngineAnswer:
        """Accept a request.

        Raises:
            RequestError: 404 without such a model, 400 if it is not one to be answered, 429 if too many wait, 503 once
                the engine closes.
        """
        adapter = None if request.model == BASE else self._known(request.model)
        self._check_room()
        self._intake.check(request, adapter)
        prepared = await self._reading.run(
            (request.prompt_key, adapter), partial(self._intake.prepare, request, adapter)
        )
        answer = EngineAnswer(Decision("cloud", "base" if adapter is None else "attached"), self._forget)
        make = partial(self._intake.row, request, adapter, answer.deliver, prepared)
        row = make() if request.schema is None else await self._reading.run(object(), make)
        self._check_room()  # meanwhile there may be less of it
        if adapter is not None and self._adapters.get(adapter.name) is not adapter:
            self._known(request.model)
            raise RequestError(f"the model {request.model!r} was loaded anew; ask again", 503)
        answer.cancel = partial(self._commands.put, partial(self._scheduler.cancel, row))
        self._open[answer] = adapter
        self._commands.put(partial(self._scheduler.add, row))
        if self._failure is not None:  # the thread has ended since, and may not have seen this answer
            answer.deliver(self._dead())
            answer.deliver(None)
        return answer

    async def tokenize(self, request: Request) -> list[int]:
        """Return the token ids of a request's prompt.

        Raises:
            RequestError: as ``answer``.
        """
        adapter = None if request.model == BASE else self._known(request.model)
        self._intake.check(request, adapter)
        prepared = await self._reading.run(
            (request.prompt_key, adapter), partial(self._intake.prepare, request, adapter)
        )
        return prepared.prompt

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included.

        Raises:
            RequestError: without such a model, or if an id is none of its tokens.
        """
        if model != BASE:
            self._known(model)
        return await self._reading.run(object(), partial(self._intake.text_of, tokens))

    def failure(self) -> str | None:
        """Why it can never answer again; None while it can."""
        return self._failure

    async def load(self, name: str, path: str) -> None:
        """Load an adapter; answers that run wait while it is read.

        Raises:
            RequestError: if the name is taken, or the path holds no adapter of this base.
        """
        self._free(name)
        adapter = await asyncio.to_thread(self._load, name, path)
        self._adapters[self._free(name)] = adapter

    async def unload(self, name: str) -> None:
        """Refuse an adapter's name from now on, wait for what it has begun, and let go of it.

        Raises:
            RequestError: 404 without such an adapter.
        """
        adapter = self._known(name)
        del self._adapters[name]
        await asyncio.gather(*(answer.ended.wait() for answer, owner in self._open.items() if owner is adapter))
        self._commands.put(partial(self._retire, adapter))

    async def aclose(self) -> None:
        """Accept nothing more, finish what was begun as far as ``Limits.close_seconds`` allow, and end the thread."""
        self._closing = True
        self._commands.put(_nothing)
        await asyncio.to_thread(self._thread.join, self._limits.close_seconds)
        if self._thread.is_alive():
            self._commands.put(partial(self._scheduler.fail, None, RequestError(CLOSING, 503)))
            await asyncio.to_thread(self._thread.join, LAST_SECONDS)
        if self._thread.is_alive():
            self._failure = f"a pass did not end within {self._limits.close_seconds + LAST_SECONDS:g} s of closing"
            self._end_answers()
        await asyncio.to_thread(self._reading.close, LAST_SECONDS)

    def _check_room(self) -> None:
        if self._failure is not None:
            raise self._dead()
        if self._closing:
            raise RequestError(CLOSING, 503)
        if len(self._open) >= self._limits.max_rows + self._limits.max_queue:
            raise RequestError(f"{len(self._open)} requests run or wait; ask again later", 429)

    def _dead(self) -> RequestError:
        return RequestError(f"the model's thread has ended: {self._failure}", 503)

    def _end_answers(self) -> None:
        """Tell everyone who waits that nothing more comes; in any thread."""
        for answer in list(self._open):
            answer.deliver(self._dead())
            answer.deliver(None)

    def _retire(self, adapter: Adapter) -> None:
        self._networks.forget(adapter)
        adapter.close()

    def _forget(self, answer: EngineAnswer) -> None:
        self._open.pop(answer, None)

    def _run(self) -> None:
        """What the thread does; whatever ends it ends all answers."""
        try:
            self._work()
        except BaseException as error:
            self._failure = type(error).__name__
            LOG.critical("the engine's thread has ended", exc_info=error)
            self._end_answers()

    def _work(self) -> None:
        """Run commands as they come, and steps as long as there are rows."""
        with prepacked_linear(self._base):
            while not self._closing or self._scheduler.busy or not self._commands.empty():
                if not self._scheduler.busy:
                    self._commands.get()()
                while not self._commands.empty():
                    self._commands.get()()
                self._scheduler.step()
        for adapter in self._adapters.values():
            adapter.close()

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Within this context the thread stands still; entered from any other thread."""
        arrived, resume = threading.Event(), threading.Event()

        def pause() -> None:
            arrived.set()
            resume.wait()

        self._commands.put(pause)
        while not arrived.wait(POLL_SECONDS):
            if self._closing or not self._thread.is_alive():
                resume.set()
                raise RequestError(CLOSING, 503)
        try:
            yield
        finally:
            resume.set()

    def _load(self, name: str, path: str) -> Adapter:
        with self._paused():  # loading puts hooks on the base
            try:
                return self._adapter(name, self._open_adapter(path))
            except ShadowtuneError as error:
                raise RequestError(str(error), 400, "path") from None

    def _open_directory(self, path: str) -> Loaded:
        return ShadowForCausalLM.from_pretrained(path, base=self._base), PromptFormat.load(Path(path))

    def _adapter(self, name: str, loaded: Loaded) -> Adapter:
        return Adapter(name, *loaded, self._base, self._limits.speculation)

    def _known(self, name: str) -> Adapter:
        if name not in self._adapters:
            names = [*self._adapters, BASE]
            raise RequestError(
                f"no model {name!r} is served here{nearest(name, names)}; there are {', '.join(names)}", 404, "model"
            )
        return self._adapters[name]

    def _free(self, name: str) -> str:
        if not name or name == BASE or name in self._adapters:
            raise RequestError(f"the name {name!r} is taken; choose another", 400, "name")
        return name


def _nothing() -> None:
    """Wakes the thread."""
