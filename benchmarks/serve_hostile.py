"""Measure the latency of ``/health`` and the memory growth of a server during large invalid requests.

    python benchmarks/serve_hostile.py URL MODEL PID

Each body of up to 3.9 MB is sent by one client while another asks ``/health`` again and again. The table has the worst
of these latencies in milliseconds, and the growth of the process's resident memory in MB. On a busy machine the times
are upper bounds.
"""

import http.client
import json
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

USER = [{"role": "user", "content": "hi"}]
WORDS = "word and word " * 250_000
BAD = [{"role": "user", "content": [{"type": "nonsense", "n": 7}] * 45}] * 1_950
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
FEW: dict[str, Any] = {"max_tokens": 1}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "words, n=16": (COMPLETION, {"prompt": WORDS, "n": 16, **FEW}),
    "words that fit in characters, n=16": (COMPLETION, {"prompt": WORDS[:60_000], "n": 16, **FEW}),
    "messages of words, n=16": (CHAT, {"messages": [{"role": "user", "content": WORDS}], "n": 16, **FEW}),
    "prediction": (CHAT, {"messages": USER, "prediction": {"type": "content", "content": WORDS}, **FEW}),
    "bad parts": (CHAT, {"messages": BAD}),
    "empty parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 55}] * 1_950}),
    "20,000 unknown fields": (CHAT, {"messages": USER, **{f"key{n}": 0 for n in range(20_000)}}),
    "250,000 fields of a part": (
        CHAT,
        {"messages": [{"role": "user", "content": [{f"key{n}": 0 for n in range(250_000)}]}]},
    ),
    "prompts of token ids": (COMPLETION, {"prompt": [[7] * 1_000] * 1_100, "n": 16}),
    "empty lists": (COMPLETION, {"prompt": [[]] * 850_000}),
}


def ask(url: str, method: str, path: str, body: bytes | None = None) -> int:
    """Send one request and return the status code."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=600)
    connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def _send(url: str, path: str, body: bytes, statuses: list[int]) -> None:
    statuses.append(ask(url, "POST", path, body))


def resident(pid: str) -> float:
    """Resident memory of a process in MB."""
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Print a table."""
    url, model, pid = sys.argv[1:4]
    print("| body | status | worst /health, ms | memory, MB |\n|---|--:|--:|--:|")
    for name, (path, fields) in BODIES.items():
        body = json.dumps({"model": model, **fields}).encode()
        statuses: list[int] = []
        before, largest, worst = resident(pid), 0.0, 0.0
        sending = threading.Thread(target=_send, args=(url, path, body, statuses))
        sending.start()
        while sending.is_alive():
            begun = time.perf_counter()
            ask(url, "GET", "/health")
            worst = max(worst, time.perf_counter() - begun)
            largest = max(largest, resident(pid) - before)
            time.sleep(0.01)
        print(f"| {name} | {statuses[0]} | {1000 * worst:.0f} | {largest:.0f} |", flush=True)


if __name__ == "__main__":
    main()
