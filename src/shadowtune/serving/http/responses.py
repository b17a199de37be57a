"""Response bodies of the HTTP API: OpenAI's chat completions and completions, whole and in chunks, and our own."""

from typing import Literal

from pydantic import BaseModel, Field

from shadowtune.config.serving import CurvePoint, ReliabilityPoint
from shadowtune.serving.requests import FinishReason, ModelCard


class TopLogprob(BaseModel):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int] | None
    """UTF-8; None for a part of a character."""


class TokenLogprob(TopLogprob):
    """A token of the output."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities in the format of chat completions."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the format of completions."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class FunctionCall(BaseModel):
    """Name and arguments of a call."""

    name: str | None = None
    arguments: str


class ResponseToolCall(BaseModel):
    """A tool call."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolCallDelta(BaseModel):
    """A part of a tool call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ResponseMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ResponseToolCall] | None = None


class MessageDelta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(BaseModel):
    """One of the outputs."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunkChoice(BaseModel):
    """A part of one of the outputs."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(BaseModel):
    """One of the outputs, or a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionTokensDetails(BaseModel):
    """Acceptance of a prediction."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageInfo(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails


class RoutingInfo(BaseModel):
    """Which side answered, and why."""

    side: Literal["cloud", "edge", "fallback"]
    reason: str
    confidence: float | None
    cost: float


class GenerationResponse(BaseModel):
    """Fields that whole responses and chunks have in common."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: None = None
    usage: UsageInfo | None = None
    shadowtune: RoutingInfo | None = None


class ChatCompletionResponse(GenerationResponse):
    """A chat completion."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatCompletionChunk(GenerationResponse):
    """An event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class CompletionResponse(GenerationResponse):
    """A completion, or an event of a streamed one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ModelResponse(BaseModel):
    """A model that requests can name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "shadowtune"
    root: str
    max_model_len: int
    conversations: Literal[False] | None = Field(
        None, description="False: reads one message of a user, no system message and no history."
    )
    fields: list[str] | None = Field(None, description="Of its template, beside the one that a message fills.")

    @classmethod
    def of(cls, card: ModelCard) -> "ModelResponse":
        """Convert a card."""
        return cls(
            id=card.name,
            created=card.created,
            root=card.root,
            max_model_len=card.max_model_len,
            conversations=None if card.conversations else False,
            fields=list(card.fields) or None,
        )


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelResponse]


class HealthResponse(BaseModel):
    """The server is up."""

    status: Literal["ok"] = "ok"
    role: Literal["cloud", "edge"]


class TokenizeResponse(BaseModel):
    """Token ids of a text or conversation."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(BaseModel):
    """Text of token ids."""

    prompt: str


class DriftInfo(BaseModel):
    """State of the drift alarm: how often the cloud corrects the edge."""

    expected: float | None
    bound: float | None
    rate: float
    requests: int
    evidence: float
    alarms: int
    alarmed: bool


class PolicyResponse(BaseModel):
    """The current routing policy."""

    kind: str
    threshold: float | None
    signal: str | None
    curve: list[CurvePoint]
    reliability: list[ReliabilityPoint] = []
    drift: DriftInfo | None = None


class RecentRequest(BaseModel):
    """A completed request, without its text."""

    time: float
    """Unix time of its end in seconds."""
    model: str
    side: Literal["cloud", "edge", "fallback"]
    reason: str
    confidence: float | None
    cost: float
    seconds: float
    first_token_seconds: float
    prompt_tokens: int
    completion_tokens: int


class RecentResponse(BaseModel):
    """The last requests, newest last."""

    requests: list[RecentRequest]


class AdapterResponse(BaseModel):
    """An adapter was loaded or unloaded."""

    name: str
    status: Literal["loaded", "unloaded"]
