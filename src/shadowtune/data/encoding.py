"""Encode rows as token ids and labels, and check what was encoded.

The token ids of a prompt are the same in training and generation: what a model reads before it answers is always a
prefix of a training sequence.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.data.examples import (
    Completion,
    Conversation,
    Example,
    FieldNames,
    PlainText,
)
from shadowtune.data.formats import describe_formats, read_example, read_labelled, unread_fields
from shadowtune.data.labels import Labels, class_names, label_values
from shadowtune.data.segments import (
    Renderer,
    Segment,
    TokenizedSegments,
    has_template,
    move_prefix_to_prompt,
    render_prompt,
    shared_answer_prefix,
    target_text,
    tokenize,
    tokenize_segments,
)
from shadowtune.data.sources import row_location, row_number
from shadowtune.errors import DataError

Overlong = Literal["error", "truncate", "drop"]
NAMED = 5
"""Number of examples that an error names."""


@dataclass(frozen=True)
class EncodingReport:
    """Counts of encoded examples, and what was read off them for ``PromptFormat``."""

    examples: int
    """Encoded examples; a conversation whose turns are separate sequences counts once for each."""
    dropped: int
    """Examples omitted because they exceed the limit."""
    truncated: int
    """Examples cut to the limit."""
    tokens: int
    labelled_tokens: int
    """Tokens with a label; in classification, classes."""
    longest: int
    """Tokens of the longest encoded example."""
    ends: tuple[int, ...] = field(default=(), compare=False)
    """Tokens that end target answers, the most frequent first."""
    inside: frozenset[int] = field(default=frozenset(), compare=False, repr=False)
    """Tokens that occur in target answers before their end."""
    answer_prefix: str = field(default="", compare=False)
    """Text that the chat template puts at the start of every answer; it was moved to the end of the prompts."""
    content_mark: str = field(default="", compare=False)
    """Text that the chat template puts between the reasoning and the content of an answer, if answers have both."""
    template_kwargs: dict[str, Any] = field(default_factory=dict, compare=False)
    """Arguments of the chat template that are the same in every row."""
    answers: bool = field(default=True, compare=False)
    """Whether any row has a prompt and an answer, rather than plain text."""
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Fields of the rows that nothing reads."""
    formats: str = field(default="", compare=False)
    """The formats that the rows were read as, with the number of rows in each."""
    labels: Labels | None = field(default=None, compare=False)
    """Of classification: how labels became numbers."""

    def __str__(self) -> str:
        line = (
            f"{self.examples:,} examples, {self.tokens:,} tokens ({self.labelled_tokens:,} labelled), "
            f"longest {self.longest:,}"
        )
        cut = f", {self.truncated:,} cut to the limit" if self.truncated else ""
        return line + cut + (f", {self.dropped:,} dropped as too long" if self.dropped else "")


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt for generation, and the reference answer."""

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
) -> tuple[list[dict[str, Any]], EncodingReport]:
    """Encode rows for causal language modelling.

    Args:
        rows: as ``load_rows`` returns them, or any mappings.
        tokenizer: of the model.
        fields: where a row holds the parts of an example.
        max_length: limit of tokens per example.
        overlong: what happens beyond it. "truncate" cuts the start of the prompt (keeping a begin token), never the
            last answer; of plain text, the end.
        completion_only: whether only answers have labels; plain text always has.
        chat_template: whether prompts go through the tokenizer's chat template, if it has one.
        answer_prefix: text at the start of every answer that belongs to the prompt; None reads it off these rows.

    Returns:
        For each example "input_ids", "labels" of the same length (-100 at tokens without a label; answers include the
        token that ends them) and "row", its line or number from 1; and the report.

    Raises:
        DataError: naming the row, if it cannot be read, is too long, or its answer alone is; or if all were dropped.
    """
    locations = [row_location(row, index) for index, row in enumerate(rows)]
    examples = [read_example(row, fields, where) for row, where in zip(rows, locations, strict=True)]
    rendered, row_of = _render(examples, locations, tokenizer, chat_template)
    found_prefix, content_mark = shared_answer_prefix(rendered, tokenizer)
    if answer_prefix is None:
        answer_prefix = found_prefix
    limit = _Limit(max_length, overlong)
    ends: Counter[int] = Counter()
    inside: set[int] = set()
    tokenized = _tokenize(rendered, [locations[index] for index in row_of], tokenizer, answer_prefix)
    for index, tokens in zip(row_of, tokenized, strict=True):
        if len(tokens.ids) > max_length:
            if limit.drops(len(tokens.ids), locations[index]):
                continue
            _truncate(tokens, max_length, tokenizer, locations[index])
        labels = tokens.labels if completion_only else tokens.ids
        limit.kept.append({"input_ids": tokens.ids, "labels": list(labels), "row": row_number(rows[index], index)})
        ends.update(tokens.ends)
        inside |= tokens.inside
    kept = limit.kept
    learned = sum(len(each["labels"][1:]) - each["labels"][1:].count(IGNORE_INDEX) for each in kept)
    return kept, replace(
        limit.report(learned),
        ends=tuple(token for token, _ in ends.most_common()),
        inside=frozenset(inside),
        answer_prefix=answer_prefix,
        content_mark=content_mark,
        template_kwargs=_common_kwargs(examples),
        answers=not examples or not all(isinstance(example, PlainText) for example in examples),
        unread=_unread(rows, fields),
        formats=describe_formats(rows, fields),
    )


def encode_classification(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    fields: FieldNames,
    max_length: int,
    overlong: Overlong = "truncate",
    labels: Labels | None = None,
) -> tuple[list[dict[str, Any]], EncodingReport]:
    """Encode rows for sequence classification; "truncate" cuts the end of the text.

    Args:
        rows: as for ``encode_rows``.
        tokenizer: of the model.
        fields: where a row holds its text and its label.
        max_length: limit of tokens per example.
        overlong: what happens beyond it.
        labels: as learned from the training examples; None learns them from these.

    Returns:
        For each example "input_ids", "labels" (its class, an integer from 0; several as a list of zeros and ones; or a
        number) and "row", its line or number from 1; and the report.

    Raises:
        DataError: naming the row, if it cannot be read, has no text or is too long; or if all were dropped.
    """
    locations = [row_location(row, index) for index, row in enumerate(rows)]
    read = [read_labelled(row, fields, where) for row, where in zip(rows, locations, strict=True)]
    values = label_values(rows, [(label, where) for (_, label), where in zip(read, locations, strict=True)], fields)
    labels = labels or Labels.learned_from(values, class_names(rows, fields), fields.problem_type)
    limit = _Limit(max_length, overlong)
    for index, ids in enumerate(tokenize(tokenizer, [text for text, _ in read], add_special_tokens=True)):
        text, label = read[index][0], labels.encode(*values[index])
        if not ids:
            raise DataError(f"{locations[index]}: the text is empty")
        if len(ids) > max_length:
            if limit.drops(len(ids), locations[index]):
                continue
            ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        limit.kept.append({"input_ids": ids, "labels": label, "row": row_number(rows[index], index)})
    report = limit.report(labelled=len(limit.kept))
    formats, unread = describe_formats(rows, fields, classify=True), _unread(rows, fields, classify=True)
    return limit.kept, replace(report, unread=unread, formats=formats, labels=labels)


def encode_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    fields: FieldNames,
    max_length: int,
    chat_template: bool = True,
    answer_prefix: str = "",
) -> list[EncodedPrompt]:
    """Encode the prompts of rows for generation: the ids before the last answer in ``encode_rows``.

    Args:
        rows: as for ``encode_rows``.
        tokenizer: of the model.
        fields: where a row holds the parts of an example.
        max_length: limit of tokens of prompt and answer together.
        chat_template: whether prompts go through the tokenizer's chat template, if it has one.
        answer_prefix: ``EncodingReport.answer_prefix`` of the training data.

    Raises:
        DataError: as ``encode_rows``; and for plain text, which has no answer.
    """
    locations = [row_location(row, index) for index, row in enumerate(rows)]
    examples = [read_example(row, fields, where) for row, where in zip(rows, locations, strict=True)]
    targets = [target_text(example, where) for example, where in zip(examples, locations, strict=True)]
    rendered, row_of = _render(examples, locations, tokenizer, chat_template)
    last = dict(zip(row_of, rendered, strict=True))
    prompts = []
    for index, tokens in enumerate(_tokenize(list(last.values()), locations, tokenizer, answer_prefix)):
        if len(tokens.ids) > max_length:
            _truncate(tokens, max_length, tokenizer, locations[index])
        prompts.append(EncodedPrompt(tokens.ids[: tokens.prompt_length], targets[index]))
    return prompts


def prompt_ids(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool = True,
    answer_prefix: str = "",
    extra: Conversation | None = None,
) -> list[int]:
    """Return the token ids that a model trained on ``prompt`` and a completion reads before the completion.

    Args:
        prompt: the text.
        tokenizer: of the model.
        chat_template: whether the prompt goes through the tokenizer's chat template, if it has one.
        answer_prefix: ``EncodingReport.answer_prefix`` of the training data.
        extra: tools and other arguments of the chat template.

    Raises:
        DataError: if the prompt cannot be encoded as UTF-8, or the chat template refuses it.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError("the prompt is not UTF-8 text") from None
    segment = render_prompt(prompt, tokenizer, chat_template, extra)
    prefix = answer_prefix if has_template(tokenizer, chat_template) else ""
    return segment_ids(segment, tokenizer, prefix)


