"""The prompt format of a trained model, saved beside its weights as ``prompt_format.json``.

``PromptFormat`` is read off the training data. Training, evaluation, ``generate``, the servers, ``detach`` and the
exports make prompts and find the end of answers by it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.data import parse_template
from shadowtune.config.settings import from_mapping, nearest
from shadowtune.data.encoding import EncodingReport, prompt_ids, segment_ids
from shadowtune.data.examples import (
    ChatMessage,
    Conversation,
    fill_template,
    json_list,
    read_messages,
    read_template_kwargs,
)
from shadowtune.data.segments import has_template, render_messages
from shadowtune.errors import DataError, ShadowtuneError

FILE = "prompt_format.json"


@dataclass(frozen=True)
class PromptFormat:
    """How a user's text becomes a prompt, and which tokens end the answer.

    Two formats are equal if they make the same prompts.
    """

    template: str | None = None
    """Text with ``{field}`` for the user's text; None is the text alone."""
    chat_template: bool = True
    """Whether the result goes through the tokenizer's chat template, if it has one."""
    optional_fields: tuple[str, ...] = ()
    """Fields of the template that may be missing; the literal text before such a field goes with it."""
    main_field: str | None = None
    """Field of the template that takes a single text; None means the only one that is not optional."""
    answer_prefix: str = ""
    """Text that the chat template puts at the start of every answer, such as empty reasoning; prompts end with it."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Default arguments of the chat template."""
    content_mark: str = field(default="", compare=False)
    """Text between the reasoning and the content of an answer, if training answers had reasoning; evaluation compares
    what follows it."""
    answers: bool = True
    """Whether the training data were prompts with answers, rather than plain text."""
    ends: tuple[int, ...] = field(default=(), compare=False)
    """Tokens that end an answer, those of the training data first; empty if nothing was trained here."""
    baked: bool = field(default=False, compare=False)
    """Whether the chat template of the tokenizer beside this file makes the same prompts; see ``chat_template.py``."""
    tokenizer_chat_template: str | None = field(default=None, compare=False)
    """The tokenizer's original chat template, if ``baked``."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the template's fields, in order."""
        pieces = [] if self.template is None else parse_template(self.template)
        return tuple(dict.fromkeys(name for _, name in pieces if name is not None))

    @property
    def text_field(self) -> str | None:
        """The field that takes a single text; None without a template, or if it is ambiguous."""
        needed = [name for name in self.fields if name not in self.optional_fields]
        return self.main_field or (needed[0] if len(needed) == 1 else None)

    @property
    def further_fields(self) -> tuple[str, ...]:
        """Fields beside the one that takes a single text."""
        return tuple(name for name in self.fields if name != self.text_field)

    def learned_from(self, report: EncodingReport) -> "PromptFormat":
        """Return this format with what was read off the training data; its ends do not include the base's yet."""
        return replace(
            self,
            answer_prefix=report.answer_prefix,
            content_mark=report.content_mark,
            template_kwargs=report.template_kwargs,
            answers=report.answers,
            ends=report.ends,
        )

    def fill(self, text: str | None, fields: Mapping[str, Any] | None = None) -> str:
        """Fill the template with a user's text.

        Args:
            text: value of ``text_field``; None if ``fields`` has all values.
            fields: further fields by name.

        Raises:
            DataError: if a field is missing or unknown.
        """
        given = dict(fields or {})
        if self.template is None:
            if given:
                raise DataError(f"the model's prompts have no fields, and {', '.join(given)} is given; leave it out")
            return text or ""
        unknown = [name for name in given if name not in self.fields]
        if unknown:
            raise DataError(
                f"the model's template has no field {unknown[0]!r}{nearest(unknown[0], self.fields)}; it has "
                f"{', '.join(self.fields)}"
            )
        if text is not None:
            given = self._with_text(text, given)
        missing = [name for name in self.fields if name not in given and name not in self.optional_fields]
        if missing:
            raise DataError(
                f"the model's template has the fields {', '.join(self.fields)}, and {', '.join(missing)} is not given; "
                "give it by name (--field NAME=VALUE; over HTTP: fields)"
            )
        return fill_template(self.template, given, "the prompt", self.optional_fields)

    def _with_text(self, text: str, given: dict[str, Any]) -> dict[str, Any]:
        missing = [name for name in self.fields if name not in given and name not in self.optional_fields]
        name = self.text_field or (missing[0] if len(missing) == 1 else None)
        if name is None:
            raise DataError(
                f"the model's template has the fields {', '.join(self.fields)}, and nothing says which of them a text "
                "alone is; give them by name (--field NAME=VALUE; over HTTP: fields), send the whole prompt (--raw; "
                "over HTTP: /v1/completions), or train with data.main_field"
            )
        if name in given:
            raise DataError(f"the text and the field {name} are the same part of the prompt; give one of them")
        return {**given, name: text}

    def takes_conversations(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether prompts go through a chat template, so that the model reads system messages and earlier turns."""
        return has_template(tokenizer, self.chat_template)

    def has_saved_template(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the tokenizer saved beside this format has a chat template; ``tokenizer`` is the original one."""
        return self.baked or bool(tokenizer.chat_template)

    def prompt_ids(
        self, text: str | None, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids of the prompt of one text, up to where the answer begins.

        Raises:
            DataError: as ``fill``; or if the prompt is empty or the chat template refuses it.
        """
        return self.wrap(self.fill(text, fields), tokenizer)

    def wrap(self, prompt: str, tokenizer: PreTrainedTokenizerBase, extra: Conversation | None = None) -> list[int]:
        """Return the token ids of a prompt whose template is already filled."""
        extra = extra or Conversation([], template_kwargs=self.template_kwargs)
        return prompt_ids(prompt, tokenizer, self.chat_template, self.answer_prefix, extra)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        tools: Any = None,
        template_kwargs: Any = None,
        fields: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, up to where the answer begins.

        A model trained with a chat template reads all messages; one trained without takes a single message of role
        user.

        Args:
            messages: "role", "content" and other fields of the chat template.
            tokenizer: of the model.
            tools: JSON schemas that the chat template shows.
            template_kwargs: further arguments of the chat template.
            fields: of the template, beside the one that the last message fills.

        Raises:
            DataError: if a message has no text, the model cannot read one, or the chat template refuses them.
        """
        if not messages:
            raise DataError("there are no messages")
        text = messages[-1].get("content")
        if not isinstance(text, str) or not text.strip():
            raise DataError("the last message has no text")
        given = read_template_kwargs(template_kwargs or {}, "the request")
        if not self.takes_conversations(tokenizer):
            self._check_single(messages, tools, given)
            return self.wrap(self.fill(text, fields), tokenizer)
        read = read_messages(messages, "messages", "the request")
        shown = None if tools is None else json_list(tools, "tools", "the request") or None
        extra = Conversation([], tools=shown, template_kwargs={**self.template_kwargs, **given})
        return segment_ids(render_messages(self._filled(read, fields), tokenizer, extra), tokenizer, self.answer_prefix)

    def _filled(self, messages: list[ChatMessage], fields: Mapping[str, Any] | None) -> list[ChatMessage]:
        """Put the last message of role user through the template."""
        users = [number for number, message in enumerate(messages) if message["role"] == "user"]
        number = users[-1] if users else len(messages) - 1
        if self.template is None and not fields:
            return messages
        filled = {**messages[number], "content": self.fill(str(messages[number].get("content") or ""), fields)}
        return [*messages[:number], filled, *messages[number + 1 :]]

    @staticmethod
    def _check_single(messages: Sequence[Mapping[str, Any]], tools: Any, template_kwargs: Mapping[str, Any]) -> None:
        """Raise DataError unless there is a single message of role user, and no arguments of a chat template."""
        roles = [str(message.get("role")) for message in messages]
        if roles != ["user"]:
            unused = "a system message" if "system" in roles[:-1] else "earlier turns" if len(roles) > 1 else "its role"
            raise DataError(
                "the model was trained on single requests without a chat template and reads one message of role user; "
                f"got {', '.join(roles)}, of which {unused} would be lost: leave it out, or send the whole prompt to "
                "/v1/completions"
            )
        for name, value in (("tools", tools), ("chat_template_kwargs", template_kwargs)):
            if value:
                raise DataError(
                    f"the model was trained without a chat template, so {name} cannot reach it; leave it out"
                )

    def save(self, directory: Path) -> None:
        """Write ``prompt_format.json``."""
        (directory / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "PromptFormat":
        """Read ``prompt_format.json``; without one, the format is the tokenizer's chat template.

        Raises:
            DataError: if the file is not what ``save`` wrote.
        """
        file = directory / FILE
        if not file.is_file():
            return cls()
        try:
            return cls.parse(file.read_text(), str(file))
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: {error}; write it again with shadowtune detach or export") from None

    @classmethod
    def parse(cls, text: str, where: str) -> "PromptFormat":
        """Parse the contents of ``prompt_format.json``; raises DataError beginning with ``where``."""
        try:
            return from_mapping(cls, json.loads(text), where="")
        except (ValueError, RecursionError, ShadowtuneError) as error:
            raise DataError(f"{where}: {error}; write it again with shadowtune detach or export") from None
