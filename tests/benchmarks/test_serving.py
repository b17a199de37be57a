import pytest

from benchmarks.serving import MODES, ServingCandidate, ServingSettings, plan_serving
from shadowtune.errors import ConfigError, ShadowtuneError

SMALL = {"model": "tiny", "prompt": 5, "new": 4, "streams": (3,), "repeats": 1, "warm_up": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)


@pytest.mark.parametrize("name", MODES)
def test_every_stream_is_answered(name):
    one = ServingCandidate(ServingSettings(**SMALL), name)
    assert one.prepare({"streams": 3}) >= 0
    assert one.measure() > 0
    done = one.engine.counters()
    assert done["completion_tokens"] == done["finished"] * 4
    least, most = (1, 1) if name == "alone" else (1.5, 3)  # the first may have begun before the last has come
    assert least <= one.facts["tokens_per_pass"] <= most


def test_mixed_streams_have_different_adapters_and_the_others_one():
    mixed, batched = (ServingCandidate(ServingSettings(**SMALL, adapters=2), name) for name in ("mixed", "batched"))
    assert [mixed._request(stream).model for stream in range(3)] == ["adapter-0", "adapter-1", "adapter-0"]
    assert {batched._request(stream).model for stream in range(3)} == {"adapter-0"}


def test_an_answer_of_another_length_is_refused(monkeypatch):
    one = ServingCandidate(ServingSettings(**SMALL), "batched")

    async def short(request):
        return 3

    monkeypatch.setattr(one, "_ask", short)
    with pytest.raises(ShadowtuneError, match="batched answered with"):
        one.prepare({"streams": 3})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baselines": ("mixed",)}, "must name others than mixed"),
        ({"baselines": ("batch",)}, r"unknown baseline 'batch' \(did you mean batched\?\)"),
        ({"candidate": "many"}, "candidate must be one of mixed"),
        ({"streams": (0,)}, "at least 1"),
        ({"prompt": 3000}, "exceeds the 2048 positions"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        plan_serving(ServingSettings(**{**SMALL, **settings}))
