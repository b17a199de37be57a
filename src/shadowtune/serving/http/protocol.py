"""Request bodies of the HTTP API: OpenAI's, with the bounds that the OpenAPI document states.

A field of OpenAI's that would change the output and is not supported may only have the value that leaves it out; one
without influence on the output is accepted and ignored; any other field is an error.

Validation cost is bounded: lengths are checked before elements, lists stop at their first error, and many unknown
fields are one error. A body of megabytes that is wrong everywhere costs as little as one that is wrong once.
"""

import itertools
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import NotRequired, Self, TypedDict

MAX_ENTRY_FIELDS = 64
"""Most fields of an element of a list."""
MAX_NAMED_FIELDS = 8
"""Most unknown fields that are reported one by one."""
MAX_PARTS = 8192
"""Most content parts of all messages of a request."""
MAX_TOOLS = 128
"""Most tools of a request, and tool calls of a message."""
NOT_SUPPORTED, TEXT_ONLY = "Not supported: leave it out.", "Text alone."
"""Descriptions of fields that OpenAI supports and this server does not."""
UNSUPPORTED = Field(None, description=NOT_SUPPORTED)
IGNORED = Field(None, description="Taken, without effect.")


def _at_most(items: int) -> BeforeValidator:
    """Check the length of a list or mapping, and the field count of a list's elements, before anything else."""

    def check(value: Any) -> Any:
        if isinstance(value, (list, dict)) and len(value) > items:
            raise ValueError(f"has {len(value)} entries, of at most {items}")
        if isinstance(value, list):
            for number, entry in enumerate(value):
                if isinstance(entry, dict) and len(entry) > MAX_ENTRY_FIELDS:
                    raise ValueError(f"entry {number} has {len(entry)} fields, of at most {MAX_ENTRY_FIELDS}")
        return value

    return BeforeValidator(check)


def _limit_parts(messages: Any) -> Any:
    """Check the number of content parts of all messages together."""
    if isinstance(messages, list):
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if parts > MAX_PARTS:
            raise ValueError(f"have {parts} parts, of at most {MAX_PARTS}")
    return messages


Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
AdapterName: TypeAlias = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
FunctionName: TypeAlias = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$")]
StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds: TypeAlias = Annotated[
    list[TokenId], Field(min_length=1, max_length=262_144, fail_fast=True), _at_most(262_144)
]
NonEmptyText: TypeAlias = Annotated[str, Field(min_length=1)]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
TokenIdKey: TypeAlias = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Empty: TypeAlias = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]
Variables: TypeAlias = Annotated[dict[str, Any], _at_most(MAX_ENTRY_FIELDS)]


class StrictModel(BaseModel):
    """A model without type coercion and without unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _limit_unknown_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and cls.model_config.get("extra") == "forbid":
            known = {field.alias or name for name, field in cls.model_fields.items()}
            count = len(given) - len(known & given.keys())
            if count > MAX_NAMED_FIELDS:
                names = itertools.islice((str(name) for name in given if name not in known), 3)
                named = ", ".join(" ".join(name[:64].split()) for name in names)
                raise ValueError(f"{count} fields are unknown: {named}, ...")
        return given


class TextPart(TypedDict):
    """A content part of a message."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    type: Literal["text"]
    text: str


Content: TypeAlias = str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True), _at_most(1024)]


def text_of(content: Content | None) -> str:
    """Return a message's text, its parts concatenated."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class FunctionCallParam(StrictModel):
    """The function of an earlier tool call."""

    model_config = ConfigDict(extra="ignore")

    name: FunctionName
    arguments: str = Field(description="JSON.")


class ToolCallParam(StrictModel):
    """A tool call of the assistant in an earlier turn."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCallParam


class MessageParam(StrictModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="Null beside tool_calls alone.")
    name: str | None = Field(None, max_length=256)
    tool_calls: (
        Annotated[list[ToolCallParam], Field(max_length=MAX_TOOLS, fail_fast=True), _at_most(MAX_TOOLS)] | None
    ) = None
    tool_call_id: str | None = Field(None, max_length=256, description="Of a tool's answer.")
    function_call: None = UNSUPPORTED
    audio: None = UNSUPPORTED

    @model_validator(mode="after")
    def _content_or_calls(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool's answer needs tool_call_id")
        return self


Messages: TypeAlias = Annotated[
    list[MessageParam], Field(max_length=4096, fail_fast=True), BeforeValidator(_limit_parts), _at_most(4096)
]


class PredictionParam(StrictModel):
    """Predicted output, verified in one pass."""

    type: Literal["content"]
    content: Content


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="Every event has the usage so far.")
    include_obfuscation: bool | None = IGNORED


