"""Greedy tokens in vLLM equal those of ``generate`` in float32: architectures, settings of a shadow, ways to run it."""

import json

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.attach.architectures import ARCHITECTURES
from shadowtune.config.shadow import RECOMMENDED_SHADOW
from shadowtune.serving.vllm.support import REFUSED
from tests.serving.vllm.support import greedy, job, make, needs_vllm, run_jobs, save_base, wide_base
from tests.support.shadows import perturb

pytestmark = needs_vllm

SETTINGS = {
    "from the first block": {"inject_first": True},
    "from the middle": {"injection_start": 0.5},
    "logit interpolation": {"logit_interpolation": 0.6},
    "stateless": dict(RECOMMENDED_SHADOW),
    "stateless from the middle": {**RECOMMENDED_SHADOW, "injection_start": 0.5},
    "stateless with logit interpolation": {**RECOMMENDED_SHADOW, "logit_interpolation": 0.6},
    "narrow": {"num_shadow_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "shared by all boundaries": {"depth_sharing": "full"},
    "other update": {"update_bias": True, "activation": "gelu", "update_norm": False, "channel_scaling": True},
    "no update": {"update": False},
    "draft head": {"draft_rank": 4},
}
RUNS = {
    "prefix cache and chunked prefill": {"enable_prefix_caching": True, "max_num_batched_tokens": 16},
    "compiled": {"enforce_eager": False},
}
DTYPES = {
    "network.base.model.layers.0.mlp.down_proj.weight": "torch.bfloat16",
    "network.shadow.backbone.model.layers.0.mlp.down_proj.weight": "torch.bfloat16",
    "network.shadow.boundaries.injection_downs": "torch.float32",
    "network.shadow.projection.weight": "torch.float32",
}
"""Beside a base in bfloat16."""
EXPERTS = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Expected tokens and the worker's result of each job."""
    root, expected, jobs = tmp_path_factory.mktemp("vllm"), {}, {}

    def add(name, model, directory, mode="attached", **engine):
        tokens = greedy(model, mode)
        assert tokens != greedy(model, "base")
        expected[name], jobs[name] = tokens, job(directory, **engine)

    for kind in ARCHITECTURES:
        model, directory = make(root / kind, kind)
        add(kind, model, directory)
        if kind == "llama":
            llama = model, directory
            model.detached().save_pretrained(root / "detached")
            add("detached", model, root / "detached", "detached")
            drafting = {"method": "draft_model", "model": str(root / "detached"), "num_speculative_tokens": 3}
            add("drafts of the detached model", model, directory, speculative_config=drafting)
    for name, settings in SETTINGS.items():
        add(name, *make(root / name, **settings))
    for kind in EXPERTS:
        add(f"{kind} copies", *make(root / f"{kind} copies", kind, init_layers=(1,)))
    _, directory = make(root / "dtypes", dtype=torch.bfloat16, hidden_size=64, num_attention_heads=2)
    jobs["dtypes"] = {**job(directory, dtype="bfloat16"), "dtypes": list(DTYPES)}
    add("pretrained backbone", *_with_pretrained_backbone(root / "pretrained"))
    for name, engine in RUNS.items():
        add(name, *llama, **engine)
    return expected, run_jobs(jobs, root)


def _with_pretrained_backbone(directory):
    small = wide_base(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, seed=5)
    small.save_pretrained(directory / "small")
    base = save_base(wide_base(), directory / "base")
    settings = ShadowConfig(rank=4, update_width=3, alpha=0.7, backbone=str(directory / "small"))
    model = perturb(ShadowForCausalLM.from_base(base, settings)).eval()
    model.save_pretrained(directory / "shadow")
    return model, directory / "shadow"


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in REFUSED])
def test_every_architecture_has_the_tokens_of_generate(outcomes, kind):
    expected, results = outcomes
    assert results[kind] == {"tokens": expected[kind]}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_plugin_does_not_run_is_refused_by_name(outcomes, kind):
    assert f"the base is a {kind} model, which the vLLM plugin does not run" in outcomes[1][kind]["error"]


NAMES = [*SETTINGS, *RUNS, *(f"{kind} copies" for kind in EXPERTS)]


@pytest.mark.parametrize("name", [*NAMES, "pretrained backbone", "detached", "drafts of the detached model"])
def test_settings_of_a_shadow_and_of_vllm_have_the_tokens_of_generate(outcomes, name):
    expected, results = outcomes
    assert results[name] == {"tokens": expected[name]}


def test_boundaries_and_projections_keep_the_precision_that_they_were_saved_in(outcomes):
    assert outcomes[1]["dtypes"] == {"dtypes": list(DTYPES.values())}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """The errors of jobs that cannot run."""
    root = tmp_path_factory.mktemp("refused")
    made = {name: make(root / name) for name in ("good", "wrong base", "damaged", "quantized")}
    base = made["wrong base"][0].base
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    base.save_pretrained(root / "wrong base" / "base")
    weights = made["damaged"][1] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    config = made["quantized"][1] / "config.json"
    values = json.loads(config.read_text())
    values["base_config"]["quantization_config"] = {"quant_method": "bitsandbytes"}
    config.write_text(json.dumps(values))
    jobs = {name: job(directory) for name, (_, directory) in made.items() if name != "good"}
    jobs["pipeline"] = job(made["good"][1], pipeline_parallel_size=2)
    jobs["too long"] = job(made["good"][1], max_model_len=128, hf_overrides={"max_position_embeddings": 64})
    return run_jobs(jobs, root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong base", "has other weights than those that the shadow was trained beside"),
        ("damaged", "its contents do not match their checksum"),
        ("quantized", "was quantized in training"),
        ("pipeline", "ipeline"),
        ("too long", "pass --max-model-len 64"),
    ],
)
def test_an_error_says_what_to_do(refusals, name, message):
    assert message in refusals[name]["error"]
