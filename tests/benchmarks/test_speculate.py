import pytest
import torch

from benchmarks.speculation import DRAFTING, OTHERS, SpeculateCandidate, SpeculateSettings, plan_speculate
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.model.speculation.decoding import Speculator
from tests.support.tasks import write_task_data

SMALL = {"model": "tiny", "prompt": 5, "new": 6, "rows": 3, "repeats": 1, "warm_up": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)


def candidate(name, **settings):
    return SpeculateCandidate(SpeculateSettings(**{**SMALL, **settings}), name)


@pytest.mark.parametrize("name", [name for name in (*DRAFTING, *OTHERS) if "draft-head" not in name])
def test_every_candidate_answers_every_prompt(name):
    one = candidate(name)
    assert one.prepare({"batch": 1}) >= 0
    assert one.measure() > 0
    assert one.new_tokens == 3 * 6
    assert one.facts["tokens_per_pass"] >= 1
    assert bool(one.facts["accepted"]) == (name in DRAFTING and one.speculator.statistics.verified != [])


def test_every_round_has_other_prompts_and_every_candidate_the_same():
    first, second = candidate("attached", repeats=2), candidate("base", repeats=2)
    rounds = [[batch["input_ids"].tolist() for batch in one._next_batches()] for one in (first, first, second)]
    assert rounds[0] != rounds[1]
    assert rounds[0] == rounds[2]


def test_prompts_are_the_tasks(tmp_path):
    write_task_data(tmp_path, "gsm8k")
    one = candidate("attached", task="gsm8k", data=str(tmp_path), new=3)
    assert len(one.prompts) == 3
    assert plan_speculate(SpeculateSettings(**SMALL, task="gsm8k", data=str(tmp_path))).cases[0].values == {"batch": 1}


def test_drafts_that_change_what_is_said_are_an_error(monkeypatch):
    one = candidate("speculate")
    plain = Speculator.__call__

    def wrong(self, *arguments, **keywords):
        return plain(self, *arguments, **keywords) + 1

    monkeypatch.setattr(Speculator, "__call__", wrong)
    with pytest.raises(ShadowtuneError, match="generate different tokens"):
        one.prepare({"batch": 1})


def test_a_draft_head_needs_an_adapter_that_was_trained_for_it():
    with pytest.raises(ShadowtuneError, match="pass --adapter"):
        candidate("draft-head")
    with pytest.raises(ShadowtuneError, match="pass --other-adapter"):
        candidate("other-draft-head", adapter="runs/model")


def test_answers_are_counted_without_their_padding(monkeypatch):
    one = candidate("attached")
    one.prepare({"batch": 3})
    answers = torch.tensor([[1] * 5 + [4, 4, 0], [1] * 5 + [4, 0, 0], [1] * 5 + [4, 4, 4]])
    monkeypatch.setattr(one, "_generate", lambda inputs, speculator: answers)
    one.measure()
    assert one.new_tokens == 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"baselines": ("speculate",)}, "must name others than speculate"),
        ({"baselines": ("bas",)}, r"unknown baseline 'bas' \(did you mean base\?\)"),
        ({"candidate": "attached"}, "candidate must be one of speculate"),
        ({"batch": (0,)}, "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        plan_speculate(SpeculateSettings(**{**SMALL, **settings}))
