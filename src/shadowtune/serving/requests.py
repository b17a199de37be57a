"""Types that every backend shares: generation requests, output chunks, and the protocol of a backend."""

from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from shadowtune.errors import ShadowtuneError

FinishReason = Literal["stop", "length", "tool_calls"]


class RequestError(ShadowtuneError):
    """A request that cannot be answered.

    Args:
        message: one line for the client.
        status: the HTTP status, such as 400 invalid, 404 no such model, 429 too many, 500 failed, 503 unavailable.
        param: the wrong field, as OpenAI's API calls it.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings, with the names and meanings of OpenAI's API, and of transformers for the others."""

    temperature: float = 1.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    """None takes that of the model's generation config, 1 if it has none."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id -> value added to its logit."""
    seed: int | None = None
    """The same seed gives the same tokens; None draws one."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be answered once. Exactly one of ``messages`` and ``prompt`` is given."""

    model: str
    """Name of the adapter, as ``/v1/models`` lists it."""
    messages: Sequence[dict[str, Any]] | None = None
    """Chat messages as the client sent them; rendered with the model's own template."""
    prompt: str | Sequence[int] | None = None
    """A text or its token ids, continued as it is."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Fields of the model's prompt template, beside the one that the last message fills."""
    max_tokens: int | None = None
    """Most tokens to generate; None allows as many as the server and the model's positions do."""
    clamp_max_tokens: bool = False
    """Whether ``max_tokens`` is lowered to what fits the model's positions; else too large a value is an error."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    """Stop strings; they end generation and are not part of the output."""
    ignore_eos: bool = False
    """Whether generation goes on after an end-of-sequence token."""
    top_logprobs: int | None = None
    """Alternatives reported with each token, 0 for the token's own log-probability alone; None reports nothing."""
    prediction: str | Sequence[int] | None = None
    """Predicted output: verified in one pass, and continued from the first token that is not accepted."""
    speculate: bool = True
    """Whether the shadow may draft; the output has the same distribution either way."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end generation, whatever ``ignore_eos`` is, and are not part of the output."""
    min_tokens: int = 0
    """Tokens before which only ``max_tokens`` ends generation."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that the output must fit; {"type": "object"} is any JSON object."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the model may call, as in OpenAI's API; rendered with the model's template."""
    tool_choice: str | Mapping[str, Any] | None = None
    """As the client sent it: None, "auto", "none", "required", or the one function to call."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template."""
    owner: str = ""
    """The client: a digest of its API key, or its address. Owners get equal shares of the server."""
    forwarded: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the client's body that a remote endpoint gets unchanged, such as "max_completion_tokens"."""

    @property
    def prompt_key(self) -> Hashable:
        """Key that requests made of the very same prompt objects share, while these objects exist."""
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

    def max_new_tokens(self, room: int) -> int:
        """Return how many tokens to generate where ``room`` positions are free; more than ``room`` is an error."""
        if self.max_tokens is None:
            return room
        return min(self.max_tokens, room) if self.clamp_max_tokens else self.max_tokens


@dataclass(frozen=True)
class GeneratedToken:
    """A token of the output with its log-probability."""

    id: int
    text: str
    """Of this token alone; a part of a character shows as the replacement character."""
    logprob: float
    """Natural logarithm of its probability before temperature and the other sampling settings."""
    top: tuple[tuple[int, str, float], ...] = ()
    """The most likely (id, text, logprob), best first."""


@dataclass(frozen=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    accepted_prediction_tokens: int = 0
    """Accepted tokens of ``GenerationRequest.prediction``."""
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True)
class ToolCall:
    """A function call in the output, or a part of one."""

    index: int
    """Number of the call in the output."""
    arguments: str
    """JSON, or the next part of it."""
    id: str | None = None
    """On the first part of a call only, as ``name``."""
    name: str | None = None


@dataclass(frozen=True)
class OutputChunk:
    """The next part of a generated output."""

    text: str
    """New text; may be empty."""
    tokens: tuple[GeneratedToken, ...] = ()
    """New tokens, if ``top_logprobs`` is not None; a token's text may come with a later chunk."""
    finish_reason: FinishReason | None = None
    """On the last chunk only."""
    usage: Usage | None = None
    """On the last chunk only."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that a remote endpoint parsed; those of local models are parsed from the text by ``serving.tools``."""
    usage_so_far: Usage | None = None
    """Token counts up to this chunk, where known."""


@dataclass(frozen=True)
class RoutingDecision:
    """Which side answers a request and why; known before the first chunk."""

    side: Literal["cloud", "edge", "fallback"]
    """fallback: the edge, because the cloud did not answer."""
    reason: str
    """A short word: "attached", "confident", "unsure", "tag", "agreed", "corrected", "cloud timed out", ..."""
    confidence: float | None = None
    """Confidence of the edge's own answer, 0 to 1, where there is one."""
    cost: float = 0.0
    """In units of the cost of one cloud token."""


@dataclass(frozen=True)
class ModelCard:
    """A model that requests can name."""

    name: str
    created: int
    """Unix time in seconds."""
    max_model_len: int
    """Most tokens of prompt and output together."""
    root: str = ""
    """Its source, such as the name of the base."""
    conversations: bool = True
    """Whether it takes system messages and earlier turns; else a single user message."""
    fields: tuple[str, ...] = ()
    """Fields of its prompt template, beside the one that a message fills."""


class GenerationStream(Protocol):
    """The output of one request while it is generated."""

    decision: RoutingDecision

    def __aiter__(self) -> AsyncIterator[OutputChunk]:
        """Iterate over the chunks; the last one has ``finish_reason`` and ``usage``."""

    async def aclose(self) -> None:
        """Stop generating, whether or not it has ended, and release all resources."""


class Backend(Protocol):
    """Generates the output of requests: an engine, a detached model, a remote endpoint, or a router over these."""

    def models(self) -> list[ModelCard]:
        """List the models that requests can name."""

    async def generate(self, request: GenerationRequest) -> GenerationStream:
        """Accept a request, and decide which side answers it.

        Raises:
            RequestError: if it is invalid, or cannot be accepted now.
        """

    async def aclose(self) -> None:
        """Accept nothing more, finish running requests and release all resources, within bounded time."""


@runtime_checkable
class SupportsFailure(Protocol):
    """A backend that reports an unrecoverable failure."""

    def failure(self) -> str | None:
        """Return why the backend can never generate again; None while it can."""


@runtime_checkable
class SupportsTokenization(Protocol):
    """A backend that exposes its tokenizer."""

    async def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the token ids of a request's prompt."""

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
