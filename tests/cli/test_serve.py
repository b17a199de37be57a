import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

from shadowtune.cli.main import main
from shadowtune.evaluation.run import FinishedRun
from tests.support.bases import VOCABULARY

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def cloud(shadow_run):
    """The command as a user starts it: its address, its process, the lines it prints."""
    command = [sys.executable, "-m", "shadowtune", "serve", "cloud", str(shadow_run), "--name", f"again={shadow_run}"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--allow-loading", "--adapter-root", str(shadow_run.parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SHADOWTUNE_API_KEYS": "key", "SHADOWTUNE_ADMIN_KEYS": "admin"},
    )
    line = process.stdout.readline()
    yield line, process
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in said and "say one" not in said


@pytest.fixture
def client(cloud):
    address = cloud[0].split()[0]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_one_line_says_where_it_is_and_how_to_ask(cloud):
    line = cloud[0]
    assert re.match(r"http://127\.0\.0\.1:\d+ answers as shadow, again, base; try: curl ", line)
    words = shlex.split(line.split("try: ")[1])
    assert json.loads(words[-1])["model"] == "shadow" and "Authorization: Bearer $KEY" in words


def test_answers_are_those_of_the_run(client, shadow_run):
    run = FinishedRun.open(shadow_run)
    mute = [
        0,
        1,
        2,
        3,
        *range(len(run.tokenizer), VOCABULARY),
    ]  # without them the tiny model says something with a text
    wanted = {"max_tokens": 6, "temperature": 0, "logit_bias": {str(token): -100 for token in mute}}
    for text in ("say one", "say red"):
        messages = [{"role": "user", "content": text}]
        ids = run.prompt_format.encode(messages, run.tokenizer)
        said = run.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, suppress_tokens=mute)
        expected = run.tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True)
        assert expected
        for model in ("shadow", "again"):
            reply = client.chat.completions.create(model=model, messages=messages, **wanted)
            assert reply.choices[0].message.content == expected
            chunks = client.chat.completions.create(model=model, messages=messages, **wanted, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_every_documented_call_works_on_a_real_model(client):
    assert [model.id for model in client.models.list()] == ["shadow", "again", "base"]
    assert client.models.retrieve("base").id == "base"
    fields = {"max_tokens": 5, "temperature": 1.5, "seed": 3, "logprobs": 2, "n": 2}
    one = client.completions.create(model="shadow", prompt=["say one", "say ten"], **fields)
    two = client.completions.create(model="shadow", prompt=["say one", "say ten"], **fields)
    assert [choice.text for choice in one.choices] == [choice.text for choice in two.choices]
    assert len(one.choices) == 4 and all(len(choice.logprobs.tokens) <= 5 for choice in one.choices)
    whole = client.completions.create(model="base", prompt=[5, 6, 7], max_tokens=8, temperature=0)
    predicted = client.completions.create(
        model="base",
        prompt=[5, 6, 7],
        max_tokens=8,
        temperature=0,
        extra_body={"prediction": {"type": "content", "content": whole.choices[0].text}},
    )
    assert predicted.choices[0].text == whole.choices[0].text
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="shadow", prompt=[5, 10**6])
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="shadow", prompt=[5], max_tokens=10**6)
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        client.completions.create(model="nobody", prompt="x")


def test_adapters_come_and_go_while_it_runs(cloud, client, shadow_run):
    body = {"name": "late", "path": shadow_run.name}
    with pytest.raises(openai.PermissionDeniedError, match="needs an admin key"):
        client.post("/load_adapter", body=body, cast_to=object)
    admin = client.with_options(api_key="admin")
    assert admin.post("/load_adapter", body=body, cast_to=object) == {"name": "late", "status": "loaded"}
    said = [
        client.completions.create(model=model, prompt="say one", temperature=0).choices[0].text
        for model in ("shadow", "late")
    ]
    assert said[0] == said[1]
    assert admin.post("/unload_adapter", body={"name": "late"}, cast_to=object)["status"] == "unloaded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="late", prompt="say one")
    for path in ("nowhere", "x" * 300, "/etc"):
        with pytest.raises(openai.BadRequestError, match="path must name an adapter"):
            admin.post("/load_adapter", body={"name": "late", "path": path}, cast_to=object)
    with pytest.raises(openai.PermissionDeniedError, match="was there when the server started"):
        admin.post("/unload_adapter", body={"name": "shadow"}, cast_to=object)


def negative(config):
    config["backbone_config"]["intermediate_size"] = -4
    return json.dumps(config)


def headless(config):
    config["backbone_config"]["num_attention_heads"] = 0
    return json.dumps(config)


def huge(config):
    config["shadow"]["rank"] = 10**12
    return json.dumps(config)


MALFORMED = {
    "negative": negative,
    "headless": headless,
    "huge": huge,
    "deep": lambda config: "[" * 100_000,
    "cut": lambda config: json.dumps(config)[:100],
}


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_adapter_is_a_400_and_others_go_on(cloud, client, shadow_run, change):
    directory = shadow_run.parent / f"malformed-{change}"
    shutil.copytree(shadow_run / "model", directory)
    file = directory / "config.json"
    file.write_text(MALFORMED[change](json.loads(file.read_text())))
    admin = client.with_options(api_key="admin")
    with pytest.raises(openai.BadRequestError) as refused:
        admin.post("/load_adapter", body={"name": "late", "path": directory.name}, cast_to=object)
    message = refused.value.body["message"]
    assert "\n" not in message and len(message) < 1_000
    assert client.completions.create(model="shadow", prompt="say one", max_tokens=1).choices


def test_without_its_key_it_is_shut(cloud):
    address = cloud[0].split()[0]
    other = openai.OpenAI(base_url=f"{address}/v1", api_key="ke", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name at least one run"),
        (["nowhere"], "there is no nowhere"),
        (["{lora}"], "is a lora causal_lm run"),
        (["{shadow}", "--port", "99999"], "port must be at least 0"),
        (["{shadow}", "--allow-loading"], "--allow-loading needs a key"),
        (["{shadow}", "--adapter-root", "nowhere"], "--adapter-root nowhere is not a directory"),
        (["{shadow}", "--api-key-file", "nowhere"], "No such file or directory: nowhere"),
        (["{shadow}", "{shadow}"], "would both be called 'shadow'"),
        (["{shadow}", "--name", "base={shadow}"], "the name 'base' is taken"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, said, shadow_run, lora_run, capsys):
    filled = [word.format(lora=lora_run, shadow=shadow_run) for word in arguments]
    assert main(["serve", "cloud", *filled, *([] if "--port" in arguments else ["--port", "0"])]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_its_log_costs_no_answer(shadow_run):
    command = [sys.executable, "-m", "shadowtune", "serve", "cloud", str(shadow_run), "--port", "0"]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, text=True)
    address = process.stdout.readline().split()[0]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        for _ in range(3):
            assert client.completions.create(model="shadow", prompt="one two", max_tokens=3).usage.completion_tokens
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="missing", prompt="one")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_a_taken_port_is_told_before_anything_is_loaded(shadow_run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "cloud", str(shadow_run), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 is in use" in error and "loading" not in error
