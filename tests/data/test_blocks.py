import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.data.blocks import BlockReport, encode_blocks
from shadowtune.data.collate import CausalCollator, PackedCollator
from shadowtune.data.encoding import check_encoded
from shadowtune.data.examples import FieldNames
from shadowtune.data.sources import Row
from shadowtune.errors import DataError
from tests.support.bases import VOCABULARY
from tests.support.properties import property_test
from tests.support.tokenizers import tiny_tokenizer

TOKENIZERS = [tiny_tokenizer(), tiny_tokenizer(add_bos=True)]
FIELDS = FieldNames()
EOS = TOKENIZERS[0].eos_token_id
texts = st.text(alphabet="the cat\n?T1", max_size=20)


def encode(documents, size, tokenizer=TOKENIZERS[0], fields=FIELDS):
    rows = [{"text": document} if isinstance(document, str) else document for document in documents]
    return encode_blocks(rows, tokenizer, fields, size)


def refuse(documents, message, tokenizer=TOKENIZERS[0], size=4):
    with pytest.raises(DataError, match=message) as caught:
        encode(documents, size, tokenizer)
    assert "\n" not in str(caught.value)


@property_test
@given(documents=st.lists(texts, min_size=1, max_size=6), size=st.integers(2, 12), which=st.integers(0, 1))
def test_blocks_one_behind_the_other_are_the_texts_with_end_tokens_between_them(documents, size, which):
    tokenizer = TOKENIZERS[which]
    kept = [document for document in documents if document.strip()]
    whole = []
    for number, document in enumerate(kept):
        whole += ([EOS] if number else []) + tokenizer(document)["input_ids"]
    if len(whole) < 2:
        refuse(documents, f"the texts of all {len(documents)} rows make {len(whole)} tokens", tokenizer, size)
        return
    blocks, report = encode(documents, size, tokenizer)
    joined = [token for block in blocks for token in block["input_ids"]]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) == (1 if len(whole) % size == 1 else 0), (
        "only a token that nothing predicts is lost"
    )
    assert all(len(block["input_ids"]) == size for block in blocks[:-1])
    assert 2 <= len(blocks[-1]["input_ids"]) <= size
    assert all(block["labels"] == block["input_ids"] for block in blocks)
    assert report == BlockReport(len(kept), len(documents) - len(kept), len(blocks), size, len(joined))


def test_a_block_is_numbered_as_the_row_that_it_begins_in():
    rows = [Row({"text": text}, "rows.jsonl", line) for text, line in (("abcde", 3), (" ", 4), ("f", 7), ("ghijk", 9))]
    blocks, _ = encode(rows, 3)  # abc de. f.g hij k
    assert [block["row"] for block in blocks] == [3, 3, 7, 9]
    assert [block["row"] for block in encode([{"text": "abc"}, {"text": "de"}], 2)[0]] == [1, 1, 2]


def test_the_field_of_the_texts_can_be_named():
    (block,), _ = encode([{"story": "ab", "text": "no"}], 4, fields=FieldNames(text="story"))
    assert TOKENIZERS[0].decode(list(block["input_ids"])) == "ab"


def test_rows_without_text_are_named():
    refuse(
        ["a", Row({"prompt": "b"}, "rows.jsonl", 8)], r"^rows\.jsonl, line 8: no field 'text'; it has 'prompt'; data\."
    )
    refuse(["a", {"text": ["b"]}], r"^row 2: text must be text, got \['b'\]; data\.block_size joins plain texts")


def test_texts_need_a_token_between_them_but_one_text_does_not():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    refuse(["a", "b"], "no end-of-sequence token to stand between texts; set its eos_token", tokenizer)
    assert encode(["abc"], 4, tokenizer)[1].tokens == 3


def test_blank_texts_alone_are_too_few_tokens():
    refuse(["", " \n"], "the texts of all 2 rows make 0 tokens, too few for a block")


def test_no_rows_are_no_error_here():
    assert encode([], 4) == ([], BlockReport(0, 0, 0, 4, 0))


def test_blocks_pass_the_checks_and_become_batches():
    blocks, _ = encode(["abcde"], 3)
    check_encoded(blocks, VOCABULARY, 3)
    batch = CausalCollator(0)(blocks)
    assert batch["labels"].tolist() == [batch["input_ids"][0].tolist(), [*batch["input_ids"][1, :2].tolist(), -100]]
    assert PackedCollator()(blocks)["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_the_report_is_one_line_that_leaves_out_what_did_not_happen():
    assert str(BlockReport(1200, 0, 321, 128, 41023)) == "1,200 documents, 321 blocks of 128, 41,023 tokens"
    assert str(BlockReport(1, 2, 3, 4, 9)) == "1 documents, 3 blocks of 4, 9 tokens, 2 blank texts left out"
