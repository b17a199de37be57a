"""Programs that ask a server by other people's clients: ``python client_programs.py CLIENT URL MODEL``.

They run in a process of their own, and perhaps in another environment (SHADOWTUNE_CLIENTS names its interpreter), so
they import nothing of ours. Each prints one line of JSON: what came of each feature that the client offers.
"""

import json
import sys
from typing import Any

MESSAGES = [{"role": "user", "content": "How is the weather in Ulm?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Ulm", "Bonn"]}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": SCHEMA}}
CHOICE = {"type": "function", "function": {"name": "weather"}}
SHORT = {"temperature": 0, "max_tokens": 12}
LONG = {"temperature": 0, "max_tokens": 100}


def fits(told: Any) -> bool:
    """Whether something has what the schema asks for."""
    told = json.loads(told) if isinstance(told, str) else told
    return told["city"] in ("Ulm", "Bonn") and isinstance(told["sunny"], bool)


def with_openai(url: str, model: str) -> dict[str, bool]:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    create = client.chat.completions.create
    plain = create(model=model, messages=MESSAGES, **SHORT)
    stream = create(model=model, messages=MESSAGES, stream=True, **SHORT)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    schema = create(model=model, messages=MESSAGES, response_format=FORMAT, **LONG)
    called = create(model=model, messages=MESSAGES, tools=[TOOL], tool_choice=CHOICE, **LONG)
    return {
        "chat": bool(plain.choices[0].message.content),
        "stream": streamed == plain.choices[0].message.content,
        "schema": fits(schema.choices[0].message.content),
        "tools": fits(called.choices[0].message.tool_calls[0].function.arguments),
    }


def with_litellm(url: str, model: str) -> dict[str, bool]:
    import litellm

    def complete(**fields: Any) -> Any:
        return litellm.completion(
            model=f"openai/{model}", api_base=f"{url}/v1", api_key="-", messages=MESSAGES, num_retries=0, **fields
        )

    plain = complete(**SHORT)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in complete(stream=True, **SHORT))
    return {
        "chat": bool(plain.choices[0].message.content),
        "stream": streamed == plain.choices[0].message.content,
        "schema": fits(complete(response_format=FORMAT, **LONG).choices[0].message.content),
        "tools": fits(
            complete(tools=[TOOL], tool_choice=CHOICE, **LONG).choices[0].message.tool_calls[0].function.arguments
        ),
    }


def with_instructor(url: str, model: str) -> dict[str, bool]:
    from typing import Literal

    import instructor
    import openai
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: Literal["Ulm", "Bonn"]
        sunny: bool

    found = {}
    for name, mode in (("tools", instructor.Mode.TOOLS), ("schema", instructor.Mode.JSON_SCHEMA)):
        plain = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        client = instructor.from_openai(plain, mode=mode)
        told = client.chat.completions.create(
            model=model, messages=MESSAGES, response_model=Weather, max_retries=0, **LONG
        )
        found[name] = fits(told.model_dump())
        parts = client.chat.completions.create_partial(
            model=model, messages=MESSAGES, response_model=Weather, max_retries=0, **LONG
        )
        found[f"stream of {name}"] = fits(list(parts)[-1].model_dump())
    return found


def with_guidellm(url: str, model: str) -> dict[str, bool]:
    import subprocess
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"Tell me of city {number}."}) + "\n" for number in range(4)))
        out = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
        command += ["--backend", f"kind=openai_http,target={url},model={model}", "--profile", "kind=synchronous"]
        command += ["--constraint", "kind=max_requests,count=3", "--data", f"kind=json_file,path={data}"]
        command += ["--output", f"kind=json,path={out}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        if not out.exists():
            raise RuntimeError(done.stderr[-2000:] + done.stdout[-2000:])
        (report,) = json.loads(out.read_text())["benchmarks"]
        totals = report["metrics"]["request_totals"]
    return {"chat": totals["successful"] == 3, "stream": totals["errored"] == 0}


def with_langchain(url: str, model: str) -> dict[str, bool]:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="-", max_retries=0, temperature=0, max_tokens=100)
    plain = chat.invoke(MESSAGES).content
    return {
        "chat": bool(plain),
        "stream": "".join(chunk.content for chunk in chat.stream(MESSAGES)) == plain,
        "schema": fits(
            chat.with_structured_output({"title": "weather", **SCHEMA}, method="json_schema").invoke(MESSAGES)
        ),
        "tools": fits(chat.bind_tools([TOOL], tool_choice="weather").invoke(MESSAGES).tool_calls[0]["args"]),
    }


