import torch
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.data.collate import CausalCollator, ClassificationCollator, PackedCollator, left_pad
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


def test_packed_rows_follow_each_other_and_positions_start_anew_with_each():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "row": 1}, {"input_ids": [4, 6], "labels": [4, 6]}]
    batch = PackedCollator()(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 6]]
    assert set(batch) == {"input_ids", "position_ids", "labels"}  # a mask would end the detection of documents


def taught_rows():
    """Two rows, 3 and 2 tokens long, with a teacher's 2 most likely tokens."""
    return [
        {
            "input_ids": ids,
            "labels": ids,
            "teacher_tokens": torch.tensor(tokens),
            "teacher_log_probabilities": -torch.tensor(tokens) / 10,
        }
        for ids, tokens in (([1, 2, 3], [[7, 8], [9, 7], [0, 0]]), ([4, 6], [[8, 9], [0, 0]]))
    ]


def test_what_a_teacher_predicts_is_padded_like_the_rows():
    batch = CausalCollator(PAD)(taught_rows())
    expected = torch.tensor([[[7, 8], [9, 7], [0, 0]], [[8, 9], [0, 0], [0, 0]]])
    assert torch.equal(batch["teacher_tokens"], expected)
    assert torch.equal(batch["teacher_log_probabilities"], -expected / 10)


def test_what_a_teacher_predicts_is_packed_like_the_rows():
    batch = PackedCollator()(taught_rows())
    expected = torch.tensor([[[7, 8], [9, 7], [0, 0], [8, 9], [0, 0]]])
    assert torch.equal(batch["teacher_tokens"], expected)
    assert torch.equal(batch["teacher_log_probabilities"], -expected / 10)


def test_flash_attention_is_told_where_documents_begin():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 6], "labels": [4, 6]}]
    batch = PackedCollator(with_bounds=True)(rows)
    for side in ("q", "k"):
        assert batch[f"cu_seq_lens_{side}"].tolist() == [0, 3, 5]
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"max_length_{side}"] == 3
    plain = PackedCollator()(rows)
    assert all(torch.equal(plain[name], batch[name]) for name in plain)


@property_test
@given(st.lists(ids, min_size=1, max_size=5))
def test_packing_and_padding_hold_the_same_tokens_and_the_same_labels_that_can_be_predicted(rows):
    encoded = [{"input_ids": row, "labels": [-100, *row[1:]] if row[0] % 2 else row} for row in rows]
    packed, padded = PackedCollator()(encoded), CausalCollator(PAD)(encoded)
    assert packed["input_ids"][0].tolist() == padded["input_ids"][padded["attention_mask"].bool()].tolist()
    for labels in (packed["labels"], padded["labels"]):
        shifted = labels[:, 1:]
        assert shifted[shifted != -100].tolist() == [token for row in rows for token in row[1:]]
    assert (packed["position_ids"] == 0).sum() == len(rows)
    assert all(tensor.dtype == torch.int64 for tensor in packed.values())


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
