"""From rows to token ids and labels.

The ids of a prompt are the same in training and at generation: what a model reads before it answers is always a
prefix of what it was trained on.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from shadowtune.core.head import IGNORE_INDEX
from shadowtune.data.prompts import (
    Completion,
    Conversation,
    Example,
    FieldNames,
    Text,
    place_of,
    read_classified,
    read_example,
    unread_fields,
)
from shadowtune.data.rendering import (
    Piece,
    Renderer,
    common_scaffold,
    has_template,
    move_scaffold,
    render_prompt,
    target_of,
)
from shadowtune.data.sources import number_of
from shadowtune.data.tokens import TokenizedPieces, tokenize, tokenize_pieces
from shadowtune.errors import DataError

Overlong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows."""

    rows: int
    """Rows that are left; a conversation whose turns are learned one by one counts once for each."""
    dropped: int
    """Rows left out because they are longer than the limit."""
    truncated: int
    """Rows cut to the limit."""
    tokens: int
    labelled_tokens: int
    """Tokens that are learned; in classification, classes."""
    longest: int
    """Tokens of the longest row that is left."""
    ends: tuple[int, ...] = field(default=(), compare=False)
    """Tokens that end the learned answers, the most frequent first."""
    inside: frozenset[int] = field(default=frozenset(), compare=False, repr=False)
    """Tokens that occur in learned answers before their end."""
    answer_prefix: str = field(default="", compare=False)
    """What the chat template puts at the start of every answer; it was moved to the end of the prompts."""
    content_mark: str = field(default="", compare=False)
    """What the chat template puts between an answer's thoughts and its content, where answers have thoughts."""
    template_kwargs: dict[str, Any] = field(default_factory=dict, compare=False)
    """What every row gave the chat template beside its messages."""
    answers: bool = field(default=True, compare=False)
    """Whether any row has a prompt and an answer, rather than being plain text."""
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Fields of the rows that nothing reads."""

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
    answer_prefix: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
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
        answer_prefix: what the chat template puts at the start of every answer, which belongs to the prompt; None finds
            it in these rows.
        template_kwargs: what the chat template is given where a row does not say otherwise.

    Returns:
        For each row that is left "input_ids", "labels" of the same length (-100 where nothing is learned; answers
        include the token that ends them) and "row", its line or number from 1; and the counts.

    Raises:
        DataError: naming the row, if it cannot be read, is too long, or its answer alone is; or if all were dropped.
    """
    places = [place_of(row, index) for index, row in enumerate(rows)]
    examples = [
        with_kwargs(read_example(row, fields, place), template_kwargs) for row, place in zip(rows, places, strict=True)
    ]
    rendered, numbers = _render(examples, places, tokenizer, chat_template)
    found_prefix, content_mark = common_scaffold(rendered, tokenizer)
    if answer_prefix is None:
        answer_prefix = found_prefix
    fitted: list[dict[str, Any]] = []
    ends: Counter[int] = Counter()
    inside: set[int] = set()
    truncated = dropped = 0
    tokenized = _tokenize(rendered, [places[number] for number in numbers], tokenizer, answer_prefix)
    for index, tokens in zip(numbers, tokenized, strict=True):
        if len(tokens.ids) > max_length:
            if overlong == "drop":
                dropped += 1
                continue
            if overlong == "error":
                raise DataError(_too_long(places[index], len(tokens.ids), max_length))
            _truncate(tokens, max_length, tokenizer, places[index])
            truncated += 1
        labels = tokens.labels if completion_only else tokens.ids
        fitted.append({"input_ids": tokens.ids, "labels": list(labels), "row": number_of(rows[index], index)})
        ends.update(tokens.ends)
        inside |= tokens.inside
    learned = sum(len(row["labels"][1:]) - row["labels"][1:].count(IGNORE_INDEX) for row in fitted)
    report = _report(fitted, dropped, truncated, learned, max_length)
    return fitted, replace(
        report,
        ends=tuple(token for token, _ in ends.most_common()),
        inside=frozenset(inside),
        answer_prefix=answer_prefix,
        content_mark=content_mark,
        template_kwargs=_common_kwargs(examples),
        answers=not examples or not all(isinstance(example, Text) for example in examples),
        unread=tuple(sorted(_unread(rows, fields))),
    )


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
    truncated = dropped = 0
    for index, ids in enumerate(tokenize(tokenizer, [text for text, _ in read], add_special_tokens=True)):
        text, label = read[index]
        if not ids:
            raise DataError(f"{places[index]}: the text is empty")
        if len(ids) > max_length:
            if overlong == "drop":
                dropped += 1
                continue
            if overlong == "error":
                raise DataError(_too_long(places[index], len(ids), max_length))
            ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            truncated += 1
        fitted.append({"input_ids": ids, "labels": label, "row": number_of(rows[index], index)})
    report = _report(fitted, dropped, truncated, len(fitted), max_length)
    return fitted, replace(report, unread=tuple(sorted(_unread(rows, fields, classify=True))))


