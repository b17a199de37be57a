from shadowtune.serving.engine.counters import Counters


def test_numbers_are_plain_and_say_what_came_of_drafts():
    counters = Counters(running=2, completion_tokens=9, passes=6)
    counters.drafts.add(3, [2, 0], [3, 1])
    numbers = counters.numbers()
    assert numbers["running"] == 2
    assert numbers["tokens_per_pass"] == 1.5
    assert (numbers["judged_draft_tokens"], numbers["accepted_draft_tokens"]) == (4, 2)
    assert all(isinstance(value, int | float) for value in numbers.values())
    assert Counters().numbers()["tokens_per_pass"] == 0
