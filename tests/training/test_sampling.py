import pytest
import torch
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from shadowtune.training.trainer import EpochSampler
from tests.support.bases import tiny_base
from tests.support.runs import arguments, causal_rows, trainer_of

LENGTHS = [3 + (7 * number) % 40 for number in range(40)]


KINDS = {
    "random": lambda: RandomSampler(LENGTHS),
    "group_by_length": lambda: LengthGroupedSampler(4, lengths=LENGTHS),
}


def order_of(kind, seed, epoch):
    return list(EpochSampler(KINDS[kind](), seed, lambda: epoch))


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_epoch_alone_decide_the_order(kind):
    first = order_of(kind, seed=5, epoch=0)
    torch.rand(3)
    assert order_of(kind, seed=5, epoch=0) == first
    assert order_of(kind, seed=5, epoch=1) != first
    assert order_of(kind, seed=7, epoch=0) != first
    assert sorted(first) == list(range(40))
    assert len(EpochSampler(KINDS[kind](), 5, lambda: 0)) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_an_order_leaves_the_global_random_numbers_alone(kind):
    before = torch.get_rng_state()
    order_of(kind, seed=5, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_draws_the_order_of_the_epoch_it_is_in(kind, tmp_path):
    trainer = trainer_of(tiny_base(), arguments(tmp_path, train_sampling_strategy=kind), causal_rows(40), "full")
    seen = []
    for trainer.state.epoch in (0, 1.5, 1.0, 0.25):
        order = trainer.get_train_dataloader().batch_sampler.sampler
        seen.append(list(order))
    assert seen[0] == seen[3] != seen[1] == seen[2]


def padding_of(path, **settings):
    rows = causal_rows(200)
    trainer = trainer_of(tiny_base(), arguments(path, per_device_train_batch_size=4, **settings), rows, "full")
    batches = list(trainer.get_train_dataloader())
    assert sorted(int(row) for batch in batches for row in batch["rows"]) == [row["row"] for row in rows]
    return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)


def test_rows_of_similar_length_need_less_padding(tmp_path):
    assert padding_of(tmp_path, train_sampling_strategy="group_by_length") < padding_of(tmp_path) / 3
