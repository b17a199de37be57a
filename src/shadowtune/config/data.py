"""Which rows a run learns from, and how they become tokens."""

from dataclasses import dataclass, fields
from typing import Literal

from shadowtune.config.checking import check_range
from shadowtune.config.templates import parse_template
from shadowtune.errors import ConfigError

_BROUGHT_BY_TASKS = (
    "train",
    "train_split",
    "validation_split",
    "template",
    "optional_fields",
    "prompt_field",
    "completion_field",
    "text_field",
    "label_field",
    "block_size",
)
HELD_BACK = "held_back"
"""Validation rows that are taken out of the training rows."""


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from and how they become tokens."""

    train: str | None = None
    """A JSONL file or one plain text in a .txt file (either may be gzipped), a directory of such files named after
    splits, a data set we ship ("clinc150-demo") or a Hub data set ("hub:org/name" or "hub:org/name/config")."""
    task: str | None = None
    """In place of ``train``: a task that we ship ("gsm8k"), or a .yaml file with a task of one's own (the fields of
    ``TaskConfig``). It brings its rows, template, metric, length and, for classification, classes."""
    directory: str | None = None
    """A directory of data sets that a task takes its rows from; None takes them from where the task says (the Hub)."""
    validation: str | None = None
    """Rows whose loss is measured during training; None measures none. "held_back" takes a tenth of the training rows,
    by their contents, and does not train on them; of a task, which has its own, "task" and "held_back" take those."""
    train_split: str = "train"
    """Split to train on; a single file has none."""
    validation_split: str = "validation"
    """Split to validate on; a single file has none."""
    template: str | None = None
    """How a prompt is made from a row's fields, for instance "Request: {text}\\nIntent:"; None takes a field as it is.
    In classification it makes the text."""
    optional_fields: tuple[str, ...] = ()
    """Fields of the template that a row may lack, or have empty or null. The text between the field before and such a
    field is left out with it: of "{instruction}\\n\\n{input}" only the instruction is left."""
    main_field: str | None = None
    """Field of the template that takes a user's words where there is one text alone: a prompt of ``generate``, a chat
    message. None takes the only field that is not optional."""
    prompt_field: str | None = None
    """Field of the prompt, if it is not called ``prompt``."""
    completion_field: str | None = None
    """Field of the completion, if it is not called ``completion``."""
    text_field: str | None = None
    """Field of the text, if it is not called ``text``."""
    label_field: str | None = None
    """Field of the class in classification, if it is not called ``label``."""
    max_length: int | None = None
    """Tokens of prompt and completion together; None takes the task's number, else 512."""
    overlong: Literal["error", "truncate", "drop"] = "truncate"
    """What happens to longer rows. "truncate" cuts the start of the prompt, never the completion; of plain text and
    in classification, which have no prompt, it cuts the end."""
    completion_only: bool = True
    """Whether only completions (assistant turns) are learned; plain text is always learned whole."""
    chat_template: bool | None = None
    """Whether prompts are put into the tokenizer's chat template, if it has one; None does what the task says, and does
    so without one."""
    block_size: int | None = None
    """Join the rows' plain texts, with the end-of-sequence token between them, and cut the whole into blocks of so many
    tokens, all learned; for causal_lm. ``max_length`` and ``overlong`` do not matter then. None keeps rows apart."""
    limit: int | None = None
    """Use only so many training rows: the first ones; of a task, a random sample that is always the same."""
    validation_limit: int | None = None
    """Use only so many validation rows, likewise."""
    learn_validation: bool = False
    """Whether the validation rows are learned as well, after which no loss is measured on them. For comparisons with a
    method that chooses something by them."""

    def __post_init__(self) -> None:
        """Check the ranges, the template, and what does not go together."""
        check_range(self, max_length=(2, None), block_size=(2, None), limit=(1, None), validation_limit=(1, None))
        self._check_source()
        if self.learn_validation and self.validation is None:
            raise ConfigError("learn_validation=true needs validation rows: set validation, or leave it out")
        if self.block_size is not None:
            for name in ("template", "prompt_field", "completion_field"):
                if vars(self)[name] is not None:
                    raise ConfigError(
                        f"block_size={self.block_size} joins plain texts, which have no {name}; name their field with "
                        "text_field, or leave block_size out"
                    )
        if self.template is None:
            if self.optional_fields or (self.main_field is not None and self.task is None):
                raise ConfigError("optional_fields and main_field are fields of a template; set template")
            return
        named = {name for _, name in parse_template(self.template)}
        for setting in ("optional_fields", "main_field"):
            value = vars(self)[setting]
            unknown = sorted({value} - {None} - named if setting == "main_field" else set(value) - named)
            if unknown:
                raise ConfigError(f"{setting} names {', '.join(unknown)}, which the template does not have")
        if self.main_field in self.optional_fields:
            raise ConfigError(f"main_field={self.main_field} takes a user's words, so it cannot be optional")
        if self.prompt_field is not None or self.text_field is not None:
            raise ConfigError("template replaces prompt_field and text_field; set only one of them")

    @property
    def source(self) -> str:
        """The task, else the data set to train on, as the user wrote it."""
        return self.task or self.train or ""

    def _check_source(self) -> None:
        """Check that the rows have one source, and that nothing contradicts a task."""
        if self.task is None:
            if self.train is None:
                raise ConfigError("has no rows: set train to a file or data set, or task to a task")
            if self.directory is not None:
                raise ConfigError(f"directory={self.directory} holds the data sets of tasks; set task, or leave it out")
            return
        brought = [
            setting.name
            for setting in fields(self)
            if setting.name in _BROUGHT_BY_TASKS and vars(self)[setting.name] != setting.default
        ]
        if brought:
            raise ConfigError(f"task={self.task} brings its own {', '.join(brought)}; leave out what the task brings")
        if self.validation not in (None, "task", HELD_BACK):
            raise ConfigError(
                f"validation={self.validation} does not go with task={self.task}; set validation=task, or leave it out"
            )
