"""Scheduling step by step, without threads; limits and statistics."""

import pytest

from shadowtune.errors import ConfigError
from shadowtune.serving.engine.model_runner import ModelRunner
from shadowtune.serving.engine.request_processor import RequestProcessor
from shadowtune.serving.engine.scheduler import EngineStatistics, Limits, Scheduler
from shadowtune.serving.requests import RequestError
from tests.serving.engine.support import Collected, alone, prompt, request
from tests.support.bases import tiny_base
from tests.support.tokenizers import tiny_tokenizer


class Watched:
    """A scheduler over the bare base, and a record of the passes: tokens of each sequence."""

    def __init__(self, monkeypatch, **limits):
        self.base, limits = tiny_base(), Limits(**limits)
        self.runner, self.statistics, self.passes = ModelRunner(self.base), EngineStatistics(), []
        self.scheduler = Scheduler(self.runner, limits, self.statistics)
        self.processor = RequestProcessor(self.base, tiny_tokenizer(), limits)
        run = self.runner.run

        def watch(sequences, tokens, known=None):
            self.passes.append([len(line) for line in tokens])
            return run(sequences, tokens, known)

        monkeypatch.setattr(self.runner, "run", watch)

    def add(self, **settings):
        sequence = self.processor.sequence(request("base", **settings), None, Collected())
        self.scheduler.add(sequence)
        return sequence

    def finish(self):
        while self.scheduler.busy:
            self.scheduler.step()


def said(sequence):
    return [token.id for piece in sequence.deliver[:-1] for token in piece.tokens]


@pytest.fixture
def watched(monkeypatch):
    return lambda **limits: Watched(monkeypatch, **limits)


def test_a_long_prompt_is_prefilled_in_chunks_between_decoding_steps_of_others(watched):
    one = watched(prefill_tokens=8)
    short, long = one.add(length=4, max_tokens=6), one.add(length=30, max_tokens=2)
    for _ in range(5):
        one.scheduler.step()
    assert one.passes == [[4], [1], [8], [1], [8], [1], [8], [1], [6], [1, 1]]
    one.finish()
    assert said(short) == alone(one.base, prompt(4), 6)
    assert said(long) == alone(one.base, prompt(30), 2)


def test_prompts_of_similar_length_are_prefilled_together(watched):
    one = watched(prefill_tokens=40)
    for length in (9, 3, 10, 16, 8, 17):
        one.add(length=length, max_tokens=2)
    one.finish()
    assert [lengths for lengths in one.passes if max(lengths) > 1] == [[9, 10, 8], [3], [16, 17]]


def test_sequences_are_admitted_in_order_as_others_end(watched):
    one = watched(max_sequences=2)
    sequences = [one.add(length=5, max_tokens=new) for new in (2, 4, 3)]
    one.scheduler.step()
    assert (one.statistics.running, one.statistics.waiting) == (1, 1)  # the first has ended already
    one.finish()
    assert [said(sequence) for sequence in sequences] == [alone(one.base, prompt(5), new) for new in (2, 4, 3)]
    assert len(one.runner.cache) == 0
    assert max(len(lengths) for lengths in one.passes) == 2


def test_the_last_thing_delivered_is_the_end(watched):
    one = watched()
    done, gone, failed, waits = (one.add(max_tokens=1) for _ in range(4))
    one.scheduler.cancel(gone)
    one.scheduler.fail([failed], RequestError("no", 503))
    one.scheduler.cancel(gone)
    one.finish()
    assert done.deliver[-2].finish_reason == "length"
    assert [sequence.deliver[-1] for sequence in (done, gone, failed, waits)] == [None] * 4
    assert len(gone.deliver) == 1
    assert [type(item) for item in failed.deliver] == [RequestError, type(None)]
    assert (one.statistics.cancelled, one.statistics.failed, one.statistics.finished) == (1, 1, 2)


def test_a_sequence_that_fails_frees_its_slot(watched):
    one = watched()
    first, second = one.add(length=5, max_tokens=9), one.add(length=6, max_tokens=9)
    one.scheduler.step()
    one.scheduler.fail([first], RequestError("no", 500))
    assert len(one.runner.cache) == 1
    one.finish()
    assert said(second) == alone(one.base, prompt(6), 9)


def test_only_errors_are_turned_into_answers(watched, monkeypatch):
    one = watched()
    sequence = one.add()
    monkeypatch.setattr(one.runner, "run", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        one.scheduler.step()
    assert sequence.deliver == []


def test_sequences_of_one_owner_do_not_keep_another_waiting(watched):
    one = watched(max_sequences=4)
    greedy = [one.add(owner="greedy", length=4, max_tokens=40) for _ in range(16)]
    one.scheduler.step()
    other = one.add(owner="other", length=4, max_tokens=5)
    steps = 0
    while other.finish_reason is None:
        one.scheduler.step()
        steps += 1
    assert steps <= 5 and not any(sequence.finish_reason for sequence in greedy)
    one.finish()
    assert said(other) == alone(one.base, prompt(4), 5)


def test_owners_take_turns(watched):
    one = watched(max_sequences=2, reserve=0)
    sequences = [one.add(owner=owner, length=4, max_tokens=2) for owner in ("a", "a", "a", "a", "b", "b")]
    one.scheduler.step()
    assert [sequence.prefilled for sequence in sequences] == [True, False, False, False, True, False]


@pytest.mark.parametrize(
    "wrong",
    [{"max_sequences": 0}, {"max_queue": -1}, {"max_tokens": 0}, {"prefill_tokens": 0}, {"close_seconds": -1.0}],
)
def test_limits_out_of_their_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)
    assert Limits(max_queue=0, close_seconds=0.0).speculation is not None


def test_statistics_are_plain_numbers_with_draft_acceptance():
    counters = EngineStatistics(running=2, completion_tokens=9, passes=6)
    counters.drafts.add(3, [2, 0], [3, 1])
    numbers = counters.numbers()
    assert numbers["running"] == 2
    assert numbers["tokens_per_pass"] == 1.5
    assert (numbers["verified_draft_tokens"], numbers["accepted_draft_tokens"]) == (4, 2)
    assert all(isinstance(value, int | float) for value in numbers.values())
    assert EngineStatistics().numbers()["tokens_per_pass"] == 0
