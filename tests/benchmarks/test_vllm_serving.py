"""The benchmark ``vllm`` with a stand-in for the interpreter of vLLM: what it is sent, what is refused."""

import json
import stat
import sys

import pytest

from benchmarks.serving import ServingCandidate
from benchmarks.vllm_serving import ATTACHED, BASE, ENGINE, PYTHON, VllmSettings, open_vllm, plan_vllm
from shadowtune.errors import ConfigError, ShadowtuneError

SMALL = {"model": "tiny", "prompt": 5, "new": 4, "streams": (3,), "repeats": 1, "warm_up": 0}
STAND_IN = """#!{python}
import json, sys
job = json.loads(sys.stdin.readline())
open({seen!r}, "w").write(json.dumps(job))
print("{{}}", flush=True)
for line in sys.stdin:
    print(json.dumps({{"tokens": int(line) * {each}, "peak_mb": 2.5}}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)

    def make(each=4, text=STAND_IN):
        file, seen = tmp_path / "python", tmp_path / "seen.json"
        file.write_text(text.format(python=sys.executable, seen=str(seen), each=each))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv(PYTHON, str(file))
        return seen

    return make


@pytest.mark.parametrize(("name", "kind"), [(ATTACHED, "shadow"), (BASE, "llama")])
def test_vllm_is_sent_a_saved_model_and_prompts(stand_in, name, kind):
    seen = stand_in()
    one = open_vllm(VllmSettings(**SMALL, mode="eager"), name)
    job = json.loads(seen.read_text())
    with open(f"{job['model']}/config.json") as file:
        assert json.load(file)["model_type"] == kind
    assert job["engine"]["enforce_eager"] and not job["engine"]["enable_prefix_caching"]
    assert [len(ids) for ids in job["prompts"]] == [5, 5, 5] and job["new"] == 4
    assert one.prepare({"streams": 3}) == 2.5 and one.measure() > 0


def test_our_engine_answers_the_same_streams(stand_in):
    stand_in()
    assert isinstance(open_vllm(VllmSettings(**SMALL), ENGINE), ServingCandidate)


def test_a_wrong_number_of_tokens_and_an_end_are_errors(stand_in):
    stand_in(each=3)
    with pytest.raises(ShadowtuneError, match="answered with 9 tokens, not 4 in each stream"):
        open_vllm(VllmSettings(**SMALL), BASE).prepare({"streams": 3})
    stand_in(text="#!{python}\nraise SystemExit(5)")
    with pytest.raises(ShadowtuneError, match="vLLM ended with exit code 5"):
        open_vllm(VllmSettings(**SMALL), BASE)


def test_what_cannot_be_measured_is_refused(stand_in, monkeypatch):
    stand_in()
    assert list(plan_vllm(VllmSettings(**SMALL)).candidates) == [ATTACHED, BASE, ENGINE]
    with pytest.raises(ConfigError, match="unknown baseline 'base'"):
        plan_vllm(VllmSettings(**SMALL, baselines=("base",)))
    with pytest.raises(ConfigError, match="mode must be one of compiled, eager"):
        VllmSettings(**SMALL, mode="fast")
    monkeypatch.delenv(PYTHON)
    with pytest.raises(ConfigError, match="VLLM_PYTHON names no interpreter"):
        plan_vllm(VllmSettings(**SMALL))
