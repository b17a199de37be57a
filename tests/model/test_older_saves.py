"""Adapters, a policy and settings that release 0.1.0 wrote open as they were (``tests/fixtures/release-0.1.0``)."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shadowtune import ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.config.loading import load_config
from shadowtune.config.serving import CurvePoint, PolicyConfig, Prices, Weights
from shadowtune.config.training import TrainConfig
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.model.checkpoint import read_tensors
from tests.support.shadows import tokens

SAVED = Path(__file__).parents[1] / "fixtures" / "release-0.1.0"
ADAPTERS = {
    "paper": ShadowForCausalLM,
    "stateless": ShadowForCausalLM,
    "classifier": ShadowForSequenceClassification,
}


@pytest.fixture(scope="module")
def expected():
    return load_file(SAVED / "logits.safetensors")


def loaded(name):
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", FutureWarning
        )  # of settings with an old name, which only their writer can change
        return ADAPTERS[name].from_pretrained(SAVED / name, base=str(SAVED / "base"))


@pytest.mark.parametrize("mode", ["attached", "detached"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_computes_what_it_computed_when_it_was_saved(name, mode, expected):
    model = loaded(name).set_mode(mode)
    with torch.no_grad():
        logits = model(tokens(2, 7)).logits
        base = model.set_mode("base")(tokens(2, 7)).logits
    torch.testing.assert_close(logits, expected[f"{name}.{mode}"], rtol=0, atol=1e-5)
    assert (logits - base).abs().max() > 0.01, "the adapter changes nothing"


def test_its_draft_head_and_settings_have_their_names_of_today(expected, tmp_path):
    model = loaded("paper")
    states = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    head = model.shadow.draft_head
    torch.testing.assert_close(head(states, head.begin(states.flip(0))).previous, expected["paper.drafts"])
    assert model.draft_vocabulary.tolist() == [3, 7, 50]
    assert PromptFormat.load(SAVED / "paper").ends == (2, 5)
    model.save_pretrained(tmp_path)
    assert read_tensors(str(tmp_path)).keys() >= {"shadow.draft_head.down.weight", "shadow.draft_head.up.weight"}
    loaded("stateless").save_pretrained(tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config.json").read_text())["shadow"]["logit_interpolation"] == 0.2


def test_a_policy_is_read():
    curve = (CurvePoint(0.0, 0.5, 0.0, 0.0), CurvePoint(1.0000005, 0.9, 1.0, 7.0))
    weights = Weights(0.1, 1.0, 2.0, 3.0, 4.0, 5.0)
    expected = PolicyConfig("confidence", 0.7, "learned", None, weights, Prices(1.0, 2.0, 3.0), curve)
    assert PolicyConfig.load(SAVED / "policy.json") == expected


def test_training_settings_are_read_with_a_warning():
    with pytest.warns(FutureWarning, match="now called"):
        config = load_config(TrainConfig, SAVED / "train.yaml", [])
    assert (config.shadow.logit_interpolation, config.shadow.draft_rank) == (0.2, 4)
    assert config.fits_logit_interpolation and config.optimizer.learning_rate == 1e-3
