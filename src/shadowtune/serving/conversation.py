"""A request's conversation as the model reads it, with its tools and template variables; and how long it may be."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import HiddenToolsError
from shadowtune.serving.requests import Request, RequestError

ROLES = {"developer": "system"}
"""Roles that chat templates know by another name."""
TOOL_PROMPT = """You may call functions. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as a JSON object within <tool_call></tool_call>:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""
"""System message for a chat template that reads no tools; the format is that of Hermes and Qwen."""


def template_messages(request: Request) -> list[dict[str, Any]]:
    """Return the messages as chat templates expect them: known roles, tool calls with their arguments as an object."""
    return [_template_message(message) for message in request.messages or ()]


def _template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    told = {**message, "role": ROLES.get(message.get("role", ""), message.get("role"))}
    if message.get("tool_calls"):
        told["content"] = message.get("content") or ""
        told["tool_calls"] = [_template_call(call) for call in message["tool_calls"]]
    return told


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, RecursionError):
        raise RequestError("the arguments of a tool call are not JSON", param="messages") from None
    return {**call, "function": {**function, "arguments": arguments}}


def conversation_ids(request: Request, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a request's messages, up to where the model's answer begins.

    Tools and calls that the chat template does not show become text, the tools that of a system message.

    Raises:
        DataError: if the messages, or what comes with them, cannot be a prompt of this model.
    """
    messages = template_messages(request)
    further = (dict(request.chat_template_kwargs), dict(request.fields))
    tools = [] if request.tool_choice == "none" else list(request.tools)
    try:
        return prompt_format.encode(messages, tokenizer, tools or None, *further)
    except HiddenToolsError:
        return prompt_format.encode(_described(messages, tools), tokenizer, None, *further)


def _described(messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the tools, their calls and results as text."""
    told = [_as_text(message) for message in messages]
    if not tools:
        return told
    words = TOOL_PROMPT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{words}"}, *told[1:]]
    return [{"role": "system", "content": words}, *told]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
    text = "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)
    return {"role": "assistant", "content": f"{message['content']}\n{text}".lstrip()}


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the characters of the longest token: a text has at least its characters over this many tokens."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)


def check_characters(request: Request, longest: int, longest_token: int) -> None:
    """Refuse texts that cannot fit the model without tokenizing them, and predictions as long.

    Args:
        request: what is asked.
        longest: tokens that prompt and answer may have together.
        longest_token: characters of the longest token.

    Raises:
        RequestError: naming the field.
    """
    limit = longest * longest_token
    sizes = {
        "messages": sum(map(_characters, request.messages or ())),
        "prompt": len(request.prompt) if isinstance(request.prompt, str) else 0,
        "prediction": len(request.prediction) if isinstance(request.prediction, str) else 0,
    }
    for name, size in sizes.items():
        if size > limit:
            raise RequestError(
                f"{name}: {size} characters are more than the {longest} tokens of {request.model!r} can be; shorten it",
                param=name,
            )


def too_long(request: Request, tokens: int, longest: int) -> RequestError:
    """Return the error of a prompt that leaves no room for an answer."""
    message = f"the prompt has {tokens} tokens, and {request.model!r} takes {longest} with the answer"
    return RequestError(message, param="messages" if request.prompt is None else "prompt")


def _characters(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    return len(content) if isinstance(content, str) else 0
