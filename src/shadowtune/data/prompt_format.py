"""How a user's words become the prompt that a model was trained on; a small file that travels with the model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.config.checking import from_mapping
from shadowtune.config.templates import parse_template
from shadowtune.data.encoding import prompt_ids, tokenize_pieces
from shadowtune.data.rendering import has_template, render_messages
from shadowtune.errors import DataError, ShadowtuneError

FILE = "prompt_format.json"


@dataclass(frozen=True)
class PromptFormat:
    """What stands around a user's words."""

    template: str | None = None
    """Text with one ``{field}`` where the words go; None is the words alone."""
    chat_template: bool = True
    """Whether the tokenizer's chat template, if it has one, goes around that."""

    def fill(self, text: str) -> str:
        """Put a user's words where the template, if it has one with a single field, had a row's.

        Raises:
            DataError: if the template has several fields.
        """
        pieces = [] if self.template is None else parse_template(self.template)
        fields = [name for _, name in pieces if name is not None]
        if not fields:
            return text
        if len(fields) > 1:
            raise DataError(
                f"the run's template has the fields {', '.join(fields)}; write the whole prompt, and send it as it is "
                "(--raw; over HTTP: /v1/completions)"
            )
        return "".join(literal + ("" if name is None else text) for literal, name in pieces)

    def encode(self, messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids of a conversation, up to where the model's answer begins.

        A model trained with a chat template reads all messages; one trained without reads the last one alone.

        Raises:
            DataError: if a message has no text, or the chat template refuses the conversation.
        """
        if not messages:
            raise DataError("there are no messages")
        words = messages[-1].get("content")
        if not isinstance(words, str) or not words.strip():
            raise DataError("the last message has no text")
        if has_template(tokenizer, self.chat_template) and (len(messages) > 1 or messages[0].get("role") != "user"):
            filled = [*messages[:-1], {**messages[-1], "content": self.fill(words)}]
            return next(tokenize_pieces(tokenizer, [[render_messages(filled, tokenizer)]])).ids
        return prompt_ids(self.fill(words), tokenizer, self.chat_template)

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
        except (ValueError, ShadowtuneError) as error:
            raise DataError(f"{place}: {error}; write it again with shadowtune detach or export") from None
