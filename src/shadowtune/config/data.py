"""Settings of data: the examples of a training run (``DataConfig``), a task (``TaskConfig``), prompt templates."""

import re
import string
from collections.abc import Iterator
from dataclasses import field, fields
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import StrictBool, StrictInt

from shadowtune.config.settings import PositiveFloat, PositiveInt, nearest, raise_errors, settings
from shadowtune.errors import ConfigError

HOLD_OUT = "hold_out"
"""Value of ``DataConfig.validation`` that splits the validation examples off the training examples."""
HOLD_OUT_SHARE = 0.1
"""Share of the distinct training examples that is then held out."""
COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "text",
    "label",
    "system",
    "tools",
    "chat_template_kwargs",
)
"""Columns by which formats of rows are recognized, and what goes with them; ``DataConfig.columns`` maps them."""
Part = Literal["train", "validation", "test"]
"""Purpose of a task's examples."""
PARTS: tuple[Part, ...] = ("train", "validation", "test")
Metric = Literal["exact_match", "label", "number", "choice", "squad", "f1"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""What a classifier predicts, by transformers' names."""
Length = Annotated[StrictInt, Ge(2)]
"""A number of tokens."""

_SET_BY_TASKS = (
    "train",
    "train_split",
    "validation_split",
    "template",
    "optional_fields",
    "prompt_field",
    "completion_field",
    "text_field",
    "label_field",
    "label_names",
    "label_separator",
    "problem_type",
    "columns",
    "weights",
    "encoding",
    "block_size",
)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template with ``{field}`` into pieces: literal text, and the name of the field that follows it, or None.

    Doubled braces are literal ones. The attributes, indexes, conversions and format specifications of ``str.format``
    are refused: a template is data, not a program.

    Raises:
        ConfigError: if braces do not match or contain anything but a plain name, or if there are none.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write {{{{ and }}}} for literal braces") from None
    for _, name, specification, conversion in pieces:
        if name is not None and (not name or specification or conversion or set(name) & set(".[]")):
            raise ConfigError(f"template {template!r} may hold only plain names in braces, such as {{text}}")
    if all(name is None for _, name, _, _ in pieces):
        raise ConfigError(f"template {template!r} names no field, such as {{text}}: every prompt would be the same")
    return [(literal, name) for literal, name, _, _ in pieces]


@settings
class DataConfig:
    """The examples of a training run, and how they become tokens."""

    train: str | tuple[str, ...] | None = None
    """A file (.jsonl, .json, .csv, .tsv, .txt, each also with .gz or .zst; .parquet, .arrow), a directory of files
    named after splits or of ``save_to_disk``, a data set that comes with the package ("clinc150-demo") or a Hub data
    set ("hub:org/name" or "hub:org/name/config"); or a list of these. ":SPLIT" after one overrides ``train_split``."""
    weights: tuple[PositiveFloat, ...] | None = None
    """For a list of data sets, how often an epoch goes over the examples of each: 2 is twice, 0.5 a fixed half. None
    means once."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the file's columns for those that formats are recognized by: {prompt: question, completion: answer}."""
    encoding: str = "utf-8"
    """Encoding of text files, such as utf-16 or cp1252."""
    task: str | None = None
    """In place of ``train``: a task that comes with the package ("gsm8k"), or a .yaml file with the settings of
    ``TaskConfig``. It defines the data set, template, metric, length and, for classification, classes."""
    directory: str | None = None
    """A directory with a task's data sets; None loads them from the task's own source (the Hub)."""
    validation: str | None = None
    """Examples whose loss is measured during training, a data set as in ``train``; None measures none. "hold_out"
    holds out a tenth of the training examples, chosen by their contents, and does not train on them; "5%" another
    share. A task has its own validation examples, which "task" and "hold_out" select."""
    train_split: str = "train"
    """Split to train on; a single file has none."""
    validation_split: str = "validation"
    """Split to validate on; a single file has none."""
    template: str | None = None
    """Prompt with an example's fields in braces, for instance "Request: {text}\\nIntent:"; None uses one field as it
    is. In classification it makes the text."""
    optional_fields: tuple[str, ...] = ()
    """Fields of the template that may be missing, empty or null. The text between the previous field and such a field
    is then omitted too: "{instruction}\\n\\n{input}" becomes the instruction alone."""
    main_field: str | None = None
    """Field of the template that a single text fills: a prompt of ``generate``, a chat message. None means the only
    field that is not optional."""
    prompt_field: str | None = None
    """Field of the prompt, if not ``prompt``."""
    completion_field: str | None = None
    """Field of the completion, if not ``completion``."""
    text_field: str | None = None
    """Field of the text, if not ``text``."""
    label_field: str | None = None
    """Field of the class or label, if not ``label``."""
    label_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their numbers; None takes those of the data set, else of the training
    examples, sorted."""
    problem_type: ProblemType | None = None
    """What the labels of classification are; None reads it off the training examples: lists are several classes per
    example, fractions are numbers of regression."""
    label_separator: str | None = None
    """Text between the labels of one example, for several classes per example in CSV and other plain cells."""
    max_length: Length | None = None
    """Most tokens of prompt and completion together; None means the task's value, else 512."""
    overlong: Literal["error", "truncate", "drop"] = "truncate"
    """Treatment of longer examples. "truncate" cuts the start of the prompt, never the completion; plain text, and text
    to classify, is cut at its end."""
    completion_only: StrictBool = True
    """Compute the loss on completions (assistant turns) only; of plain text, every token is trained on."""
    chat_template: StrictBool | None = None
    """Apply the tokenizer's chat template, if it has one, to prompts; None means the task's value, else true."""
    block_size: Length | None = None
    """Concatenate plain texts, separated by the end-of-sequence token, and cut the result into blocks of so many
    tokens, all trained on; for causal_lm. ``max_length`` and ``overlong`` are then ignored. None keeps texts apart."""
    limit: PositiveInt | None = None
    """Most training examples: the first ones, of a list of data sets those of each; of a task, a fixed random
    sample."""
    validation_limit: PositiveInt | None = None
    """Most validation examples, likewise."""
    learn_validation: StrictBool = False
    """Train on the validation examples as well, and measure no loss on them. For comparisons with a method that selects
    something by them."""

    def __post_init__(self) -> None:
        """Check the template and what contradicts each other."""
        conflicts = (self._source_conflicts, self._column_conflicts, self._format_conflicts, self._template_conflicts)
        raise_errors(message for each in conflicts for message in each())

    @property
    def source(self) -> str:
        """The task, else the training data set, as the user wrote it."""
        return self.task or ", ".join(self.sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """The training data sets."""
        return (self.train,) if isinstance(self.train, str) else self.train or ()

    @property
    def hold_out_share(self) -> float | None:
        """Share of the distinct training examples held out for validation; None if that has another source."""
        if self.validation == HOLD_OUT:
            return HOLD_OUT_SHARE
        share = re.fullmatch(r"(\d+(?:\.\d+)?)%", self.validation or "")
        return None if share is None else float(share[1]) / 100

    def _source_conflicts(self) -> Iterator[str]:
        """Check that the examples have one source, which nothing contradicts."""
        if self.task is None:
            if not self.sources:
                yield "has no rows: set train to a file or data set, or task to a task"
            if self.weights is not None and len(self.weights) != len(self.sources):
                yield f"weights has {len(self.weights)} numbers for the {len(self.sources)} data sets of train"
            if (share := self.hold_out_share) is not None and not 0 < share < 1:
                yield f"validation={self.validation} must be above 0% and below 100%"
            if self.directory is not None:
                yield f"directory={self.directory} holds the data sets of tasks; set task, or leave it out"
            return
        defined = [
            setting.name
            for setting in fields(self)
            if setting.name in _SET_BY_TASKS and vars(self)[setting.name] not in (setting.default, {})
        ]
        if defined:
            yield f"task={self.task} brings its own {', '.join(defined)}; leave out what the task brings"
        if self.validation not in (None, "task", HOLD_OUT):
            given = f"validation={self.validation} does not go with task={self.task}"
            yield f"{given}; set validation=task, or leave it out"

    def _column_conflicts(self) -> Iterator[str]:
        """Check that every column has one name."""
        for name in self.columns:
            if name not in COLUMNS:
                yield f"columns has {name}{nearest(name, COLUMNS)}; its keys are of {', '.join(COLUMNS)}"
        for name in ("prompt", "completion", "text", "label"):
            field_name = vars(self)[f"{name}_field"]
            if name in self.columns and field_name is not None:
                yield f"columns.{name} and {name}_field name the same column; set only one of them"
        if self.label_names is not None and len(set(self.label_names)) < len(self.label_names):
            yield f"label_names has the same name twice: {', '.join(self.label_names)}"

    def _format_conflicts(self) -> Iterator[str]:
        if self.learn_validation and self.validation is None:
            yield "learn_validation=true needs validation rows: set validation, or leave it out"
        for name in ("template", "prompt_field", "completion_field"):
            if self.block_size is not None and vars(self)[name] is not None:
                yield (
                    f"block_size={self.block_size} joins plain texts, which have no {name}; name their field with "
                    "text_field, or leave block_size out"
                )

    def _template_conflicts(self) -> Iterator[str]:
        if self.template is None:
            if self.optional_fields or (self.main_field is not None and self.task is None):
                yield "optional_fields and main_field are fields of a template; set template"
            return
        try:
            named = {name for _, name in parse_template(self.template)}
        except ConfigError as error:
            yield str(error)
            return
        main = {self.main_field} - {None}
        for setting, given in (("optional_fields", {*self.optional_fields}), ("main_field", main)):
            if unknown := sorted(map(str, given - named)):
                yield f"{setting} names {', '.join(unknown)}, which the template does not have"
        if self.main_field in self.optional_fields:
            yield f"main_field={self.main_field} takes a user's words, so it cannot be optional"
        if self.prompt_field is not None or self.text_field is not None:
            yield "template replaces prompt_field and text_field; set only one of them"


@settings
class RowSource:
    """A data set, and the splits that are a task's training, validation and test examples."""

    source: str
    """A file, a directory of files named after splits, or a Hub data set, as in ``DataConfig.train``; in
    ``TaskConfig.local`` the name of a folder."""
    train: str = "train"
    """Training split; a single file has none, and is all training examples."""
    validation: str | None = None
    """Validation split; None holds out a tenth of the training examples, which are then not trained on."""
    test: str | None = "test"
    """Test split; None holds out another tenth of the training examples, which are then not trained on."""

    def __post_init__(self) -> None:
        """Check that no split has two purposes."""
        named = [split for split in (self.train, self.validation, self.test) if split is not None]
        if len(set(named)) < len(named):
            raise ConfigError(
                f"train={self.train}, validation={self.validation} and test={self.test} must be different splits; "
                "null takes rows out of the training split"
            )


@settings
class TaskConfig:
    """A task: its data sets, its prompt and completion, and its metric."""

    name: str
    """Name in results."""
    prompt: str
    """Template of the prompt, with an example's fields in braces: "Question: {question}\\nAnswer:"."""
    completion: str
    """Template of the completion to learn."""
    rows: RowSource
    """Its data set."""
    local: RowSource | None = None
    """Its data set below a directory of data sets (``data.directory``); None if there can be none."""
    version: PositiveInt = 1
    """Raised when the same model could get another score."""
    reader: Literal["fields", "squad", "mmlu"] = "fields"
    """Conversion of a raw row to flat fields. "fields": none; "squad": answer and answers, which are "unanswerable"
    where there is no answer; "mmlu": A, B, C, D and the letter."""
    rename: dict[str, str] | None = None
    """Names of fields in some of the sources -> the names used here."""
    max_characters: PositiveInt | None = None
    """Fields are cut to so many characters, such that the text after them stays in the prompt."""
    references: str | None = None
    """Field with the list of all correct answers; None accepts the completion alone."""
    labels: list[str] | None = None
    """Names of the classes, in the order of their numbers. An example then gets the fields ``label``, a number, and
    ``label_name``, with spaces in place of underscores, and the task can be used for classification."""
    label_field: str = "label"
    """Field with the class, by number or by name."""
    only_labels: list[str] | None = None
    """Classes whose examples are used; None uses all."""
    label_words: dict[str, str] | None = None
    """``label_name`` of classes whose own name is not clear enough."""
    metric: Metric = "exact_match"
    """Score of an answer: see ``evaluation/scoring.py``."""
    max_length: Length = 512
    """Most tokens of prompt and completion together, unless the run sets it."""
    max_new_tokens: PositiveInt | None = None
    """Most tokens of an answer; None allows as many as the longest correct answer has."""
    chat_template: StrictBool = True
    """Apply the tokenizer's chat template to prompts, unless the run sets it."""
    notes: str = ""
    """Remarks for readers of its scores, such as corrections of earlier evaluations."""

    def __post_init__(self) -> None:
        """Check the templates and the labels."""
        raise_errors(self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        for template in (self.prompt, self.completion):
            try:
                parse_template(template)
            except ConfigError as error:
                yield str(error)
        for name in ("label_words", "only_labels"):
            if unknown := sorted(set(vars(self)[name] or ()) - set(self.labels or ())):
                yield f"{name} has {', '.join(unknown)}, which labels does not"
        labels = self.labels or []
        if twice := sorted({name for name in labels if labels.count(name) > 1}):
            yield f"labels has {', '.join(twice)} twice"
