"""Passes that sequences of several adapters share."""

import pytest
import torch

from shadowtune.core.multi_adapter import AdapterStack
from shadowtune.serving.engine import model_runner
from shadowtune.serving.engine.model_runner import KEPT_STACKS, ModelRunner
from tests.serving.engine.support import adapter, ask_all, engine, request, with_engine
from tests.support.bases import tiny_base


@pytest.fixture
def made(monkeypatch):
    """Counts the stacks that are put together."""
    counts = []

    def make(members):
        counts.append(len(members))
        return AdapterStack(members)

    monkeypatch.setattr(model_runner, "AdapterStack", make)
    return counts


def test_stacks_are_made_once_for_each_set_of_shadows_and_not_for_one_alone(made):
    base = tiny_base()
    models = {name: adapter(base, seed) for seed, name in enumerate("abc")}

    async def work(served):
        await ask_all(served, [request("a", 5), request("a", 6)])
        assert made == []
        for _ in range(2):
            await ask_all(served, [request("a", 5), request("b", 5)])
        assert made == [2]
        await ask_all(served, [request("c", 5), request("b", 5), request("a", 5)])
        assert made == [2, 3]
        await served.unload("a")
        await ask_all(served, [request("b", 5), request("c", 5)])
        return list(made)

    assert with_engine(engine(models), work) == [2, 3, 2]


def test_few_sets_are_kept(made):
    base = tiny_base()
    models = {f"m{seed}": adapter(base, seed) for seed in range(KEPT_STACKS + 2)}

    async def work(served):
        for name in models:
            if name != "m0":
                await ask_all(served, [request("m0", 5, max_tokens=3), request(name, 5, max_tokens=3)])
        return len(served._runner._stacks)

    assert with_engine(engine(models), work) == KEPT_STACKS


def test_the_head_is_the_models_own_with_what_it_does_behind():
    model = adapter(tiny_base("granite"))
    states = torch.randn(3, 32)
    torch.testing.assert_close(ModelRunner(model.base).head(states), model.logits_of(states))