def with_llama_index(url: str, model: str) -> dict[str, bool]:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(
        model=model, api_base=f"{url}/v1", api_key="-", max_retries=0, temperature=0, max_tokens=100,
        is_chat_model=True, is_function_calling_model=True, context_window=2048,
    )  # fmt: skip
    messages = [ChatMessage(role="user", content=MESSAGES[0]["content"])]

    def weather(city: str, sunny: bool) -> str:
        """Weather of a city."""
        return city

    plain = chat.chat(messages).message.content
    called = chat.chat_with_tools([FunctionTool.from_defaults(weather)], user_msg=messages[0], tool_required=True)
    return {
        "chat": bool(plain),
        "stream": list(chat.stream_chat(messages))[-1].message.content == plain,
        "schema": fits(chat.chat(messages, response_format=FORMAT).message.content),
        "tools": "city" in chat.get_tool_calls_from_response(called)[0].tool_kwargs,
    }


def with_pydantic_ai(url: str, model: str) -> dict[str, bool]:
    from typing import Literal

    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Weather(BaseModel):
        city: Literal["Ulm", "Bonn"]
        sunny: bool

    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="-"))
    settings: Any = {"temperature": 0, "max_tokens": 100}
    asked = MESSAGES[0]["content"]
    plain = Agent(chat, model_settings=settings).run_sync(asked).output

    async def stream() -> str:
        async with Agent(chat, model_settings=settings).run_stream(asked) as result:
            return await result.get_output()

    import asyncio

    return {
        "chat": bool(plain),
        "stream": asyncio.run(stream()) == plain,
        "schema": fits(
            Agent(chat, output_type=NativeOutput(Weather), model_settings=settings).run_sync(asked).output.model_dump()
        ),
        "tools": fits(
            Agent(chat, output_type=ToolOutput(Weather), model_settings=settings).run_sync(asked).output.model_dump()
        ),
    }


def with_openai_agents(url: str, model: str) -> dict[str, bool]:
    import asyncio
    from typing import Literal

    import openai
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: Literal["Ulm", "Bonn"]
        sunny: bool

    seen = []

    @function_tool
    def weather(city: Literal["Ulm", "Bonn"], sunny: bool) -> str:
        """Weather of a city."""
        seen.append(city)
        return city

    set_tracing_disabled(True)
    asked = MESSAGES[0]["content"]

    async def run() -> dict[str, bool]:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        chat = OpenAIChatCompletionsModel(model, client)
        settings = ModelSettings(temperature=0, max_tokens=100)
        plain = (await Runner.run(Agent("a", model=chat, model_settings=settings), asked)).final_output
        result = Runner.run_streamed(Agent("a", model=chat, model_settings=settings), asked)
        async for _ in result.stream_events():
            pass
        fitted = await Runner.run(Agent("a", model=chat, model_settings=settings, output_type=Weather), asked)
        forced = ModelSettings(temperature=0, max_tokens=100, tool_choice="required")
        agent = Agent("a", model=chat, model_settings=forced, tools=[weather], tool_use_behavior="stop_on_first_tool")
        await Runner.run(agent, asked)
        return {
            "chat": bool(plain),
            "stream": result.final_output == plain,
            "schema": fits(fitted.final_output.model_dump()),
            "tools": bool(seen),
        }

    return asyncio.run(run())


def with_dspy(url: str, model: str) -> dict[str, bool]:
    import dspy

    chat = dspy.LM(
        f"openai/{model}", api_base=f"{url}/v1", api_key="-", temperature=0, max_tokens=100, cache=False, num_retries=0
    )
    plain = chat("How is the weather in Ulm?")[0]
    fitted = chat("How is the weather in Ulm?", response_format=FORMAT)[0]
    text = plain if isinstance(plain, str) else plain["text"]
    told = fitted if isinstance(fitted, str) else fitted["text"]
    return {"chat": bool(text), "schema": fits(told)}


def with_llm(url: str, model: str) -> dict[str, bool]:
    from llm.default_plugins.openai_models import Chat

    chat = Chat(model, model_name=model, api_base=f"{url}/v1", supports_schema=True, supports_tools=True)
    chat.key = "-"
    asked, options = MESSAGES[0]["content"], {"temperature": 0, "max_tokens": 100}
    plain = chat.prompt(asked, stream=False, **options).text()
    streamed = "".join(chat.prompt(asked, stream=True, **options))
    fitted = chat.prompt(asked, stream=False, schema=SCHEMA, **options).text()
    return {"chat": bool(plain), "stream": streamed == plain, "schema": fits(fitted)}


CLIENTS = {
    name.removeprefix("with_"): function for name, function in list(globals().items()) if name.startswith("with_")
}

if __name__ == "__main__":
    client, url, model = sys.argv[1:4]
    print(json.dumps(CLIENTS[client](url, model)))
