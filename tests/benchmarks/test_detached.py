import importlib.util
import tempfile

import pytest
import torch

from benchmarks import detached
from benchmarks.bases import base_config, load_benchmark_base
from benchmarks.detached import EXPORTS, OURS, DetachedCandidate, DetachedSettings, make_shadow, plan_detached
from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.export.runtimes import GgufModel, OnnxModel, Runtime, TorchModel
from tests.support.shadows import perturb

SMALL = {"model": "tiny", "prompt": 5, "new": 3, "warm_up": 0, "baselines": ("base",)}
needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)


def candidate(name, **settings):
    return DetachedCandidate(DetachedSettings(**{**SMALL, **settings}), name)


class Scripted(Runtime):
    prompt_seconds = 0.25

    def logits(self, input_ids):
        raise NotImplementedError

    def generate(self, input_ids, max_new_tokens, ends=()):
        return [0] * max_new_tokens


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        (OURS, TorchModel),
        ("attached", TorchModel),
        ("base", TorchModel),
        ("safetensors-f16", TorchModel),
        ("safetensors-int8", TorchModel),
        pytest.param("onnx-int4", OnnxModel, marks=needs_onnx),
        pytest.param("gguf-q4_0", GgufModel, marks=needs_llama_cpp),
    ],
)
def test_every_candidate_runs_in_its_own_runtime_and_has_a_size(name, runtime):
    one = candidate(name)
    assert type(one.runtime) is runtime
    for phase in ("prefill", "decode"):
        assert one.prepare({"phase": phase}) >= 0
        assert one.measure() > 0
        assert set(one.facts) == set(detached.DETACHED.facts)
        assert one.facts["disk_mb"] > 0


@needs_onnx
def test_what_is_measured_is_the_detached_shadow():
    with torch.no_grad():
        ids = torch.tensor([candidate("base").prompt])
        expected = make_shadow(DetachedSettings(**SMALL)).eval().set_mode("detached")(ids).logits[0, -1]
        attached = make_shadow(DetachedSettings(**SMALL)).eval()(ids).logits[0, -1]
    for name in (OURS, "onnx-f32"):
        one = candidate(name)
        torch.testing.assert_close(torch.tensor(one.runtime.logits(one.prompt)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(candidate("attached").runtime.logits(one.prompt)), attached)
    base = torch.tensor(candidate("base").runtime.logits(one.prompt))
    for first, second in ((expected, attached), (expected, base), (attached, base)):
        assert not torch.allclose(first, second, atol=1e-3)


def test_a_sample_counts_the_tokens_of_its_phase_alone(monkeypatch):
    one = candidate("base")

    def half_a_second_each(steps):
        for _ in range(steps):
            one._step()
        return 0.5 * steps

    monkeypatch.setattr(one, "_time", half_a_second_each)
    one.runtime, one.warm_up = Scripted(), 2
    one.prepare({"phase": "prefill"})
    assert one.measure() == 5 / 0.5
    one.prepare({"phase": "decode"})
    assert one.measure() == (3 - 1) / (0.5 - 0.25)


def test_sizes_are_those_of_the_weights_and_shrink_with_the_bits(tmp_path):
    names = ("base", "attached", OURS, "safetensors-f16")
    base, attached, ours, half = (candidate(name).disk_mb for name in names)
    weights = sum(
        parameter.numel() for parameter in load_benchmark_base("tiny", torch.float32, torch.device("cpu")).parameters()
    )
    assert base == weights * 4 / 1e6
    assert attached > base
    plain = make_shadow(DetachedSettings(**SMALL)).detached()
    plain.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size / 1e6
    assert file < ours < file + 0.1  # and the tokenizer of a random base, which has 257 pieces
    assert half == pytest.approx(ours - file / 2, rel=0.05)


@pytest.mark.parametrize("name", [OURS, pytest.param("onnx-f16", marks=needs_onnx)])
def test_no_file_is_left_and_what_is_open_goes_on(monkeypatch, tmp_path, name):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = candidate(name)
    assert not list(tmp_path.iterdir())
    assert len(one.runtime.generate(one.prompt, 4)) == 4


def test_a_saved_shadow_takes_the_place_of_the_untrained_one(tmp_path):
    torch.manual_seed(0)
    base = load_benchmark_base("tiny", torch.float32, torch.device("cpu"))
    saved = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(num_shadow_layers=3))).eval()
    saved.save_pretrained(tmp_path)
    one = candidate(OURS, adapter=str(tmp_path))
    assert one.runtime.model.config.num_hidden_layers == 3
    ids = torch.tensor([one.prompt])
    with torch.no_grad():
        expected = saved.set_mode("detached")(ids).logits[0, -1]
    torch.testing.assert_close(torch.tensor(one.runtime.logits(one.prompt)), expected, rtol=0, atol=1e-5)


def test_a_candidate_that_stops_early_is_refused(monkeypatch):
    one = candidate("base")
    monkeypatch.setattr(one.runtime, "generate", lambda prompt, new: [1])
    one.prepare({"phase": "prefill"})
    with pytest.raises(ShadowtuneError, match="base generated 1 tokens, not 3"):
        one.prepare({"phase": "decode"})


def test_ours_comes_first_and_each_phase_is_a_case():
    planned = plan_detached(DetachedSettings(**{**SMALL, "candidate": "onnx-int8", "baselines": ("attached", OURS)}))
    assert list(planned.candidates) == ["onnx-int8", "attached", OURS]
    assert [(case.name, case.values) for case in planned.cases] == [
        ("prefill", {"phase": "prefill"}),
        ("decode", {"phase": "decode"}),
    ]


def test_a_model_is_as_long_as_prompt_and_answer_need():
    length = base_config("tiny").max_position_embeddings
    plan_detached(DetachedSettings(**{**SMALL, "prompt": length - 3}))
    with pytest.raises(ConfigError, match=f"length {length + 1} exceeds"):
        plan_detached(DetachedSettings(**{**SMALL, "prompt": length - 2}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baselines": ("onnx-int9",)}, "unknown baseline 'onnx-int9' .did you mean onnx-int"),
        ({"baselines": (OURS, "base")}, "detached is compared with itself"),
        ({"baselines": ()}, "no baseline to compare with"),
        ({"candidate": "attached"}, "candidate must be one of detached, gguf-f32"),
        ({"phases": ("decod",)}, "phases must be some of prefill, decode"),
        ({"phases": ()}, "phases must be some of prefill, decode"),
        ({"new": 1}, "new must be at least 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said) as refused:
        plan_detached(DetachedSettings(**{**SMALL, **settings}))
    assert "\n" not in str(refused.value)


def test_files_run_on_the_processor_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="run on the processor"):
        DetachedSettings(**SMALL, device="cuda")


@pytest.mark.parametrize(("missing", "said"), [("xllamacpp", "xllamacpp, which is not"), ("gguf", "shadowtune.export")])
def test_a_missing_runtime_is_no_reason_to_measure_another_one(monkeypatch, missing, said):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest)
    )
    plan_detached(DetachedSettings(**SMALL))
    with pytest.raises(ShadowtuneError, match=said):
        plan_detached(DetachedSettings(**{**SMALL, "baselines": ("gguf-q8_0",)}))


def test_every_format_that_is_written_can_be_measured():
    assert {"gguf-q4_0", "onnx-int4", "safetensors-int8", OURS} < set(EXPORTS)
    assert set(detached.BASELINES) <= {*EXPORTS, *detached.MODELS}
