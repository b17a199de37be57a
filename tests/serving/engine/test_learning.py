"""Draft heads that learn while the engine is idle: no answer changes, and nothing that goes wrong stops them."""

import asyncio
import errno
import logging
import time

import pytest
import torch

from shadowtune.config.shadow import SpeculationConfig
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError
from shadowtune.serving.engine import learning
from shadowtune.serving.engine.engine import Engine
from shadowtune.serving.engine.learning import DraftHeadLearner, agreement
from shadowtune.serving.engine.reservoir import Record, Reservoir, save_records
from shadowtune.serving.engine.scheduler import Limits
from tests.serving.engine.support import adapter, alone, answers, ask_all, prompt, request, with_engine
from tests.support.bases import tiny_base
from tests.support.shadows import tokens
from tests.support.tokenizers import tiny_tokenizer


def model(layers=(1, -1)):
    return adapter(tiny_base(), draft_rank=8, draft_layers=layers, shadow_loss_weight=0.0)


def learner(directory, of=None):
    return DraftHeadLearner("a", model() if of is None else of, directory, lambda: None)


def record(length=20, seed=0, width=32, features=3 * 32):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(length, features, generator=generator), torch.randn(length, width, generator=generator)
    return Record(*(part.bfloat16() for part in parts), tokens(1, length, seed)[0])


@torch.no_grad()
def answered(of, count, new=30):
    """Records of the model's own answers: features, s0 and ids."""
    for seed in range(count):
        ids = torch.tensor([prompt(6, seed) + alone(of, prompt(6, seed), new)])
        yield of(ids).draft_features[0, 6:], of.encode(ids, run_shadow=True)[1].initial[0, 6:], ids[0, 6:].tolist()


def work(one, most=500):
    for _ in range(most):
        if not one.step():
            return
    raise AssertionError("it does not come to an end")


def served(models, directory, **limits):
    loaded = {name: (each, PromptFormat()) for name, each in models.items()}
    base = next(iter(models.values())).base
    return Engine(base, tiny_tokenizer(), loaded, Limits(**limits), learn=directory)


def test_a_reservoir_is_bounded_and_is_read_as_it_was_written(tmp_path):
    one, size = Reservoir(20 * record().size), record().size
    for seed in range(100):
        one.add(record(seed=seed, length=20 if seed % 3 else 15))
    assert one.bytes <= 20 * size and one.seen == 100
    assert len(one.training) > 10 and len(one.held_out) >= 2
    save_records(one.tensors(), tmp_path, {})
    other = Reservoir(20 * size)
    other.load(tmp_path, 96, 32)
    assert other.seen == 100
    for ours, theirs in zip(one.training + one.held_out, other.training + other.held_out, strict=True):
        assert all(torch.equal(*parts) for parts in zip(ours, theirs, strict=True))
    with pytest.raises(CheckpointError, match="of another model"):
        Reservoir(20 * size).load(tmp_path, 64, 32)


def test_a_head_that_agrees_more_is_adopted_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "ROUND_STEPS", 60)
    monkeypatch.setattr(learning, "LEARNING_RATE", 1e-2)
    of = model()
    one = learner(tmp_path / "a", of)
    for each in answered(of, 15):
        one.add(*each)
    before = {name: part.clone() for name, part in of.shadow.draft_head.state_dict().items()}

    def agreeing():
        return sum(agreement(of.shadow.draft_head, each, 3, one._targets)[0] for each in one.reservoir.held_out)

    agreed = agreeing()
    others = {name: part.clone() for name, part in of.named_parameters() if "draft_head" not in name}
    work(one)
    assert agreeing() > agreed
    assert not torch.equal(of.shadow.draft_head.up.weight, before["up.weight"])
    assert all(torch.equal(part, others[name]) for name, part in of.named_parameters() if name in others)
    one.close()
    again = model()
    two = learner(tmp_path / "a", again)
    assert torch.equal(again.shadow.draft_head.up.weight, of.shadow.draft_head.up.weight)
    assert two.reservoir.seen == 15 and len(two.reservoir.training) == len(one.reservoir.training)


def test_a_copy_that_is_not_better_yet_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(learning._Round, "judge", lambda *_: False)  # neither agrees with any token
    one = learner(tmp_path / "a")

    def after(steps):
        monkeypatch.setattr(learning, "ROUND_STEPS", steps)
        for seed in range(10):
            features, states, ids = record(seed=seed)
            one.add(features, states, ids.tolist())
        work(one)
        return one._candidate.up.weight

    trained = after(3)
    assert not torch.equal(trained, one._head.up.weight)
    assert torch.equal(after(0), trained)


