import pytest

from benchmarks.prefix import PrefixCandidate, PrefixSettings, plan_prefix
from shadowtune.errors import ConfigError

SMALL = {"model": "tiny", "adapters": 3, "shared": (30,), "repeats": 1, "warm_up": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)


@pytest.mark.parametrize(("name", "reused"), [("shared", 2), ("unshared", 0)])
def test_all_but_one_adapter_reuse_the_prompt_of_a_round(name, reused):
    one = PrefixCandidate(PrefixSettings(**SMALL), name)
    assert one.prepare({"shared": 30}) >= 0
    assert one.measure() > 0
    done = one.engine.counters()
    rounds = done["finished"] // 3
    assert done["cached_prompt_tokens"] == rounds * reused * 32
    assert 0 < one.facts["mean_seconds_to_first_token"] <= one.facts["longest_seconds_to_first_token"]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="variant must be one of"):
        PrefixSettings(**SMALL, variant="peft")
    with pytest.raises(ConfigError, match="exceeds the 2048 positions"):
        plan_prefix(PrefixSettings(**{**SMALL, "shared": (2048,)}))
