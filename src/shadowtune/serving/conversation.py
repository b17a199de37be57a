"""Chat requests to prompts: messages, tools and template variables through the model's prompt format."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import HiddenToolsError
from shadowtune.serving.requests import GenerationRequest, RequestError

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
"""System message for chat templates without tools, in the format of Hermes and Qwen."""


def chat_token_ids(
    request: GenerationRequest, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the token ids of a request's messages with the generation prompt.

    Tools and tool calls that the chat template ignores are written as text, the tools into the system message.

    Raises:
        DataError: if the messages, tools or template variables cannot be rendered for this model.
        RequestError: if the arguments of a tool call are not JSON.
    """
    messages = [_template_message(message) for message in request.messages or ()]
    variables = (dict(request.chat_template_kwargs), dict(request.fields))
    tools = [] if request.tool_choice == "none" else list(request.tools)
    try:
        return prompt_format.encode(messages, tokenizer, tools or None, *variables)
    except HiddenToolsError:
        return prompt_format.encode(_tools_as_text(messages, tools), tokenizer, None, *variables)


def _template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as chat templates expect it: a known role, arguments of tool calls as objects."""
    result = {**message, "role": ROLES.get(message.get("role", ""), message.get("role"))}
    if message.get("tool_calls"):
        result["content"] = message.get("content") or ""
        result["tool_calls"] = [_template_call(call) for call in message["tool_calls"]]
    return result


def _template_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, RecursionError):
        raise RequestError("the arguments of a tool call are not JSON", param="messages") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _tools_as_text(messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with tools, tool calls and their results as text."""
    result = [_message_as_text(message) for message in messages]
    if not tools:
        return result
    prompt = TOOL_PROMPT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if result[0]["role"] == "system":
        return [{**result[0], "content": f"{result[0]['content']}\n\n{prompt}"}, *result[1:]]
    return [{"role": "system", "content": prompt}, *result]


def _message_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
    text = "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)
    return {"role": "assistant", "content": f"{message['content']}\n{text}".lstrip()}
