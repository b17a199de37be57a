import pytest

from benchmarks.generation import BATCHED, LOOPS, EvaluateCandidate, EvaluateSettings, plan_evaluate
from shadowtune.errors import ConfigError

SMALL = {"model": "tiny", "rows": 5, "prompt": 12, "new": (3, 4), "batch": 3, "warm_up": 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("benchmarks.measurement.TimedCandidate.sample_seconds", 0.0)


def candidate(name, **settings):
    return EvaluateCandidate(EvaluateSettings(**{**SMALL, **settings}), name)


def test_a_case_for_each_length_of_answers_and_ours_first():
    planned = plan_evaluate(EvaluateSettings(**SMALL))
    assert [case.name for case in planned.cases] == ["new=3", "new=4"]
    assert list(planned.candidates) == [BATCHED, *LOOPS]


def test_all_give_the_same_answers_to_prompts_of_different_lengths():
    answers = []
    for name in (BATCHED, *LOOPS):
        one = candidate(name)
        one.prepare({"new": 4})
        answers.append(one.answers())
    assert answers[0] == answers[1] == answers[2]
    assert len({len(prompt) for prompt in one.prompts}) > 2


def test_ours_answers_in_batches_and_the_baselines_one_by_one_with_and_without_a_cache(monkeypatch):
    seen = {}
    for name in (BATCHED, *LOOPS):
        one, calls = candidate(name), []
        one.model.register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append((kwargs["input_ids"].shape, kwargs["use_cache"])),
            with_kwargs=True,
        )
        one.new = 2
        one.answers()
        seen[name] = calls
    assert max(shape[0] for shape, _ in seen[BATCHED]) == 3
    assert all(shape[0] == 1 for name in LOOPS for shape, _ in seen[name])
    assert any(shape[1] == 1 for shape, _ in seen["one-by-one"])
    assert all(shape[1] >= 3 for shape, _ in seen["uncached"])


def test_a_sample_counts_the_tokens_of_all_answers(monkeypatch):
    one = candidate(BATCHED)
    one.prepare({"new": 3})
    monkeypatch.setattr(one, "_time", lambda steps: 0.5 * steps)
    assert one.measure() == sum(len(answer) for answer in one.answers()) / 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baselines": ("one-by-two",)}, "did you mean"),
        ({"baselines": ()}, "--baselines"),
        ({"model": "tiny", "prompt": 4000}, "positions"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(settings, message):
    with pytest.raises(ConfigError, match=message):
        plan_evaluate(EvaluateSettings(**{**SMALL, **settings}))


@pytest.mark.parametrize("settings", [{"new": ()}, {"new": (0,)}, {"batch": 0}, {"rows": 0}])
def test_numbers_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError):
        EvaluateSettings(**{**SMALL, **settings})
