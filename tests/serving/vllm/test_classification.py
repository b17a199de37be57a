"""Class probabilities in vLLM equal those of ``ShadowForSequenceClassification`` in float32."""

import pytest
import torch

from shadowtune import ShadowConfig, ShadowForSequenceClassification
from shadowtune.config.shadow import RECOMMENDED_SHADOW
from tests.serving.vllm.support import job, needs_vllm, prompts, run_jobs, save_base, sizes, wide_base
from tests.support.bases import tiny_classifier
from tests.support.shadows import perturb

pytestmark = needs_vllm

CASES = {
    "llama": ("llama", {}),
    "stateless": ("llama", dict(RECOMMENDED_SHADOW)),
    "qwen3": ("qwen3", {"num_shadow_layers": 2}),
    "gpt2": ("gpt2", {}),
}


def _saved(directory, kind, settings, of_language_model=False):
    base = tiny_classifier(kind, **sizes(kind), num_labels=3)
    save_base(base, directory / "base")
    if of_language_model:  # its head was made when it was loaded as a classifier
        save_base(wide_base(kind), directory / "base")
        base = type(base).from_pretrained(directory / "base", num_labels=3)
        base.config.pad_token_id = 0
    settings = ShadowConfig(**{"rank": 4, "update_width": 3, "alpha": 0.7, **settings})
    model = perturb(ShadowForSequenceClassification.from_base(base, settings)).eval()
    model.save_pretrained(directory / "shadow")
    return model, directory / "shadow"


@torch.no_grad()
def _probabilities(model):
    return [model(input_ids=ids).logits[0].softmax(-1).tolist() for ids in prompts().split(1)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root, expected, jobs = tmp_path_factory.mktemp("classifiers"), {}, {}
    cases = {name: (*case, False) for name, case in CASES.items()} | {"language model": ("llama", {}, True)}
    for name, case in cases.items():
        model, directory = _saved(root / name, *case)
        expected[name] = _probabilities(model)
        with model.disable_adapter():
            assert not torch.allclose(torch.tensor(expected[name]), torch.tensor(_probabilities(model)), atol=1e-3)
        jobs[name] = {**job(directory), "classify": True}
    return expected, run_jobs(jobs, root)


@pytest.mark.parametrize("name", [*CASES, "language model"])
def test_classifiers_have_the_probabilities_of_the_model(outcomes, name):
    expected, results = outcomes
    found = results[name].get("probabilities", results[name])
    assert torch.allclose(torch.tensor(found), torch.tensor(expected[name]), atol=1e-5)
