"""Concatenate plain texts and cut them into blocks of equal length, the examples of pretraining; none needs padding."""

import bisect
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.data.examples import FieldNames, text_field
from shadowtune.data.segments import begin_tokens, tokenize
from shadowtune.data.sources import row_location, row_number
from shadowtune.errors import DataError


@dataclass(frozen=True)
class BlockReport:
    """Counts of concatenated texts and their blocks."""

    documents: int
    """Texts used."""
    empty: int
    """Blank texts omitted."""
    blocks: int
    block_size: int
    """Tokens of each block; the last may be shorter."""
    tokens: int
    """Tokens of all blocks together."""
    end: int | None = field(default=None, compare=False)
    """The token between two texts."""

    def __str__(self) -> str:
        line = f"{self.documents:,} documents, {self.blocks:,} blocks of {self.block_size:,}, {self.tokens:,} tokens"
        return line + (f", {self.empty:,} blank texts left out" if self.empty else "")


def encode_blocks(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, fields: FieldNames, block_size: int
) -> tuple[list[dict[str, Any]], BlockReport]:
    """Concatenate the texts of rows and cut them into blocks.

    The end-of-sequence token separates two texts; the begin token precedes each if the tokenizer adds one. A block may
    hold several texts and attends across them. A single token left at the end is dropped, as nothing predicts it.

    Args:
        rows: as ``load_rows`` returns them, or any mappings.
        tokenizer: of the model.
        fields: where a row holds its text.
        block_size: tokens per block, at least 2.

    Returns:
        For each block "input_ids" and "labels", the same array of ints, and "row", the line or number of the row that
        its first token comes from; and the report.

    Raises:
        DataError: naming the row, if it has no text; or if there are several texts and the tokenizer has no
            end-of-sequence token, or there are too few tokens for a block.
    """
    texts = {index: _text(row, fields, row_location(row, index)) for index, row in enumerate(rows)}
    documents = {index: text for index, text in texts.items() if text.strip()}
    stream, starts = _join(tokenizer, documents.values())
    numbers = [row_number(rows[index], index) for index in documents]
    blocks: list[dict[str, Any]] = []
    for start in range(0, len(stream) - 1, block_size):
        block = stream[start : start + block_size]
        row = numbers[bisect.bisect_right(starts, start) - 1]
        blocks.append({"input_ids": block, "labels": block, "row": row})
    if rows and not blocks:
        raise DataError(f"the texts of all {len(rows)} rows make {len(stream)} tokens, too few for a block")
    tokens = sum(len(block["input_ids"]) for block in blocks)
    counts = (len(documents), len(rows) - len(documents), len(blocks), block_size, tokens)
    return blocks, BlockReport(*counts, tokenizer.eos_token_id if len(documents) > 1 else None)


def _text(row: Mapping[str, Any], fields: FieldNames, where: str) -> str:
    try:
        return text_field(row, fields.text or "text", where)
    except DataError as error:
        raise DataError(f"{error}; data.block_size joins plain texts, whose field data.text_field names") from None


def _join(tokenizer: PreTrainedTokenizerBase, texts: Collection[str]) -> tuple["array[int]", list[int]]:
    """Return all tokens in one array, and the index of each text's first token."""
    begin, end = begin_tokens(tokenizer), tokenizer.eos_token_id
    if end is None and len(texts) > 1:
        raise DataError("the tokenizer has no end-of-sequence token to stand between texts; set its eos_token")
    stream, starts = array("i"), list[int]()
    for ids in tokenize(tokenizer, texts):
        if starts:
            stream.append(end)
        starts.append(len(stream))
        stream.extend([*begin, *ids])
    return stream, starts
