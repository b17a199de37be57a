"""Who is in the next pass, step by step, without threads."""

import pytest

from shadowtune.serving.engine.counters import Counters
from shadowtune.serving.engine.intake import Intake
from shadowtune.serving.engine.limits import Limits
from shadowtune.serving.engine.networks import Networks
from shadowtune.serving.engine.scheduler import Scheduler
from shadowtune.serving.requests import RequestError
from tests.serving.engine.support import Collected, alone, prompt, request
from tests.support.bases import tiny_base
from tests.support.tokenizers import tiny_tokenizer


class Watched:
    """A scheduler over the bare base, and a record of the passes: tokens of each row."""

    def __init__(self, monkeypatch, **limits):
        self.base, limits = tiny_base(), Limits(**limits)
        self.networks, self.counters, self.passes = Networks(self.base), Counters(), []
        self.scheduler = Scheduler(self.networks, limits, self.counters)
        self.intake = Intake(self.base, tiny_tokenizer(), limits)
        run = self.networks.run

        def watch(rows, tokens, known=()):
            self.passes.append([len(line) for line in tokens])
            return run(rows, tokens, known)

        monkeypatch.setattr(self.networks, "run", watch)

    def add(self, **settings):
        row = self.intake.row(request("base", **settings), None, Collected())
        self.scheduler.add(row)
        return row

    def finish(self):
        while self.scheduler.busy:
            self.scheduler.step()


def said(row):
    return [token.id for piece in row.deliver[:-1] for token in piece.tokens]


@pytest.fixture
def watched(monkeypatch):
    return lambda **limits: Watched(monkeypatch, **limits)


def test_a_long_prompt_is_read_in_chunks_between_which_others_speak(watched):
    one = watched(prefill_tokens=8)
    short, long = one.add(length=4, max_tokens=6), one.add(length=30, max_tokens=2)
    for _ in range(5):
        one.scheduler.step()
    assert one.passes == [[4], [1], [8], [1], [8], [1], [8], [1], [6], [1, 1]]
    one.finish()
    assert said(short) == alone(one.base, prompt(4), 6)
    assert said(long) == alone(one.base, prompt(30), 2)


def test_prompts_of_similar_length_are_read_together(watched):
    one = watched(prefill_tokens=40)
    for length in (9, 3, 10, 16, 8, 17):
        one.add(length=length, max_tokens=2)
    one.finish()
    assert [lengths for lengths in one.passes if max(lengths) > 1] == [[9, 10, 8], [3], [16, 17]]


def test_rows_are_admitted_in_their_order_as_others_leave(watched):
    one = watched(max_rows=2)
    rows = [one.add(length=5, max_tokens=new) for new in (2, 4, 3)]
    one.scheduler.step()
    assert (one.counters.running, one.counters.waiting) == (1, 1)  # the first has ended already
    one.finish()
    assert [said(row) for row in rows] == [alone(one.base, prompt(5), new) for new in (2, 4, 3)]
    assert len(one.networks.slots) == 0
    assert max(len(lengths) for lengths in one.passes) == 2


def test_the_last_thing_delivered_is_the_end(watched):
    one = watched()
    done, gone, failed, waits = (one.add(max_tokens=1) for _ in range(4))
    one.scheduler.cancel(gone)
    one.scheduler.fail([failed], RequestError("no", 503))
    one.scheduler.cancel(gone)
    one.finish()
    assert done.deliver[-2].finish_reason == "length"
    assert [row.deliver[-1] for row in (done, gone, failed, waits)] == [None] * 4
    assert len(gone.deliver) == 1
    assert [type(item) for item in failed.deliver] == [RequestError, type(None)]
    assert (one.counters.cancelled, one.counters.failed, one.counters.finished) == (1, 1, 2)


def test_a_row_that_fails_while_others_run_frees_its_slot(watched):
    one = watched()
    first, second = one.add(length=5, max_tokens=9), one.add(length=6, max_tokens=9)
    one.scheduler.step()
    one.scheduler.fail([first], RequestError("no", 500))
    assert len(one.networks.slots) == 1
    one.finish()
    assert said(second) == alone(one.base, prompt(6), 9)


def test_only_errors_are_turned_into_answers(watched, monkeypatch):
    one = watched()
    row = one.add()
    monkeypatch.setattr(one.networks, "run", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        one.scheduler.step()
    assert row.deliver == []


def test_one_owners_rows_do_not_keep_another_owner_waiting(watched):
    one = watched(max_rows=4)
    greedy = [one.add(owner="greedy", length=4, max_tokens=40) for _ in range(16)]
    one.scheduler.step()
    other = one.add(owner="other", length=4, max_tokens=5)
    steps = 0
    while other.finish_reason is None:
        one.scheduler.step()
        steps += 1
    assert steps <= 5 and not any(row.finish_reason for row in greedy)
    one.finish()
    assert said(other) == alone(one.base, prompt(4), 5)


def test_owners_take_turns(watched):
    one = watched(max_rows=2, reserve=0)
    rows = [one.add(owner=owner, length=4, max_tokens=2) for owner in ("a", "a", "a", "a", "b", "b")]
    one.scheduler.step()
    assert [row.begun for row in rows] == [True, False, False, False, True, False]
