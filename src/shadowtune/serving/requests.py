"""What is asked and what comes back, whoever answers: an engine in the cloud, a file at the edge, a far server."""

from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from shadowtune.errors import ShadowtuneError

FinishReason = Literal["stop", "length", "tool_calls"]


class RequestError(ShadowtuneError):
    """A request that cannot be answered as it is.

    Args:
        message: one line for the one who asked.
        status: the HTTP status: 400 wrong, 403 forbidden, 404 no such model, 413 too large, 429 too many, 500 the model
            failed, 503 not now.
        param: the field at fault, as OpenAI's API calls it.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and meanings are those of OpenAI's API, and of transformers for the rest."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    """None takes the model's own, of its generation config: 1 if it has none."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    seed: int | None = None
    """The same seed gives the same tokens; None draws one."""


@dataclass(frozen=True)
class Request:
    """One prompt that wants one answer. Exactly one of ``messages`` and ``prompt`` is given."""

    model: str
    """Name of the adapter, as ``/v1/models`` lists it."""
    messages: Sequence[dict[str, Any]] | None = None
    """A conversation as the client sent it, "role" and "content" each, with "tool_calls" and "tool_call_id" where a
    tool was called; goes through the model's own template."""
    prompt: str | Sequence[int] | None = None
    """A text or its token ids, continued as it is."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Fields of the model's template, beside the one that the last message fills."""
    max_tokens: int | None = None
    """Tokens of the answer at most; None allows what the server and the model's positions allow."""
    fitting: bool = False
    """Whether ``max_tokens`` is lowered to what the model's positions allow; else a number that is too large is
    refused."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it."""
    ignore_eos: bool = False
    """Whether the answer goes on after an end-of-text token."""
    top_logprobs: int | None = None
    """How many alternatives each token is told with, 0 for its own log-probability alone; None tells nothing."""
    prediction: str | Sequence[int] | None = None
    """What the answer may well be: checked in one pass, and continued from the first token that does not stand."""
    speculate: bool = True
    """Whether the shadow may draft; the answer is the same, or falls with the same probabilities."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end the answer, and are not part of it, whatever ``ignore_eos`` says."""
    min_tokens: int = 0
    """Tokens before which nothing ends the answer but its length."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that the answer must fit, all of it; {"type": "object"} is any JSON object."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the model may call, as OpenAI's API describes them; they go through the model's template."""
    tool_choice: str | Mapping[str, Any] | None = None
    """As the client sent it: None, "auto", "none", "required", or the one function to call."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the model's chat template."""
    owner: str = ""
    """Who asks: a digest of the API key, or the client's address. Owners get equal shares of the server."""
    forwarded: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the client's body for a remote endpoint in place of ours, such as "max_completion_tokens"."""

    @property
    def prompt_key(self) -> Hashable:
        """Return what requests with the very same prompt objects have in common, while these exist."""
        parts = (
            self.messages,
            self.prompt,
            self.prediction,
            self.tools,
            self.schema,
            self.chat_template_kwargs,
            self.fields,
        )
        return tuple(id(part) if part else None for part in parts)

    def wanted(self, room: int) -> int:
        """Return how many tokens the answer may have, where there are positions for ``room``; more than that if it says
        so, which is to be refused.
        """
        if self.max_tokens is None:
            return room
        return min(self.max_tokens, room) if self.fitting else self.max_tokens


@dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    text: str
    """By itself; a part of a character shows as the replacement sign."""
    logprob: float
    """Natural logarithm of its probability before temperature and the rest of the sampling."""
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest (id, text, logprob), best first."""


@dataclass(frozen=True)
class Usage:
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    accepted_prediction_tokens: int = 0
    """Tokens of ``Request.prediction`` that stood."""
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True)
class ToolCall:
    """A call of a function that the model wants, or a part of one."""

    index: int
    """Number of the call in the answer."""
    arguments: str
    """JSON, or the next part of it."""
    id: str | None = None
    """On a call's first part alone, as ``name``."""
    name: str | None = None


@dataclass(frozen=True)
class Piece:
    """A part of an answer, as soon as it stands."""

    text: str
    """What is new; may be empty."""
    tokens: tuple[Token, ...] = ()
    """The new tokens, told if ``top_logprobs`` is not None; a token's text may come with a later piece."""
    finish_reason: FinishReason | None = None
    """On the last piece alone."""
    usage: Usage | None = None
    """On the last piece alone."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Where a remote endpoint has read them; of our own models ``serving.tools`` reads them out of the text."""
    running: Usage | None = None
    """What the answer took so far, where it is known."""


@dataclass(frozen=True)
class Decision:
    """Who answers, and why. An answerer that decides says so before its first piece."""

    side: Literal["cloud", "edge", "fallback"]
    """fallback: the edge, because the cloud did not answer."""
    reason: str
    """A short word: "attached", "confident", "unsure", "tag", "agreed", "corrected", "cloud timed out", ..."""
    confidence: float | None = None
    """Of the edge's own answer, from 0 to 1, where there is one."""
    cost: float = 0.0
    """In units of what one token of the cloud costs."""


@dataclass(frozen=True)
class ModelCard:
    """A model that can be asked for."""

    name: str
    created: int
    """Seconds since 1970."""
    max_model_len: int
    """Tokens that prompt and answer may have together."""
    root: str = ""
    """What it was made from, such as the base's name."""
    conversations: bool = True
    """Whether it reads system messages and earlier turns; else one message of a user."""
    fields: tuple[str, ...] = ()
    """Fields of its template beside the one that a message fills."""


class Answer(Protocol):
    """An answer that is on its way."""

    decision: Decision

    def __aiter__(self) -> AsyncIterator[Piece]:
        """Give its pieces; the last one has ``finish_reason`` and ``usage``."""

    async def aclose(self) -> None:
        """Stop answering, whether or not it has ended: whatever it holds is free afterwards."""


class Answerer(Protocol):
    """Whoever answers requests."""

    def models(self) -> list[ModelCard]:
        """The models that can be asked for."""

    async def answer(self, request: Request) -> Answer:
        """Accept a request, and decide who answers it.

        Raises:
            RequestError: if it cannot be answered as it is, or not now.
        """

    async def aclose(self) -> None:
        """Accept nothing more, finish what was begun, and let go of everything; within bounded time."""


@runtime_checkable
class CanFail(Protocol):
    """An answerer with a thread that may end."""

    def failure(self) -> str | None:
        """Why it can never answer again; None while it can."""


@runtime_checkable
class HasTokens(Protocol):
    """An answerer that shows what its tokenizer makes of texts."""

    async def tokenize(self, request: Request) -> list[int]:
        """Return the token ids of a request's prompt."""

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
