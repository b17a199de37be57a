import torch
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.data.collate import CausalCollator, ClassificationCollator, left_pad
from tests.support.properties import property_test

PAD = 5
ids = st.lists(st.integers(0, 9), min_size=1, max_size=8)
"""Token ids, among them the padding token's: an attention mask made of ids would fail."""


def test_rows_are_padded_on_the_right():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "row": 1}, {"input_ids": [4], "labels": [4], "row": 2}]
    batch = CausalCollator(PAD)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_classes_are_one_number_a_row():
    batch = ClassificationCollator(PAD)([{"input_ids": [1, 2], "labels": 3, "row": 1}, {"input_ids": [4], "labels": 0}])
    assert batch["input_ids"].tolist() == [[1, 2], [4, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [3, 0]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_prompts_are_padded_on_the_left():
    batch = left_pad([[1, 2, 3], [4]], PAD)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@property_test
@given(st.lists(ids, min_size=1, max_size=5))
def test_the_mask_selects_exactly_the_rows_own_tokens_on_either_side(rows):
    encoded = [{"input_ids": row, "labels": list(reversed(row))} for row in rows]
    causal, prompts = CausalCollator(PAD)(encoded), left_pad(rows, PAD)
    for index, row in enumerate(rows):
        for batch in (causal, prompts):
            assert batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist() == row
        own = causal["attention_mask"][index].bool()
        assert causal["labels"][index][own].tolist() == row[::-1]
        assert (causal["labels"][index][~own] == -100).all()
        assert (causal["input_ids"][index][~own] == PAD).all()
        assert prompts["input_ids"][index][-1] == row[-1]
    assert all(tensor.dtype == torch.int64 for batch in (causal, prompts) for tensor in batch.values())