def encode_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    fields: FieldNames,
    max_length: int,
    chat_template: bool = True,
    answer_prefix: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[EncodedPrompt]:
    """Encode the prompts of rows, for generation: the same ids that stand before the last answer in ``encode_rows``.

    Args:
        rows: as for ``encode_rows``.
        tokenizer: of the model.
        fields: where the rows keep their parts.
        max_length: tokens of prompt and answer.
        chat_template: whether prompts go through the tokenizer's chat template, if it has one.
        answer_prefix: ``EncodingReport.answer_prefix`` of the training rows.
        template_kwargs: what the chat template is given where a row does not say otherwise.

    Raises:
        DataError: as ``encode_rows``; and for rows of plain text, which have no answer.
    """
    places = [place_of(row, index) for index, row in enumerate(rows)]
    examples = [
        with_kwargs(read_example(row, fields, place), template_kwargs) for row, place in zip(rows, places, strict=True)
    ]
    targets = [target_of(example, place) for example, place in zip(examples, places, strict=True)]
    rendered, numbers = _render(examples, places, tokenizer, chat_template)
    last = dict(zip(numbers, rendered, strict=True))
    prompts = []
    for index, tokens in enumerate(_tokenize(list(last.values()), places, tokenizer, answer_prefix)):
        if len(tokens.ids) > max_length:
            _truncate(tokens, max_length, tokenizer, places[index])
        prompts.append(EncodedPrompt(tokens.ids[: tokens.prompt_length], targets[index]))
    return prompts


def prompt_ids(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool = True,
    answer_prefix: str = "",
    extra: Conversation | None = None,
) -> list[int]:
    """Return the token ids that a model trained on ``prompt`` and its completion read before the completion.

    Args:
        prompt: the text.
        tokenizer: of the model.
        chat_template: whether the prompt goes through the tokenizer's chat template, if it has one.
        answer_prefix: what follows the chat template's prompt: ``EncodingReport.answer_prefix``.
        extra: tools and other arguments of the chat template.

    Raises:
        DataError: if the prompt is not text that can be encoded, or the chat template refuses it.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError("the prompt is not UTF-8 text") from None
    piece = render_prompt(prompt, tokenizer, chat_template, extra)
    prefix = answer_prefix if has_template(tokenizer, chat_template) else ""
    return piece_ids(piece, tokenizer, prefix)


def piece_ids(prompt: Piece, tokenizer: PreTrainedTokenizerBase, answer_prefix: str = "") -> list[int]:
    """Return the token ids of a prompt that is rendered already, with what every answer begins with."""
    prefix = "" if answer_prefix and prompt.text.endswith(answer_prefix) else answer_prefix
    return next(tokenize_pieces(tokenizer, [move_scaffold([prompt], prefix)])).ids


def with_kwargs(example: Example, template_kwargs: Mapping[str, Any] | None) -> Example:
    """Give an example arguments of the chat template where it does not have its own."""
    if not template_kwargs or not isinstance(example, Conversation | Completion):
        return example
    return replace(example, template_kwargs={**template_kwargs, **example.template_kwargs})


def _render(
    examples: Sequence[Example], places: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> tuple[list[list[Piece]], list[int]]:
    """Return the sequences of all examples, and the number of the example that each belongs to."""
    renderer = Renderer(tokenizer, chat_template)
    rendered: list[list[Piece]] = []
    numbers: list[int] = []
    for number, (example, place) in enumerate(zip(examples, places, strict=True)):
        sequences = renderer.sequences(example, place)
        rendered += sequences
        numbers += [number] * len(sequences)
    return rendered, numbers


def _tokenize(
    rendered: Sequence[Sequence[Piece]], places: Sequence[str], tokenizer: PreTrainedTokenizerBase, answer_prefix: str
) -> Iterator[TokenizedPieces]:
    """Yield each sequence's ids; raises DataError if an answer would follow nothing."""
    moved = [move_scaffold(pieces, answer_prefix) for pieces in rendered]
    for pieces, place, tokens in zip(moved, places, tokenize_pieces(tokenizer, moved), strict=True):
        if tokens.prompt_length == 0 and len(pieces) > 1:
            raise DataError(f"{place}: the prompt is empty, so there is nothing to answer")
        yield tokens


def _common_kwargs(examples: Sequence[Example]) -> dict[str, Any]:
    """Return the arguments of the chat template that every example gives."""
    given = [example.template_kwargs for example in examples if isinstance(example, Conversation | Completion)]
    if not given or len(given) < len(examples):
        return {}
    return {
        name: value for name, value in given[0].items() if all(name in each and each[name] == value for each in given)
    }


def _unread(rows: Sequence[Mapping[str, Any]], fields: FieldNames, classify: bool = False) -> set[str]:
    """Return the names of all fields of rows that nothing reads."""
    return set().union(*(unread_fields(row, fields, classify) for row in rows))


def _truncate(tokens: TokenizedPieces, max_length: int, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    try:
        tokens.truncate(max_length, tokenizer.bos_token_id)
    except DataError as error:
        raise DataError(f"{place}: {error} tokens; raise data.max_length") from None


def _too_long(place: str, length: int, max_length: int) -> str:
    return f"{place}: {length} tokens, of which data.max_length allows {max_length}; raise it, or set data.overlong"


def _report(
    fitted: Sequence[Mapping[str, Any]], dropped: int, truncated: int, learned: int, max_length: int
) -> EncodingReport:
    """Count; raises DataError if there were rows and none is left."""
    if dropped and not fitted:
        raise DataError(
            f"all {dropped} rows are longer than {max_length} tokens and were dropped; raise data.max_length"
        )
    lengths = [len(row["input_ids"]) for row in fitted]
    return EncodingReport(len(fitted), dropped, truncated, sum(lengths), learned, max(lengths, default=0))
