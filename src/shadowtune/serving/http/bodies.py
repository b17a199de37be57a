"""What may be asked over HTTP: the bodies of OpenAI's API, with the bounds that the OpenAPI document states.

A field of OpenAI's that would change the answer and is not supported may only say what leaves it out; one that changes
nothing is taken and has no effect; any other field is refused.

Validation is bounded: lengths are checked before elements, lists stop at their first fault, and a flood of unknown
fields is one fault. A body of megabytes that is wrong everywhere costs as little as one that is wrong once.
"""

import itertools
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import NotRequired, Self, TypedDict

MANY_FIELDS = 64
"""Fields of an element of a list at most."""
FEW_UNKNOWN = 8
"""Unknown fields that are named one by one."""
MAX_PARTS = 8192
"""Parts of all messages of a request."""
MAX_NESTED = 128
"""Tools of a request, tool calls of a message."""


def _never(value: bool) -> bool:
    """Refuse true; a literal False would let 0 pass."""
    if value:
        raise ValueError("must be false")
    return value


def _at_most(items: int) -> BeforeValidator:
    """Check the length of a list or mapping, and the fields of a list's elements, before anything else is."""

    def check(value: Any) -> Any:
        if isinstance(value, (list, dict)) and len(value) > items:
            raise ValueError(f"has {len(value)} entries, of at most {items}")
        if isinstance(value, list):
            for number, entry in enumerate(value):
                if isinstance(entry, dict) and len(entry) > MANY_FIELDS:
                    raise ValueError(f"entry {number} has {len(entry)} fields, of at most {MANY_FIELDS}")
        return value

    return BeforeValidator(check)


def _few_parts(messages: Any) -> Any:
    """Check the number of parts of all messages together."""
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

    @model_validator(mode="before")
    @classmethod
    def _few_unknown_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and cls.model_config.get("extra") == "forbid":
            known = {field.alias or name for name, field in cls.model_fields.items()}
            count = len(given) - len(known & given.keys())
            if count > FEW_UNKNOWN:
                names = itertools.islice((str(name) for name in given if name not in known), 3)
                named = ", ".join(" ".join(name[:64].split()) for name in names)
                raise ValueError(f"{count} fields are unknown: {named}, ...")
        return given


class TextPart(TypedDict):
    """A part of a message."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    type: Literal["text"]
    text: str


Content: TypeAlias = str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True), _at_most(1024)]


def text_of(content: Content | None) -> str:
    """Return a message's text, its parts after one another."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class CalledFunction(Body):
    """The function of a call."""

    model_config = ConfigDict(extra="ignore")

    name: FunctionName
    arguments: str = Field(description="JSON.")


class CalledTool(Body):
    """A call that the assistant made in an earlier turn."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="Null beside tool_calls alone.")
    name: str | None = Field(None, max_length=256)
    tool_calls: (
        Annotated[list[CalledTool], Field(max_length=MAX_NESTED, fail_fast=True), _at_most(MAX_NESTED)] | None
    ) = None
    tool_call_id: str | None = Field(None, max_length=256, description="Of a tool's answer.")
    function_call: None = NEVER
    audio: None = NEVER

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
    list[Message], Field(max_length=4096, fail_fast=True), BeforeValidator(_few_parts), _at_most(4096)
]


class Prediction(Body):
    """What the answer may well be; it is checked in one pass."""

    type: Literal["content"]
    content: Content


class StreamOptions(Body):
    """Of a streamed answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="Every event has the usage so far.")
    include_obfuscation: bool | None = UNUSED


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema."""

    name: str = Field(max_length=256)
    description: str | None = UNUSED
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = Field(None, description="Taken, without effect: the answer always fits the schema.")


class SchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class Function(TypedDict):
    """A function that the model may call; its fields reach the chat template as they came."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]

    name: FunctionName
    description: NotRequired[str | None]
    parameters: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


class Tool(TypedDict):
    """A tool."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]

    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    """The name of a function."""

    name: FunctionName


class ToolChoice(Body):
    """The one function that is to be called."""

    type: Literal["function"]
    function: ChosenFunction


class Asked(Body):
    """What both ways to ask have in common."""

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
    logit_bias: Annotated[dict[WrittenId, Bias], Field(max_length=1024), _at_most(1024)] | None = None
    prediction: Prediction | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 and 0 leave it out.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    speculate: bool | None = Field(None, description="False: the shadow does not draft for this request.")
    user: str | None = UNUSED
    metadata: Annotated[dict[str, Any], _at_most(MANY_FIELDS)] | None = UNUSED
    store: bool | None = UNUSED
    service_tier: str | None = UNUSED
    safety_identifier: str | None = UNUSED
    prompt_cache_key: str | None = UNUSED
    prompt_cache_retention: str | None = UNUSED

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with what it took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        """Whether every event of a stream tells what it took so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true; leave it out")
        return self


class ChatBody(Asked):
    """Body of ``/v1/chat/completions``."""

    messages: Messages = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    fields: dict[Name, str] | None = Field(
        None, max_length=64, description="Fields of the model's template, beside the one that the last message fills."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=MAX_NESTED, fail_fast=True), _at_most(MAX_NESTED)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    chat_template_kwargs: Annotated[dict[str, Any], _at_most(MANY_FIELDS)] | None = Field(
        None, description="Further variables of the model's chat template."
    )
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True), _at_most(1)] | None = Field(
        None, description="Text alone."
    )
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

    @model_validator(mode="after")
    def _choices_need_tools(self) -> Self:
        names = [tool["function"]["name"] for tool in self.tools or ()]
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        return self


class CompletionBody(Asked):
    """Body of ``/v1/completions``."""

    prompt: (
        Text
        | Annotated[
            Annotated[list[Text], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)],
            Field(min_length=1, max_length=16384),
            _at_most(16384),
        ]
    )
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = Field(None, description="The answer begins with the prompt; not together with logprobs.")
    best_of: Annotated[int, Field(ge=1, le=1)] | None = NEVER
    suffix: Literal[""] | None = NEVER

    @model_validator(mode="after")
    def _no_logprobs_of_the_prompt(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probabilities of the prompt are not computed; leave out echo or logprobs")
        return self


class TokenizeBody(Body):
    """Body of ``/tokenize``: a text, or messages as the chat template makes a prompt of them."""

    model: Name
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_NESTED, fail_fast=True), _at_most(MAX_NESTED)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], _at_most(MANY_FIELDS)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class DetokenizeBody(Body):
    """Body of ``/detokenize``."""

    model: Name
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000, fail_fast=True), _at_most(1_000_000)]


class LoadBody(Body):
    """Body of ``/v1/load_adapter``."""

    name: AdapterName
    path: str = Field(min_length=1, max_length=4096, description="A run or a saved shadow, on the server.")


class UnloadBody(Body):
    """Body of ``/v1/unload_adapter``."""

    name: Name


class PolicyBody(Body):
    """Body of ``PUT /v1/policy``."""

    threshold: float
