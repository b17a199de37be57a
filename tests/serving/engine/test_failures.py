"""Failures of the engine: its thread dies or hangs, or an adapter holds NaN."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.engine import engine as engine_module
from shadowtune.serving.engine.engine import BASE
from shadowtune.serving.http.app import create_app
from shadowtune.serving.requests import RequestError
from tests.serving.engine.support import adapter, alone, ask, engine, one_model, prompt, request, with_engine
from tests.support.bases import tiny_base


def dies(error, when=None):
    """A step that raises, once ``when`` is set."""

    def step():
        assert when is None or when.wait(60)
        raise error

    return step


@pytest.mark.parametrize("error", [MemoryError("no room"), SystemExit(3), RuntimeError("broken")])
def test_a_dead_thread_ends_every_answer_and_refuses_the_next(error, monkeypatch):
    served = engine(one_model())
    now = threading.Event()
    monkeypatch.setattr(served._scheduler, "step", dies(error, now))

    async def work(each):
        assert each.failure() is None
        begun = [await each.generate(request()) for _ in range(3)]
        now.set()
        for answer in begun:
            with pytest.raises(RequestError, match="thread has ended") as failed:
                [piece async for piece in answer]
            assert failed.value.status == 503
            await answer.aclose()
        with pytest.raises(RequestError, match="thread has ended"):
            await each.generate(request())
        return each.failure()

    assert with_engine(served, work) == type(error).__name__


def test_health_reports_a_dead_thread(monkeypatch):
    served = engine(one_model())
    monkeypatch.setattr(served._scheduler, "step", dies(MemoryError()))
    app = create_app(served, ServerConfig(), "cloud", counters=served.counters)
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/health").status_code == 200
        body = {"model": "a", "prompt": [5, 6]}
        assert client.post("/v1/completions", json=body).status_code == 503
        served._thread.join(60)
        health = client.get("/health")
        assert health.status_code == 503 and "MemoryError" in health.json()["error"]["message"]
        assert client.post("/v1/completions", json=body).status_code == 503


def test_a_pass_that_hangs_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(engine_module, "JOIN_SECONDS", 0.1)
    served = engine(one_model(), close_seconds=0.1)
    entered, released = threading.Event(), threading.Event()

    def hang(*_):
        entered.set()
        released.wait()

    monkeypatch.setattr(served._runner, "run", hang)

    async def work():
        answer = await served.generate(request())
        await asyncio.to_thread(entered.wait)
        await served.aclose()
        with pytest.raises(RequestError):
            [piece async for piece in answer]
        return served.failure()

    try:
        assert "did not end" in asyncio.run(asyncio.wait_for(work(), 120))
    finally:
        released.set()


HANGS = """
import argparse, sys, threading
from shadowtune.cli.server import add_server, run_server, server_config
from shadowtune.serving.engine import engine as engine_module
from shadowtune.serving.http.app import create_app
from tests.serving.engine.support import engine, one_model

kind = sys.argv.pop(1)
engine_module.JOIN_SECONDS = 0.1
parser = argparse.ArgumentParser()
add_server(parser)
config = server_config(parser.parse_args(sys.argv[1:]))
served = engine(one_model(), close_seconds=0.1)

def broken(*_):
    print("entered", flush=True)
    if kind == "dies":
        raise SystemExit
    threading.Event().wait()

served._runner.run = broken
sys.exit(run_server(config, lambda: create_app(served, config, "cloud", counters=served.counters)))
"""


@pytest.mark.parametrize("kind", ["hangs", "dies"])
def test_the_process_ends_with_an_error_code(kind):
    import http.client
    import json
    from urllib.parse import urlsplit

    command = [sys.executable, "-c", HANGS, kind, "--port", "0", "--drain-timeout", "0.1"]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    place = urlsplit(process.stdout.readline().split()[0])
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    body = json.dumps({"model": "a", "prompt": [5, 6]})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert process.stdout.readline() == "entered\n"
    if kind == "hangs":
        process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "the server could not go on" in error


def broken_adapter(base, seed=2):
    model = adapter(base, seed)
    with torch.no_grad():
        for parameter in model.shadow.boundaries.parameters():
            parameter.fill_(torch.nan)
    return model


@pytest.mark.parametrize("speculate", [False, True])
def test_an_adapter_of_nan_fails_alone(speculate):
    """Neighbours in the batch, the base's rows, and later rows in the same slots say what they say alone."""
    base = tiny_base()
    models = {"a": adapter(base), "b": broken_adapter(base)}
    served = engine(models, max_sequences=8)

    async def work(each):
        async def one(name, length):
            try:
                return (await ask(each, request(name, length, speculate=speculate)))[0]
            except RequestError as error:
                return error

        first = await asyncio.gather(*(one(name, 5 + place) for place, name in enumerate(["a", "b", BASE, "b", "a"])))
        second = await asyncio.gather(*(one("a", 5 + place) for place in range(6)))
        return first, second

    first, second = with_engine(served, work)
    for place in (1, 3):
        assert isinstance(first[place], RequestError) and first[place].status == 500
        assert "not finite" in str(first[place])
    expected = {name: [alone(model, prompt(5 + place)) for place in range(6)] for name, model in (("a", models["a"]),)}
    assert first[0] == expected["a"][0] and first[4] == expected["a"][4]
    assert first[2] == alone(base, prompt(7))
    assert second == expected["a"]


def test_a_sequence_whose_sampling_fails_ends_alone(monkeypatch):
    from shadowtune.serving.engine import sequence

    models = one_model()
    served, choose = engine(models), sequence.sample

    def fails(scores, sampling, source):
        if sampling.seed == 13:
            raise RuntimeError("probability tensor contains either inf, nan or element < 0")
        return choose(scores, sampling, source)

    monkeypatch.setattr(sequence, "sample", fails)
    from shadowtune.serving.requests import SamplingParams

    async def work(each):
        bad = request(sampling=SamplingParams(seed=13))
        results = await asyncio.gather(
            ask(each, request()), ask(each, bad), ask(each, request(length=9)), return_exceptions=True
        )
        return results

    good, bad, other = with_engine(served, work)
    assert isinstance(bad, RequestError)
    assert good[0] == alone(models["a"], prompt(5)) and other[0] == alone(models["a"], prompt(9))
