"""What comes back over HTTP: the shapes of OpenAI's API, whole and in chunks, and ours beside them."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from shadowtune.serving.http.logprobs import ChatLogprobs, CompletionLogprobs
from shadowtune.serving.requests import Decision, FinishReason, ModelCard, ToolCall, Usage


class FunctionReply(BaseModel):
    """What is to be called."""

    name: str | None = None
    arguments: str


class ToolCallReply(BaseModel):
    """A call that the model wants."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionReply

    @classmethod
    def of(cls, call: ToolCall) -> "ToolCallReply":
        """Write a whole call."""
        function = FunctionReply(name=call.name, arguments=call.arguments)
        return cls(id=call.id, type="function", function=function)


class ToolCallDelta(BaseModel):
    """A part of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionReply

    @classmethod
    def of(cls, call: ToolCall) -> "ToolCallDelta":
        """Write a part of a call; its first one has id and name."""
        if call.id is None and call.name is None:
            return cls(index=call.index, function=FunctionReply(arguments=call.arguments))
        function = FunctionReply(name=call.name, arguments=call.arguments)
        return cls(index=call.index, id=call.id, type="function", function=function)


class ChatMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list["ToolCallReply"] | None = None


class Delta(BaseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list["ToolCallDelta"] | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunkChoice(BaseModel):
    """A part of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(BaseModel):
    """One of the answers, or a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionTokensDetails(BaseModel):
    """What became of a prediction."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageReply(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> "UsageReply":
        """Write usage as OpenAI does."""
        details = CompletionTokensDetails(
            accepted_prediction_tokens=usage.accepted_prediction_tokens,
            rejected_prediction_tokens=usage.rejected_prediction_tokens,
        )
        read, written = usage.prompt_tokens, usage.completion_tokens
        return cls(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            completion_tokens_details=details,
        )


class DecisionReply(BaseModel):
    """Who answered, and why."""

    side: Literal["cloud", "edge", "fallback"]
    reason: str
    confidence: float | None
    cost: float

    @classmethod
    def of(cls, decision: Decision) -> "DecisionReply":
        """Write a decision."""
        return cls(side=decision.side, reason=decision.reason, confidence=decision.confidence, cost=decision.cost)


class Reply(BaseModel):
    """What whole answers and chunks have in common."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: None = None
    usage: UsageReply | None = None
    shadowtune: DecisionReply | None = None


class ChatReply(Reply):
    """A whole chat answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Reply):
    """An event of a streamed chat answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class CompletionReply(Reply):
    """A whole completion, or an event of a streamed one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ModelReply(BaseModel):
    """A model that can be asked for."""

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
    def of(cls, card: ModelCard) -> "ModelReply":
        """Write a card."""
        return cls(
            id=card.name,
            created=card.created,
            root=card.root,
            max_model_len=card.max_model_len,
            conversations=None if card.conversations else False,
            fields=list(card.fields) or None,
        )


class ModelsReply(BaseModel):
    """All models that can be asked for."""

    object: Literal["list"] = "list"
    data: list[ModelReply]


class HealthReply(BaseModel):
    """That the server is there."""

    status: Literal["ok"] = "ok"
    role: Literal["cloud", "edge"]


class CurvePoint(BaseModel):
    """What a threshold gave on held-out rows."""

    threshold: float
    accuracy: float
    hand_over_rate: float
    cost: float


class TokenizeReply(BaseModel):
    """Tokens of a text or conversation."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeReply(BaseModel):
    """Text of tokens."""

    prompt: str


class PolicyReply(BaseModel):
    """The policy of now."""

    kind: str
    threshold: float | None
    signal: str | None
    curve: list[CurvePoint]


class RecentRequest(BaseModel):
    """An answered request: never what was said in it."""

    time: float
    """Of its end, in seconds since 1970."""
    model: str
    side: Literal["cloud", "edge", "fallback"]
    reason: str
    confidence: float | None
    cost: float
    seconds: float
    first_token_seconds: float
    prompt_tokens: int
    completion_tokens: int


class RecentReply(BaseModel):
    """The last requests, newest last."""

    requests: list[RecentRequest]


class AdapterReply(BaseModel):
    """What became of an adapter."""

    name: str
    status: Literal["loaded", "unloaded"]


def total_usage(usages: Sequence[Usage], n: int) -> Usage:
    """Sum the usage of all choices; a prompt that has ``n`` of them counts once."""
    return Usage(
        sum(usage.prompt_tokens for usage in usages[::n]),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.accepted_prediction_tokens for usage in usages),
        sum(usage.rejected_prediction_tokens for usage in usages),
    )
