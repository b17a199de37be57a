"""What a trained model knows about its prompts and where its answers end; a small file that travels with the model.

``PromptFormat`` is read off the training rows and written beside the model's weights as ``prompt_format.json``.
Training, evaluation, ``generate``, the servers, ``detach`` and the exports all make prompts and find ends by it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.checking import from_mapping, nearest
from shadowtune.config.templates import parse_template
from shadowtune.data.encoding import EncodingReport, piece_ids, prompt_ids
from shadowtune.data.messages import Message, json_list, read_messages, read_template_kwargs
from shadowtune.data.prompts import Conversation, fill_template
from shadowtune.data.rendering import has_template, render_messages
from shadowtune.errors import DataError, ShadowtuneError

FILE = "prompt_format.json"


@dataclass(frozen=True)
class PromptFormat:
    """How a user's words become a prompt, and which tokens end the answer.

    Two formats are equal if they make the same prompts.
    """

    template: str | None = None
    """Text with ``{field}`` where the words go; None is the words alone."""
    chat_template: bool = True
    """Whether the tokenizer's chat template, if it has one, goes around that."""
    optional_fields: tuple[str, ...] = ()
    """Fields of the template that may be left out, with the text between them and the field before."""
    main_field: str | None = None
    """Field of the template that takes a single text; None is the only one that is not optional."""
    answer_prefix: str = ""
    """What the chat template puts at the start of every answer, such as an empty block of thoughts; it ends prompts."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given by name, where a request does not say otherwise."""
    content_mark: str = field(default="", compare=False)
    """What is between an answer's thoughts and its content, where training answers had thoughts: evaluation compares
    what follows it."""
    answers: bool = True
    """Whether prompts and their answers were learned; else plain texts, and the tokenizer's chat template stays."""
    ends: tuple[int, ...] = field(default=(), compare=False)
    """Tokens that end an answer, those of the training rows first; empty if nothing was trained here."""
    baked: bool = field(default=False, compare=False)
    """Whether the tokenizer beside this file has a chat template that makes all of this by itself: see ``baking``."""
    tokenizer_chat_template: str | None = field(default=None, compare=False)
    """The tokenizer's chat template before that."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the template's fields, in their order; none without a template."""
        pieces = [] if self.template is None else parse_template(self.template)
        return tuple(dict.fromkeys(name for _, name in pieces if name is not None))

    @property
    def text_field(self) -> str | None:
        """The field that takes a single text; None if there is no template, or nothing says which one."""
        needed = [name for name in self.fields if name not in self.optional_fields]
        return self.main_field or (needed[0] if len(needed) == 1 else None)

    @property
    def further_fields(self) -> tuple[str, ...]:
        """Fields beside the one that takes a single text."""
        return tuple(name for name in self.fields if name != self.text_field)

    def learned_from(self, report: EncodingReport) -> "PromptFormat":
        """Return this format with what was read off the training rows; its ends are still those of the rows alone."""
        return replace(
            self,
            answer_prefix=report.answer_prefix,
            content_mark=report.content_mark,
            template_kwargs=report.template_kwargs,
            answers=report.answers,
            ends=report.ends,
        )

    def fill(self, text: str | None, fields: Mapping[str, Any] | None = None) -> str:
        """Put a user's words where the template had a row's fields.

        Args:
            text: goes where ``text_field`` is; None if the fields are all there is.
            fields: further fields by name.

        Raises:
            DataError: if the template needs another field, or has not the given one.
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
        """Return the fields with a single text among them."""
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
        """Say whether the model reads system messages and earlier turns: whether it has a chat template."""
        return has_template(tokenizer, self.chat_template)

    def has_saved_template(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Say whether the tokenizer saved beside this format has a chat template, given its original tokenizer."""
        return self.baked or bool(tokenizer.chat_template)

    def prompt_ids(
        self, text: str | None, tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids of the prompt of one text, up to where the model's answer begins.

        Raises:
            DataError: as ``fill``; or if the prompt is empty or the chat template refuses it.
        """
        return self.wrap(self.fill(text, fields), tokenizer)

    def wrap(self, prompt: str, tokenizer: PreTrainedTokenizerBase, extra: Conversation | None = None) -> list[int]:
        """Return the token ids of a prompt whose template is filled in already."""
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
        """Return the token ids of a conversation, up to where the model's answer begins.

        A model trained with a chat template reads all messages; one trained without reads one message of a user, and
        anything else is refused.

        Args:
            messages: "role", "content" and what else the chat template reads.
            tokenizer: of the model.
            tools: JSON schemas that the chat template shows.
            template_kwargs: further arguments of the chat template.
            fields: of the template, beside the one that the last message fills.

        Raises:
            DataError: if a message has no text, the model cannot use one, or the chat template refuses them.
        """
        if not messages:
            raise DataError("there are no messages")
        words = messages[-1].get("content")
        if not isinstance(words, str) or not words.strip():
            raise DataError("the last message has no text")
        given = read_template_kwargs(template_kwargs or {}, "the request")
        if not self.takes_conversations(tokenizer):
            self._check_single(messages, tools, given)
            return self.wrap(self.fill(words, fields), tokenizer)
        read = read_messages(messages, "messages", "the request")
        shown = None if tools is None else json_list(tools, "tools", "the request") or None
        extra = Conversation([], tools=shown, template_kwargs={**self.template_kwargs, **given})
        return piece_ids(render_messages(self._filled(read, fields), tokenizer, extra), tokenizer, self.answer_prefix)

    def _filled(self, messages: list[Message], fields: Mapping[str, Any] | None) -> list[Message]:
        """Return messages of which the user's last one has gone through the template."""
        users = [number for number, message in enumerate(messages) if message["role"] == "user"]
        number = users[-1] if users else len(messages) - 1
        if self.template is None and not fields:
            return messages
        filled = {**messages[number], "content": self.fill(str(messages[number].get("content") or ""), fields)}
        return [*messages[:number], filled, *messages[number + 1 :]]

    @staticmethod
    def _check_single(messages: Sequence[Mapping[str, Any]], tools: Any, template_kwargs: Mapping[str, Any]) -> None:
        """Raise DataError unless there is one message of a user, and nothing for a chat template."""
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
        """Read ``prompt_format.json``; without one, the tokenizer's chat template around the words.

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
    def parse(cls, text: str, place: str) -> "PromptFormat":
        """Read what stands in ``prompt_format.json``; raises DataError, naming the place, if it is something else."""
        try:
            return from_mapping(cls, json.loads(text), where="")
        except (ValueError, RecursionError, ShadowtuneError) as error:
            raise DataError(f"{place}: {error}; write it again with shadowtune detach or export") from None
