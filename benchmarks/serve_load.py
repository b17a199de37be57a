"""Load test of a cloud server, and an edge server in front of it, with valid and invalid requests.

    python benchmarks/serve_load.py runs/robot/shadow --edge runs/robot/edge-int8 --minutes 30

Clients request chat completions, streamed and whole, several choices at once, with predictions; some disconnect midway,
some send invalid bodies. Every request must end: answered, refused with a reason, or left by the client. The table has
each server's memory and open files over the time, the last line the outcomes of the requests. Exit code 1 if a request
was lost, a server answered 5xx or died, or memory or files grew by more than a tenth from the second quarter to the
last.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2

from shadowtune.cli.command import print_table

WORDS = (
    "wake me at six",
    "what is the weather",
    "play some music",
    "why is the sky blue?",
    "translate hello",
    "émoji 🙂",
)
NONSENSE = (b"", b"{", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"messages": [' * 200, b'{"max_tokens": 1e999}')
GROWTH = 1.1


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start ``shadowtune serve ...`` on a free port; yield its address and process, and end it by SIGTERM."""
    command = [sys.executable, "-m", "shadowtune", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[0], process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def held(process: subprocess.Popen[str]) -> tuple[float, int]:
    """Return the memory (MB) and the open files of a process."""
    proc = Path(f"/proc/{process.pid}")
    fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, len(os.listdir(proc / "fd"))


async def one_request(client: httpx2.AsyncClient, address: str, model: str, chance: random.Random) -> str:
    """Send one request and return its outcome."""
    kind = chance.choice(("chat", "stream", "leave", "many", "prediction", "nonsense", "unknown"))
    body: dict[str, Any] = {"model": model, "max_tokens": chance.randint(1, 12), "temperature": chance.choice((0, 1))}
    body["messages"] = [{"role": "user", "content": chance.choice(WORDS)}]
    if kind == "many":
        body["n"] = 3
    if kind == "prediction":
        body["prediction"] = {"type": "content", "content": "set_alarm"}
    if kind == "unknown":
        body["model"] = "nobody"
    content = (
        chance.choice(NONSENSE) if kind == "nonsense" else json.dumps({**body, "stream": kind in ("stream", "leave")})
    )
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", f"{address}/v1/chat/completions", content=content, headers=headers) as reply:
        last = ""
        async for line in reply.aiter_lines():
            if kind == "leave" and last:
                return "left"
            last = line or last
        if reply.status_code == 200:
            return "cut off" if kind == "stream" and last != "data: [DONE]" else "answered"
        return f"{reply.status_code}"


async def load(address: str, model: str, clients: int, until: float, counts: Counter[str]) -> None:
    """Send requests by so many clients until the time is over."""

    async def ask(number: int) -> None:
        chance = random.Random(number)
        async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:
            while time.monotonic() < until:
                try:
                    counts[await one_request(client, address, model, chance)] += 1
                except httpx2.HTTPError as error:
                    counts[f"lost: {type(error).__name__}"] += 1

    await asyncio.gather(*(ask(number) for number in range(clients)))


async def watch(servers: dict[str, subprocess.Popen[str]], until: float, every: float) -> list[dict[str, Any]]:
    """Record the servers' memory and open files, repeatedly."""
    begin, rows = time.monotonic(), []
    while time.monotonic() < until:
        await asyncio.sleep(every)
        row: dict[str, Any] = {"minutes": round((time.monotonic() - begin) / 60, 2)}
        for name, process in servers.items():
            memory, files = held(process)
            row |= {f"{name} MB": round(memory), f"{name} files": files}
        rows.append(row)
    return rows


async def everything(
    targets: list[str], processes: dict[str, subprocess.Popen[str]], arguments: argparse.Namespace, counts: Counter[str]
) -> list[dict[str, Any]]:
    """Send requests to all servers and record their memory."""
    until = time.monotonic() + 60 * arguments.minutes
    names = [httpx2.get(f"{target}/v1/models", trust_env=False).json()["data"][0]["id"] for target in targets]
    share = max(1, arguments.clients // len(targets))
    asking = [load(target, name, share, until, counts) for target, name in zip(targets, names, strict=True)]
    rows, *_ = await asyncio.gather(watch(processes, until, 60 * arguments.minutes / 20), *asking)
    return rows


def grown(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns whose largest value in the last quarter is a tenth above that of the second quarter."""
    quarter = max(1, len(rows) // 4)
    early, late = rows[quarter : 2 * quarter] or rows, rows[-quarter:]
    return [
        name
        for name in rows[0]
        if name != "minutes" and max(r[name] for r in late) > GROWTH * max(r[name] for r in early) + 4
    ]


def main() -> int:
    """Start the servers, load them, print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--edge", help="a detached model; half of the clients ask it")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    with ExitStack() as started:
        cloud, process = started.enter_context(server("cloud", arguments.run))
        targets, processes = [cloud], {"cloud": process}
        if arguments.edge:
            options = ("--cloud", cloud, "--policy-kind", "confidence", "--threshold", "0.9")
            address, processes["edge"] = started.enter_context(server("edge", arguments.edge, *options))
            targets.append(address)
        rows = asyncio.run(everything(targets, processes, arguments, counts))
        died = [name for name, process in processes.items() if process.poll() is not None]
    print_table("what the servers held", rows)
    wrong = {name: count for name, count in counts.items() if name[0] == "5" or name.startswith(("lost", "cut"))}
    more = grown(rows)
    print(f"{sum(counts.values())} requests: {dict(sorted(counts.items()))}")
    print(f"grown: {', '.join(more) or 'nothing'}; died: {', '.join(died) or 'none'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "requests": counts, "grown": more, "died": died}, indent=2))
    return int(bool(wrong or more or died))


if __name__ == "__main__":
    sys.exit(main())
