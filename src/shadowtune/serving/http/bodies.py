"""What may be asked over HTTP: the bodies of OpenAI's API, with the bounds that the OpenAPI document states.

A field of OpenAI's that would change the answer and is not supported may only say what leaves it out; one that changes
nothing is taken and has no effect; any other field is refused.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from typing_extensions import Self


def _never(value: bool) -> bool:
    """Refuse true; a literal False would let 0 pass."""
    if value:
        raise ValueError("must be false")
    return value


Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
WrittenId: TypeAlias = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Nothing: TypeAlias = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]
No: TypeAlias = Annotated[bool, AfterValidator(_never), WithJsonSchema({"type": "boolean", "const": False})]
NEVER = Field(None, description="Not supported: leave it out.")
UNUSED = Field(None, description="Taken, without effect.")


class Body(BaseModel):
    """Strict: no value is turned into another type, no field is unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


Content: TypeAlias = str | Annotated[list[TextPart], Field(max_length=1024)]


def text_of(content: Content) -> str:
    """Return a message's text, its parts after one another."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Message(Body):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    tool_calls: Nothing | None = NEVER
    function_call: None = NEVER
    audio: None = NEVER


class Prediction(Body):
    """What the answer may well be; it is checked in one pass."""

    type: Literal["content"]
    content: Content


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = UNUSED


class TextFormat(Body):
    """The one format there is."""

    type: Literal["text"]


class Asked(Body):
    """What both ways to ask have in common."""

    model: Name
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    n: int | None = Field(None, ge=1, le=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[WrittenId, Bias] | None = Field(None, max_length=1024)
    prediction: Prediction | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 and 0 leave it out.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    speculate: bool | None = Field(None, description="False: the shadow does not draft for this request.")
    user: str | None = UNUSED
    metadata: dict[str, Any] | None = UNUSED
    store: bool | None = UNUSED
    service_tier: str | None = UNUSED
    safety_identifier: str | None = UNUSED
    prompt_cache_key: str | None = UNUSED
    prompt_cache_retention: str | None = UNUSED

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with what it took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true; leave it out")
        return self


class ChatBody(Asked):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    fields: dict[Name, str] | None = Field(
        None, max_length=64, description="Fields of the model's template, beside the one that the last message fills."
    )
    chat_template_kwargs: dict[Name, Any] | None = Field(
        None, max_length=64, description="Further arguments of the model's chat template."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = Field(None, description="Text alone.")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(None, description="Text alone.")
    tool_choice: Literal["none", "auto"] | None = UNUSED
    parallel_tool_calls: bool | None = UNUSED
    tools: Nothing | None = NEVER
    functions: Nothing | None = NEVER
    function_call: None = NEVER
    audio: None = NEVER
    reasoning_effort: None = NEVER
    verbosity: None = NEVER
    web_search_options: None = NEVER

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionBody(Asked):
    """Body of ``/v1/completions``."""

    prompt: Text | Annotated[list[Text] | TokenIds | list[TokenIds], Field(min_length=1, max_length=16384)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: No | None = NEVER
    best_of: Annotated[int, Field(ge=1, le=1)] | None = NEVER
    suffix: Literal[""] | None = NEVER


class LoadBody(Body):
    """Body of ``/v1/load_adapter``."""

    name: Name
    path: str = Field(min_length=1, max_length=4096, description="A run or a saved shadow, on the server.")


class UnloadBody(Body):
    """Body of ``/v1/unload_adapter``."""

    name: Name


class PolicyBody(Body):
    """Body of ``PUT /v1/policy``."""

    threshold: float
