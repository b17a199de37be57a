"""An edge before a server that is not ours."""

import asyncio

import httpx2

from shadowtune.config.serving import CloudConfig
from shadowtune.serving.edge.confidence import token_confidence
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.edge.remote import RemoteEndpoint
from shadowtune.serving.edge.router import Router
from tests.serving.edge.models import answered, ask, gather

COUNT = 12
CHAT = [{"role": "user", "content": "say one"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "go", "parameters": SCHEMA}}
PATIENT = dict.fromkeys(("read_timeout", "first_token_timeout", "idle_timeout", "deadline"), 300.0)
"""Time-outs for a busy machine: a server's first request with a schema or log-probabilities may take a minute."""
MARKS = '{}[]"_<>/'
"""Characters of JSON and of tool calls, for the vocabulary."""
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""With tools, whose format llama.cpp derives from what the template makes of a call."""


def routed(opened, address, request, policy, model=None):
    """Return chunks, decision and counters of a router with one request."""

    async def run():
        config = CloudConfig(address, model=model, retries=0, **PATIENT)
        router = Router(LocalModel(opened, "tiny"), RemoteEndpoint(config), policy)
        try:
            chunks, stream = await gather(router, request)
            return chunks, stream.decision, router.counters()
        finally:
            await router.aclose()

    return asyncio.run(run())


def text(chunks):
    return "".join(chunk.text for chunk in chunks)


def unsure_case(opened):
    """A request whose least sure token is not among the first two, a threshold for it, and the whole answer."""
    for start in range(3, 60):
        request = ask(prompt=[start, start + 1, start + 2, 9], max_tokens=COUNT)
        chunks, stream = answered(LocalModel(opened, "tiny"), request)
        sure = [token_confidence(token, "logprob") for token in stream.statistics]
        index = sure.index(min(sure))
        if index >= 2 and len(sure) == COUNT and all(chunk.text for chunk in chunks[:COUNT]):
            return request, (min(sure) + min(sure[:index])) / 2, text(chunks)
    raise AssertionError("no request of this model has its least sure token late")


def direct(address, path="chat/completions", model="x", **body):
    """Ask a server without an edge; return its answer."""
    response = httpx2.post(
        f"{address}/v1/{path}", json={"model": model, "temperature": 0, **body}, timeout=300, trust_env=False
    )
    return response.json()
