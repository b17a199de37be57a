"""A task: where its rows come from, how each becomes a prompt and its answer, and how answers are judged."""

from dataclasses import dataclass
from typing import Literal

from shadowtune.config.checking import check_range
from shadowtune.config.templates import parse_template
from shadowtune.errors import ConfigError

Part = Literal["train", "validation", "test"]
"""What a task's rows are for."""
PARTS: tuple[Part, ...] = ("train", "validation", "test")
Metric = Literal["exact_match", "label", "number", "choice", "squad", "f1"]


@dataclass(frozen=True)
class RowSource:
    """A data set, and which of its splits is which part of a task."""

    source: str
    """A file, a directory of files named after splits, or a Hub data set, as in ``DataConfig.train``; under
    ``TaskConfig.local`` the name of a folder."""
    train: str = "train"
    """Split to learn from; a single file has none, and is all training rows."""
    validation: str | None = None
    """Split to choose settings by; None takes a tenth of the training rows, which are then not learned."""
    test: str | None = "test"
    """Split for the final numbers; None takes another tenth of the training rows, which are then not learned."""

    def __post_init__(self) -> None:
        """Check that no split is two parts."""
        named = [split for split in (self.train, self.validation, self.test) if split is not None]
        if len(set(named)) < len(named):
            raise ConfigError(
                f"train={self.train}, validation={self.validation} and test={self.test} must be different splits; "
                "null takes rows out of the training split"
            )


@dataclass(frozen=True)
class TaskConfig:
    """One task."""

    name: str
    """What it is called in results."""
    prompt: str
    """Template of the prompt, with a row's fields in braces: "Question: {question}\\nAnswer:"."""
    completion: str
    """Template of the answer that is learned."""
    rows: RowSource
    """Where its rows come from."""
    local: RowSource | None = None
    """Where they come from if there is a directory of data sets (``data.directory``); None if it cannot hold them."""
    version: int = 1
    """Raised when the same model could get another score."""
    reader: Literal["fields", "squad", "mmlu"] = "fields"
    """How a raw row becomes flat fields. "fields" takes it as it is; "squad" makes answer and answers, the word
    "unanswerable" where there is none; "mmlu" makes A, B, C, D and the letter."""
    rename: dict[str, str] | None = None
    """Other names that fields have in some of the sources, and the names used here."""
    max_characters: int | None = None
    """Longer fields are cut at their end, so that the prompt keeps what comes after them."""
    references: str | None = None
    """Field with the list of all answers that count as right; None accepts the completion alone."""
    labels: list[str] | None = None
    """Names of the classes, if there are, in the order of their numbers. With them a row gets the fields ``label``, a
    number, and ``label_name``, in which an underscore becomes a space, and the task can be used for classification."""
    label_field: str = "label"
    """Field that holds the class, by number or by name."""
    only_labels: list[str] | None = None
    """Classes whose rows are used; None uses those of all."""
    label_words: dict[str, str] | None = None
    """What ``label_name`` is for classes whose name alone would not say it."""
    metric: Metric = "exact_match"
    """How an answer is scored: see ``evaluation/scoring.py``."""
    max_length: int = 512
    """Tokens of prompt and answer together, unless the run says otherwise."""
    max_new_tokens: int | None = None
    """Tokens a model may answer; None allows as many as the longest true answer has."""
    chat_template: bool = True
    """Whether prompts are put into the tokenizer's chat template, unless the run says otherwise."""
    notes: str = ""
    """What a reader of its scores must know; which mistakes of earlier evaluations are corrected, and how."""

    def __post_init__(self) -> None:
        """Check the ranges, the templates, and what does not go together."""
        check_range(self, version=(1, None), max_characters=(1, None), max_length=(2, None), max_new_tokens=(1, None))
        for template in (self.prompt, self.completion):
            parse_template(template)
        for name in ("label_words", "only_labels"):
            if unknown := sorted(set(vars(self)[name] or ()) - set(self.labels or ())):
                raise ConfigError(f"{name} has {', '.join(unknown)}, which labels does not")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            twice = sorted({name for name in self.labels if self.labels.count(name) > 1})
            raise ConfigError(f"labels has {', '.join(twice)} twice")
