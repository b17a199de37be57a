"""``serve cloud --engine vllm`` with a stand-in for the interpreter: what is checked, what is started, how it ends."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.cli import vllm
from shadowtune.cli.main import main
from shadowtune.data.generation import configured_ends
from shadowtune.model.loading import read_config
from tests.support.shadows import perturbed_model

STAND_IN = """#!{python}
import json, os, shutil, signal, sys
if sys.argv[1] == "-c":
    print({probe!r})
else:
    words = sys.argv[3:]
    directory = words[words.index("--model") + 1]
    shutil.copytree(directory, {copy!r})
    with open({seen!r}, "w") as file:
        json.dump({{"words": words, "key": os.environ.get("VLLM_API_KEY")}}, file)
    signal.pause() if {waits} else sys.exit(7)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Make an interpreter of an environment with these facts; return the paths of what it is given."""

    def make(version="0.32.0", plugin=True, waits=False):
        file, seen, copy = (tmp_path / name for name in ("python", "seen.json", "served"))
        probe = json.dumps({"vllm": [None, version], "plugin": plugin})
        text = STAND_IN.format(python=sys.executable, probe=probe, seen=str(seen), copy=str(copy), waits=waits)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv(vllm.PYTHON, str(file))
        return seen, copy

    return make


def refusal(capsys, *words):
    assert main(["serve", "cloud", *map(str, words), "--engine", "vllm"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("shadowtune: error: ") and message.count("\n") == 1
    return message


def test_vllm_is_started_with_the_run_its_prompt_format_and_its_base(shadow_run, base, stand_in, monkeypatch):
    seen, served = stand_in()
    monkeypatch.setenv("SHADOWTUNE_API_KEYS", "secret")
    words = ["--name", f"tiny={shadow_run}", "--port", "8123", "--max-rows", "4", "--cors-origin", "https://a.example"]
    further = ["--engine", "vllm", "--vllm-arguments", "--max-model-len 64 --enforce-eager"]
    assert main(["serve", "cloud", *words, *further]) == 7  # vLLM's own exit code
    given = json.loads(seen.read_text())
    assert given["key"] == "secret"
    options = dict(zip(given["words"][:-1:2], given["words"][1::2], strict=False))
    assert options["--served-model-name"] == "tiny" and options["--port"] == "8123" and options["--dtype"] == "float32"
    assert options["--max-num-seqs"] == "4" and json.loads(options["--allowed-origins"]) == ["https://a.example"]
    assert given["words"][-3:] == ["--max-model-len", "64", "--enforce-eager"]
    assert "secret" not in " ".join(given["words"])
    assert not os.path.exists(options["--model"])
    config = read_config(str(served))
    assert config.base_name_or_path == str(base)
    assert (served / "model.safetensors").read_bytes() == (shadow_run / "model" / "model.safetensors").read_bytes()
    form = json.loads((served / "prompt_format.json").read_text())
    generation = json.loads((served / "generation_config.json").read_text())
    assert set(form["ends"]) <= set(generation["eos_token_id"])
    assert AutoTokenizer.from_pretrained(served).chat_template


def test_a_saved_shadow_is_served_in_the_precision_of_its_base(tmp_path, base, stand_in):
    seen, served = stand_in()
    model = ShadowForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(base), ShadowConfig(rank=2))
    model.save_pretrained(tmp_path / "shadow")
    assert main(["serve", "cloud", str(tmp_path / "shadow"), "--engine", "vllm", "--port", "0"]) == 7
    words = json.loads(seen.read_text())["words"]
    assert words[words.index("--dtype") + 1] == "float32" and int(words[words.index("--port") + 1]) > 0
    ends = configured_ends(GenerationConfig.from_pretrained(served))
    assert ends == [AutoTokenizer.from_pretrained(base).eos_token_id]


def test_signals_end_vllm_and_leave_nothing(shadow_run, stand_in, tmp_path):
    seen, _ = stand_in(waits=True)
    command = [sys.executable, "-m", "shadowtune", "serve", "cloud", str(shadow_run), "--engine", "vllm"]
    environment = {**os.environ, vllm.PYTHON: str(tmp_path / "python"), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (seen.is_file() and seen.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "starting vLLM 0.32.0" in said and "Traceback" not in said
    assert not list(tmp_path.glob("shadowtune-vllm-*"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"version": None}, "has no vLLM; docs/vllm.md says how"),
        ({"version": "0.31.1"}, "has vLLM 0.31.1, and the plugin was tested with"),
        ({"plugin": False}, "does not find the plugin"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(shadow_run, stand_in, capsys, facts, message):
    stand_in(**facts)
    assert message in refusal(capsys, shadow_run)


def test_a_missing_interpreter_and_one_without_vllm_are_refused(shadow_run, monkeypatch, capsys):
    monkeypatch.setenv(vllm.PYTHON, "/nowhere/python")
    assert "cannot run /nowhere/python to start vLLM" in refusal(capsys, shadow_run)
    monkeypatch.delenv(vllm.PYTHON)
    assert f"the environment of {sys.executable} has no vLLM" in refusal(capsys, shadow_run)


def test_what_vllm_does_not_do_is_refused_by_name(shadow_run, stand_in, tmp_path, capsys, monkeypatch):
    stand_in()
    assert "serves one adapter in each server, got shadow, again" in refusal(
        capsys, shadow_run, "--name", f"again={shadow_run}"
    )
    own = (["--allow-loading"], ["--timeout", "3"], ["--log-prompts"], ["--max-tokens", "3"], ["--learn", "states"])
    for option in own:
        assert f"{option[0]}: of our own server" in refusal(capsys, shadow_run, *option)
    monkeypatch.setenv("SHADOWTUNE_API_KEYS", "one,two")
    assert "takes one API key" in refusal(capsys, shadow_run)
    monkeypatch.delenv("SHADOWTUNE_API_KEYS")
    perturbed_model("llama", injection_after=(5,)).save_pretrained(tmp_path / "shared")
    assert "injection_after=[5]: the vLLM plugin injects into every token" in refusal(capsys, tmp_path / "shared")
    perturbed_model("gpt_oss").save_pretrained(tmp_path / "unknown")
    assert "the base is a gpt_oss model, which the vLLM plugin does not run" in refusal(capsys, tmp_path / "unknown")
    assert main(["serve", "cloud", str(shadow_run), "--vllm-arguments=--enforce-eager"]) == 2
    assert "--vllm-arguments has no effect without --engine vllm" in capsys.readouterr().err
