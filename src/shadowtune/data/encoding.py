"""From rows to token ids and labels.

The ids of a prompt are the same in training and at generation: what a model reads before it answers is always a
prefix of what it was trained on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from shadowtune.core.head import IGNORE_INDEX
from shadowtune.data.prompts import Example, FieldNames, place_of, read_classified, read_example
from shadowtune.data.rendering import render, render_prompt, target_of
from shadowtune.data.sources import number_of
from shadowtune.data.tokens import TokenizedPieces, tokenize, tokenize_pieces
from shadowtune.errors import DataError

Overlong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows."""

    rows: int
    """Rows that are left."""
    dropped: int
    """Rows left out because they are longer than the limit."""
    truncated: int
    """Rows cut to the limit."""
    tokens: int
    labelled_tokens: int
    """Tokens that are learned; in classification, classes."""
    longest: int
    """Tokens of the longest row that is left."""

    def __str__(self) -> str:
        line = (
            f"{self.rows:,} rows, {self.tokens:,} tokens ({self.labelled_tokens:,} learned), longest {self.longest:,}"
        )
        cut = f", {self.truncated:,} cut to the limit" if self.truncated else ""
        return line + cut + (f", {self.dropped:,} dropped as too long" if self.dropped else "")


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for generation, and the true answer."""

    input_ids: list[int]
    target: str


def encode_rows(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    fields: FieldNames,
    max_length: int,
    overlong: Overlong = "truncate",
    completion_only: bool = True,
    chat_template: bool = True,
) -> tuple[list[dict[str, Any]], EncodingReport]:
    """Encode rows for causal language modelling.

    Args:
        rows: as ``load_rows`` gives them; any mappings do.
        tokenizer: of the model.
        fields: where the rows keep their parts.
        max_length: tokens a row may have.
        overlong: what happens to longer rows. "truncate" cuts the start of the prompt (a begin token stays), never
            the last answer, and the end of plain text.
        completion_only: whether only answers are learned; plain text is learned whole.
        chat_template: whether prompts go through the tokenizer's chat template, if it has one.

    Returns:
        For each row that is left "input_ids", "labels" of the same length (-100 where nothing is learned; answers
        include the token that ends them) and "row", its line or number from 1; and the counts.

    Raises:
        DataError: naming the row, if it cannot be read, is too long, or its answer alone is; or if all were dropped.
    """
    places = [place_of(row, index) for index, row in enumerate(rows)]
    examples = [read_example(row, fields, place) for row, place in zip(rows, places, strict=True)]
    fitted: list[dict[str, Any]] = []
    truncated = 0
    for index, tokens in enumerate(_tokenize_examples(examples, places, tokenizer, chat_template)):
        if len(tokens.ids) > max_length:
            if overlong == "drop":
                continue
            if overlong == "error":
                raise DataError(_too_long(places[index], len(tokens.ids), max_length))
            _truncate(tokens, max_length, tokenizer, places[index])
            truncated += 1
        labels = tokens.labels if completion_only else tokens.ids
        fitted.append({"input_ids": tokens.ids, "labels": list(labels), "row": number_of(rows[index], index)})
    learned = sum(len(row["labels"][1:]) - row["labels"][1:].count(IGNORE_INDEX) for row in fitted)
    return fitted, _report(fitted, len(rows), truncated, learned, max_length)


def encode_classification(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    fields: FieldNames,
    max_length: int,
    overlong: Overlong = "truncate",
) -> tuple[list[dict[str, Any]], EncodingReport]:
    """Encode rows for sequence classification.

    Returns:
        For each row that is left "input_ids", "labels" (its class, a whole number from 0) and "row", its line or
        number from 1; and the counts. "truncate" cuts the end of the text.

    Raises:
        DataError: naming the row, if it cannot be read, has no text or is too long; or if all were dropped.
    """
    places = [place_of(row, index) for index, row in enumerate(rows)]
    read = [read_classified(row, fields, place) for row, place in zip(rows, places, strict=True)]
    fitted: list[dict[str, Any]] = []
    truncated = 0
    for index, ids in enumerate(tokenize(tokenizer, [text for text, _ in read], add_special_tokens=True)):
        text, label = read[index]
        if not ids:
            raise DataError(f"{places[index]}: the text is empty")
        if len(ids) > max_length:
            if overlong == "drop":
                continue
            if overlong == "error":
                raise DataError(_too_long(places[index], len(ids), max_length))
            ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            truncated += 1
        fitted.append({"input_ids": ids, "labels": label, "row": number_of(rows[index], index)})
    return fitted, _report(fitted, len(rows), truncated, len(fitted), max_length)


def encode_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    fields: FieldNames,
    max_length: int,
    chat_template: bool = True,
) -> list[EncodedPrompt]:
    """Encode the prompts of rows, for generation: the same ids that stand before the last answer in ``encode_rows``.

    Raises:
        DataError: as ``encode_rows``; and for rows of plain text, which have no answer.
    """
    places = [place_of(row, index) for index, row in enumerate(rows)]
    examples = [read_example(row, fields, place) for row, place in zip(rows, places, strict=True)]
    targets = [target_of(example, place) for example, place in zip(examples, places, strict=True)]
    prompts = []
    for index, tokens in enumerate(_tokenize_examples(examples, places, tokenizer, chat_template)):
        if len(tokens.ids) > max_length:
            _truncate(tokens, max_length, tokenizer, places[index])
        prompts.append(EncodedPrompt(tokens.ids[: tokens.prompt_length], targets[index]))
    return prompts


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, chat_template: bool = True) -> list[int]:
    """Return the token ids that a model trained on ``prompt`` and its completion read before the completion.

    Raises:
        DataError: if the prompt is not text that can be encoded, or the chat template refuses it.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError("the prompt is not UTF-8 text") from None
    return next(tokenize_pieces(tokenizer, [[render_prompt(prompt, tokenizer, chat_template)]])).ids


def _tokenize_examples(
    examples: Sequence[Example], places: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> Iterator[TokenizedPieces]:
    """Yield each example's ids; raises DataError if an answer would follow nothing."""
    rendered = [
        render(example, tokenizer, chat_template, place) for example, place in zip(examples, places, strict=True)
    ]
    for pieces, place, tokens in zip(rendered, places, tokenize_pieces(tokenizer, rendered), strict=True):
        if tokens.prompt_length == 0 and len(pieces) > 1:
            raise DataError(f"{place}: the prompt is empty, so there is nothing to answer")
        yield tokens


def _truncate(tokens: TokenizedPieces, max_length: int, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    try:
        tokens.truncate(max_length, tokenizer.bos_token_id)
    except DataError as error:
        raise DataError(f"{place}: {error} tokens; raise data.max_length") from None


def _too_long(place: str, length: int, max_length: int) -> str:
    return f"{place}: {length} tokens, of which data.max_length allows {max_length}; raise it, or set data.overlong"


def _report(
    fitted: Sequence[Mapping[str, Any]], rows: int, truncated: int, learned: int, max_length: int
) -> EncodingReport:
    """Count; raises DataError if there were rows and none is left."""
    if rows and not fitted:
        raise DataError(f"all {rows} rows are longer than {max_length} tokens and were dropped; raise data.max_length")
    lengths = [len(row["input_ids"]) for row in fitted]
    return EncodingReport(len(fitted), rows - len(fitted), truncated, sum(lengths), learned, max(lengths, default=0))