class TextFormat(StrictModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaParam(StrictModel):
    """A named JSON schema."""

    name: str = Field(max_length=256)
    description: str | None = IGNORED
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = Field(None, description="Taken, without effect: the answer always fits the schema.")


class JsonSchemaFormat(StrictModel):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaParam


ResponseFormat: TypeAlias = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class FunctionDefinition(TypedDict):
    """A function that the model may call; its fields reach the chat template unchanged."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]

    name: FunctionName
    description: NotRequired[str | None]
    parameters: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


class ToolParam(TypedDict):
    """A tool that the model may call."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]

    type: Literal["function"]
    function: FunctionDefinition


Tools: TypeAlias = Annotated[list[ToolParam], Field(max_length=MAX_TOOLS, fail_fast=True), _at_most(MAX_TOOLS)]


class ChosenFunction(StrictModel):
    """The name of a function."""

    name: FunctionName


class NamedToolChoice(StrictModel):
    """The one function to call."""

    type: Literal["function"]
    function: ChosenFunction


class CommonRequest(StrictModel):
    """Fields that chat completions and completions have in common."""

    model: Name
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="Tokens before which only max_tokens ends.")
    n: int | None = Field(None, ge=1, le=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4, fail_fast=True), _at_most(4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True), _at_most(64)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenIdKey, Bias], Field(max_length=1024), _at_most(1024)] | None = None
    prediction: PredictionParam | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 and 0 leave it out.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    speculate: bool | None = Field(None, description="False: the shadow does not draft for this request.")
    user: str | None = IGNORED
    metadata: Variables | None = IGNORED
    store: bool | None = IGNORED
    service_tier: str | None = IGNORED
    safety_identifier: str | None = IGNORED
    prompt_cache_key: str | None = IGNORED
    prompt_cache_retention: str | None = IGNORED

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream has the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true; leave it out")
        return self


class ChatCompletionRequest(CommonRequest):
    """Body of ``/v1/chat/completions``."""

    messages: Messages = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    fields: dict[Name, str] | None = Field(
        None, max_length=64, description="Fields of the model's template, beside the one that the last message fills."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    chat_template_kwargs: Variables | None = Field(None, description="Further variables of the model's chat template.")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True), _at_most(1)] | None = Field(
        None, description=TEXT_ONLY
    )
    functions: Empty | None = UNSUPPORTED
    function_call: None = UNSUPPORTED
    audio: None = UNSUPPORTED
    reasoning_effort: None = UNSUPPORTED
    verbosity: None = UNSUPPORTED
    web_search_options: None = UNSUPPORTED

    @property
    def tool_names(self) -> list[str]:
        """Names of the functions that the model may call."""
        return [tool["function"]["name"] for tool in self.tools or ()]

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @model_validator(mode="after")
    def _choices_need_tools(self) -> Self:
        names = self.tool_names
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        return self


class CompletionRequest(CommonRequest):
    """Body of ``/v1/completions``."""

    prompt: (
        NonEmptyText
        | Annotated[
            Annotated[list[NonEmptyText], Field(fail_fast=True)]
            | TokenIds
            | Annotated[list[TokenIds], Field(fail_fast=True)],
            Field(min_length=1, max_length=16384),
            _at_most(16384),
        ]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="The answer begins with the prompt; not together with logprobs.")
    best_of: Annotated[int, Field(ge=1, le=1)] | None = UNSUPPORTED
    suffix: Literal[""] | None = UNSUPPORTED

    @model_validator(mode="after")
    def _no_logprobs_of_the_prompt(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probabilities of the prompt are not computed; leave out echo or logprobs")
        return self


class TokenizeRequest(StrictModel):
    """Body of ``/tokenize``: a text, or messages to be rendered with the chat template."""

    model: Name
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: Variables | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class DetokenizeRequest(StrictModel):
    """Body of ``/detokenize``."""

    model: Name
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000, fail_fast=True), _at_most(1_000_000)]


class LoadAdapterRequest(StrictModel):
    """Body of ``/v1/load_adapter``."""

    name: AdapterName
    path: str = Field(min_length=1, max_length=4096, description="A run or a saved shadow, on the server.")


class UnloadAdapterRequest(StrictModel):
    """Body of ``/v1/unload_adapter``."""

    name: Name


class PolicyRequest(StrictModel):
    """Body of ``PUT /v1/policy``."""

    threshold: float
