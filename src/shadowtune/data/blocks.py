"""Plain texts joined and cut into blocks of equal length: the rows of pretraining, none of which needs padding."""

import bisect
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.data.prompts import FieldNames, place_of, text_of
from shadowtune.data.sources import number_of
from shadowtune.data.tokens import begin_tokens, tokenize
from shadowtune.errors import DataError


@dataclass(frozen=True)
class BlockReport:
    """What became of the texts."""

    documents: int
    """Texts that are joined."""
    empty: int
    """Texts left out because they are blank."""
    blocks: int
    block_size: int
    """Tokens of each block but the last, which may be shorter."""
    tokens: int
    """In all blocks together."""
    end: int | None = field(default=None, compare=False)
    """The token between two texts."""

    def __str__(self) -> str:
        line = f"{self.documents:,} documents, {self.blocks:,} blocks of {self.block_size:,}, {self.tokens:,} tokens"
        return line + (f", {self.empty:,} blank texts left out" if self.empty else "")


def encode_blocks(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, fields: FieldNames, block_size: int
) -> tuple[list[dict[str, Any]], BlockReport]:
    """Join the rows' texts and cut the whole into blocks.

    Between two texts stands the end-of-sequence token; before each, the begin token if the tokenizer adds one. A block
    may hold the end of one text and the beginning of others, and sees them all. One token left at the end is dropped,
    for nothing predicts it.

    Args:
        rows: as ``load_rows`` gives them; any mappings do.
        tokenizer: of the model.
        fields: where the rows keep their texts.
        block_size: tokens of a block, at least 2.

    Returns:
        For each block "input_ids" and "labels", which are one and the same array of ints, and "row", the line or number
        of the row that its first token comes from; and the counts.

    Raises:
        DataError: naming the row, if it has no text; or if there are several texts and no token to stand between them,
            or too few tokens for a block.
    """
    places = [place_of(row, index) for index, row in enumerate(rows)]
    texts = {index: _text(row, fields, places[index]) for index, row in enumerate(rows)}
    documents = {index: text for index, text in texts.items() if text.strip()}
    stream, starts = _join(tokenizer, documents.values())
    numbers = [number_of(rows[index], index) for index in documents]
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


def _text(row: Mapping[str, Any], fields: FieldNames, place: str) -> str:
    try:
        return text_of(row, fields.text or "text", place)
    except DataError as error:
        raise DataError(f"{error}; data.block_size joins plain texts, whose field data.text_field names") from None


def _join(tokenizer: PreTrainedTokenizerBase, texts: Collection[str]) -> tuple["array[int]", list[int]]:
    """Return all tokens in one array, and where each text begins in it."""
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