def test_it_goes_back_when_fewer_drafts_are_accepted(tmp_path, caplog):
    of = model()
    one = learner(tmp_path / "a", of)
    weights = {name: part.clone() for name, part in of.shadow.draft_head.state_dict().items()}
    for accepted, goes_back in ((250, False), (240, False), (150, True)):
        one._previous, one._before, one._counts = weights, [250, 500], [0, 0]
        with torch.no_grad():
            of.shadow.draft_head.up.weight.add_(1.0)
        one.observe(accepted, 500)
        assert torch.equal(of.shadow.draft_head.up.weight, weights["up.weight"]) == goes_back
    assert "it goes back" in caplog.text and one._previous is None


def test_an_engine_learns_while_it_is_idle_and_its_answers_stay_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "ROUND_STEPS", 5)
    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)
    of = model()
    requests = [request("a", 5 + index, max_tokens=20) for index in range(12)]
    expected = [alone(of, each.prompt, 20) for each in requests]
    one = served({"a": of}, tmp_path, speculation=SpeculationConfig(length=2, drafter="draft_head"))

    async def twice(engine):
        first = await ask_all(engine, requests)
        idle = engine._adapters["a"].learner
        until = time.monotonic() + 60
        while (idle._trained == 0 or idle._round is not None) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return first, await ask_all(engine, requests), idle

    first, second, idle = with_engine(one, twice)
    assert first == second == expected
    assert idle._trained > 0 and idle.enabled
    own = idle.reservoir.training[0]
    with torch.no_grad():
        said, count = own.tokens[1:].tolist(), len(own.tokens) - 1
        index = next(index for index, answer in enumerate(expected) if said == answer[:count])
        ids = torch.tensor([[*requests[index].prompt, *expected[index]]])
        start = len(requests[index].prompt) - 1
        true = of(ids).draft_features[0, start : start + len(own.tokens)]
    torch.testing.assert_close(own.features.float(), true, rtol=0.02, atol=0.05)
    assert (tmp_path / "a" / "records" / "model.safetensors").exists()


def test_two_servers_never_share_a_directory(tmp_path, caplog):
    first = learner(tmp_path / "a")
    with pytest.raises(CheckpointError, match="another server learns in"):
        learner(tmp_path / "a")
    of = model()
    requests = [request("a", 5)]
    assert answers(served({"a": of}, tmp_path), requests) == [alone(of, prompt(5))]
    assert [each.levelno for each in caplog.records if "answers without learning" in each.message] == [logging.WARNING]
    first.close()
    learner(tmp_path / "a").close()


def test_a_directory_that_cannot_be_written_or_a_full_disk_stops_the_learning_alone(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    of = model()
    assert answers(served({"a": of}, tmp_path / "file"), [request("a", 5)]) == [alone(of, prompt(5))]
    assert "answers without learning: cannot write to" in caplog.text

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    one = learner(tmp_path / "a", of)
    one.add(torch.randn(20, 96), torch.randn(20, 32), list(range(3, 23)))
    monkeypatch.setattr("shadowtune.serving.engine.reservoir.write_tensors", full)
    one.close()
    assert not one.enabled and "goes on without learning: cannot write to" in caplog.text
    assert not one.step()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head: (head / "model.safetensors").write_bytes(b"x"), "is damaged"),
        (lambda head: (head / "config.json").write_text("{"), "drafts with its own head"),
        (lambda head: (head / "config.json").write_text("{}"), "is of another base, adapter or vocabulary"),
    ],
    ids=["tensors", "config", "another"],
)
def test_a_saved_head_that_does_not_fit_is_left_out(change, said, tmp_path, caplog):
    of = model()
    one = learner(tmp_path / "a", of)
    own = of.shadow.draft_head.up.weight.clone()
    with torch.no_grad():
        of.shadow.draft_head.up.weight.add_(1)
    one._save_head()
    one.close()
    change(tmp_path / "a" / "head")
    again = model()
    learner(tmp_path / "a", again).close()
    assert torch.equal(again.shadow.draft_head.up.weight, own)
    assert said in caplog.text


def test_records_of_another_adapter_are_left_out(tmp_path, caplog):
    """They have the same widths, but its states and maybe its tokens mean nothing here."""
    one = learner(tmp_path / "a")
    one.add(torch.randn(20, 96), torch.randn(20, 32), list(range(3, 23)))
    one.close()
    again = learner(tmp_path / "a")
    assert again.reservoir.seen == 1
    again.close()
    other = model()
    with torch.no_grad():
        next(other.shadow.boundaries.parameters()).add_(1)
    one = learner(tmp_path / "a", other)
    assert one.reservoir.seen == 0
    assert "begins without records" in caplog.text and "is of another base, adapter or vocabulary" in caplog.text
    one.close()


def test_an_adapter_without_a_draft_head_says_so(tmp_path, caplog):
    of = adapter(tiny_base())
    assert answers(served({"a": of}, tmp_path), [request("a", 5)]) == [alone(of, prompt(5))]
    assert "does not learn: it has no draft head" in caplog.text
