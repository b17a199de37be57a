import pytest
import torch

from benchmarks.generation import DECODERS, DecodeCandidate, DecodeSettings, plan_decode
from benchmarks.methods import CUDA_BASELINES, METHODS, OURS
from shadowtune.errors import ConfigError, ShadowtuneError

SMALL = {"model": "tiny", "prompt": 5, "new": 3, "batch": (2,)}
PLAIN = [name for name, decoder in DECODERS.items() if not decoder.compiled and decoder.method not in CUDA_BASELINES]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)


def candidate(name, **settings):
    size = 16 if METHODS[DECODERS[name].method].size_name else None
    return DecodeCandidate(DecodeSettings(**{**SMALL, "warm_up": 0, **settings}), name, size=size)


@pytest.mark.parametrize("name", PLAIN)
def test_every_candidate_generates_so_many_tokens_for_every_row(name):
    one = candidate(name)
    assert one.prepare({"batch": 2}) >= 0
    assert one.generate().shape == (2, 5 + 3)
    assert one.measure() > 0


def test_what_the_first_call_builds_counts_for_no_step(monkeypatch):
    one = candidate("base")
    done = []
    monkeypatch.setattr(one, "_step", lambda: done.append("step"))
    monkeypatch.setattr(one, "mark_loaded", lambda model: done.append("loaded"))
    one.prepare({"batch": 2})
    assert done == ["step", "loaded", "step"]


def test_a_sample_counts_the_new_tokens_of_all_rows(monkeypatch):
    one = candidate("base")
    one.prepare({"batch": 2})
    monkeypatch.setattr(one, "_time", lambda steps: 0.5 * steps)
    assert one.measure() == 2 * 3 / 0.5


def test_every_candidate_gets_the_same_prompts():
    first, second = candidate("base"), candidate(OURS)
    for one in (first, second):
        one.prepare({"batch": 2})
    assert torch.equal(first.prompts["input_ids"], second.prompts["input_ids"])


@pytest.mark.parametrize("name", ["lora", "dora", "peft-shadow", "shadow-peft", OURS, "shadow-detached"])
def test_no_adapter_stands_at_its_start(name):
    base, one = candidate("base"), candidate(name)
    ids = torch.arange(3, 8).unsqueeze(0)
    with torch.no_grad():
        plain, adapted = (model(input_ids=ids).logits for model in (base.model, one.model))
    assert not torch.allclose(plain, adapted, atol=1e-5)


def test_ours_works_in_the_mode_that_its_name_says():
    assert candidate(OURS).model.mode == "attached"
    assert candidate("shadow-detached").model.mode == "detached"


def test_the_compiled_step_is_a_single_graph_for_each_shape_on_any_device(monkeypatch):
    compiled = []

    def compile_nothing(function, **settings):
        compiled.append(settings)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    for name in ("base-compiled", "shadow-compiled", "lora-compiled"):
        one = candidate(name)
        one.prepare({"batch": 2})
        eager = candidate(DECODERS[name].method)
        eager.prepare({"batch": 2})
        assert torch.equal(one.generate(), eager.generate())
    assert len(compiled) == 3
    assert all(settings["fullgraph"] and settings["dynamic"] is False for settings in compiled)


def test_adapters_can_be_decoded_in_another_precision():
    one = candidate(OURS, dtype="bfloat16", adapter_dtype="bfloat16")
    assert {parameter.dtype for parameter in one.model.parameters()} == {torch.bfloat16}
    one.prepare({"batch": 1})
    kept = candidate(OURS, dtype="bfloat16")
    assert {parameter.dtype for parameter in kept.model.shadow.parameters()} == {torch.float32}


def test_a_baseline_that_stops_early_is_refused(monkeypatch):
    one = candidate("base")
    monkeypatch.setattr(one, "generate", lambda: torch.zeros(2, 7))
    with pytest.raises(ShadowtuneError, match="base generated 2 tokens, not 3"):
        one.prepare({"batch": 2})


def test_ours_in_every_guise_and_the_baselines_have_equal_budgets():
    planned = plan_decode(
        DecodeSettings(**SMALL, candidate="shadow-compiled", baselines=("lora", "base", OURS, "lora-compiled"))
    )
    sizes = {name: arguments["size"] for name, arguments in planned.candidates.items()}
    assert list(sizes) == ["shadow-compiled", "lora", "base", OURS, "lora-compiled"]
    assert sizes["shadow-compiled"] == sizes[OURS] > sizes["lora"] == sizes["lora-compiled"] > 0
    assert sizes["base"] is None
    assert [case.name for case in planned.cases] == ["batch=2"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baselines": ("base-compild",)}, "did you mean base-compiled"),
        ({"baselines": (OURS, "base")}, "shadow is compared with itself"),
        ({"candidate": "lora"}, "candidate must be one of shadow, shadow-detached, shadow-compiled"),
        ({"prompt": 2047}, "length 2050 exceeds the 2048 positions of tiny"),
        ({"batch": (0,)}, "batch must be"),
        ({"batch": ()}, "batch must be"),
        ({"new": 1, "prompt": 0}, "prompt .*new"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said) as refused:
        plan_decode(DecodeSettings(**{**SMALL, **settings}))
    assert "\n" not in str(refused.value)