def segment_ids(prompt: Segment, tokenizer: PreTrainedTokenizerBase, answer_prefix: str = "") -> list[int]:
    """Return the token ids of a rendered prompt, followed by the answer prefix unless it ends with it."""
    prefix = "" if answer_prefix and prompt.text.endswith(answer_prefix) else answer_prefix
    return next(tokenize_segments(tokenizer, [move_prefix_to_prompt([prompt], prefix)])).ids


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that every token of the tokenizer, padding included, is in the model's vocabulary.

    Raises:
        DataError: with a hint; otherwise it would be an index error inside the model, or on a GPU an assertion that
            ends the process.
    """
    hint = (
        "add rows for the new tokens to the base (base.resize_token_embeddings(len(tokenizer)), save it with the "
        "tokenizer and train beside that) or use the tokenizer that came with the model"
    )
    pad = tokenizer.pad_token_id
    if isinstance(pad, int) and pad >= vocab_size:
        raise DataError(
            f"the pad token {tokenizer.pad_token!r} has id {pad}, but the model's vocabulary ends at {vocab_size - 1}; "
            f"choose a pad token that the model knows, such as the end token {tokenizer.eos_token!r}, or {hint}"
        )
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer has tokens up to id {highest}, but the model's vocabulary ends at {vocab_size - 1}; {hint}"
        )


def check_encoded(examples: Sequence[Mapping[str, Any]], vocab_size: int, max_positions: int | None) -> None:
    """Check that encoded examples fit the model and have labels.

    Args:
        examples: with "input_ids", "labels" and "row", its number for errors.
        vocab_size: of the model.
        max_positions: limit of tokens per example; None if the model has none.

    Raises:
        DataError: naming the first invalid examples, with a hint.
    """
    if not examples:
        raise DataError("there are no rows")
    checks: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "have no labels, so nothing can be learned from them; give each an answer": lambda each: not _has_label(each),
        f"hold tokens beyond the model's vocabulary of {vocab_size}; use the tokenizer that belongs to the model": (
            lambda each: max(each["input_ids"]) >= vocab_size
        ),
        f"are longer than the model's {max_positions} positions; set data.max_length={max_positions} (or block_size)": (
            lambda each: max_positions is not None and len(each["input_ids"]) > max_positions
        ),
    }
    for error, fails in checks.items():
        numbers = [str(each["row"]) for each in examples if fails(each)]
        if numbers:
            named = ", ".join(numbers[:NAMED]) + (", ..." if len(numbers) > NAMED else "")
            raise DataError(f"{len(numbers)} of {len(examples)} rows ({named}) {error}")


def _has_label(example: Mapping[str, Any]) -> bool:
    """Whether an example has a class, several, a number, or a label after its first token, which no token predicts."""
    labels = example["labels"]
    if isinstance(labels, int | float) or isinstance(labels[0], float):
        return True
    return any(label != IGNORE_INDEX for label in labels[1:])


class _Limit:
    """Applies the limit of tokens per example, and counts."""

    def __init__(self, max_length: int, overlong: Overlong) -> None:
        self.max_length, self.overlong = max_length, overlong
        self.kept: list[dict[str, Any]] = []
        self.dropped = self.truncated = 0

    def drops(self, length: int, where: str) -> bool:
        """Whether an example that is too long is dropped; otherwise the caller truncates it."""
        if self.overlong == "error":
            raise DataError(
                f"{where}: {length} tokens, of which data.max_length allows {self.max_length}; raise it, or set "
                "data.overlong"
            )
        self.dropped += self.overlong == "drop"
        self.truncated += self.overlong == "truncate"
        return self.overlong == "drop"

    def report(self, labelled: int) -> EncodingReport:
        if self.dropped and not self.kept:
            raise DataError(
                f"all {self.dropped} rows are longer than {self.max_length} tokens and were dropped; raise "
                "data.max_length"
            )
        lengths = [len(each["input_ids"]) for each in self.kept]
        counts = (len(self.kept), self.dropped, self.truncated, sum(lengths), labelled, max(lengths, default=0))
        return EncodingReport(*counts)


def _render(
    examples: Sequence[Example], locations: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> tuple[list[list[Segment]], list[int]]:
    """Return the sequences of all examples, and for each the index of its row."""
    renderer = Renderer(tokenizer, chat_template)
    rendered: list[list[Segment]] = []
    row_of: list[int] = []
    for index, (example, where) in enumerate(zip(examples, locations, strict=True)):
        sequences = renderer.sequences(example, where)
        rendered += sequences
        row_of += [index] * len(sequences)
    return rendered, row_of


def _tokenize(
    rendered: Sequence[Sequence[Segment]],
    locations: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    answer_prefix: str,
) -> Iterator[TokenizedSegments]:
    """Yield the token ids of each sequence; raises DataError if an answer has an empty prompt."""
    moved = [move_prefix_to_prompt(segments, answer_prefix) for segments in rendered]
    for segments, where, tokens in zip(moved, locations, tokenize_segments(tokenizer, moved), strict=True):
        if tokens.prompt_length == 0 and len(segments) > 1:
            raise DataError(f"{where}: the prompt is empty, so there is nothing to answer")
        yield tokens


def _common_kwargs(examples: Sequence[Example]) -> dict[str, Any]:
    """Return the arguments of the chat template that are the same in every example."""
    given = [example.template_kwargs for example in examples if isinstance(example, Conversation | Completion)]
    if not given or len(given) < len(examples):
        return {}
    return {
        name: value for name, value in given[0].items() if all(name in each and each[name] == value for each in given)
    }


def _unread(rows: Sequence[Mapping[str, Any]], fields: FieldNames, classify: bool = False) -> tuple[str, ...]:
    kinds = {tuple(row): row for row in rows}  # of 100,000 rows most have the same fields
    return tuple(sorted(set().union(*(unread_fields(row, fields, classify) for row in kinds.values()))))


def _truncate(tokens: TokenizedSegments, max_length: int, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    try:
        tokens.truncate(max_length, tokenizer.bos_token_id)
    except DataError as error:
        raise DataError(f"{where}: {error} tokens; raise data.max_length") from None
