"""Requests whose right answers are known: the rows of a run or a file, as a model of ours or a far server is asked."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shadowtune.data.dataset import Dataset
    from shadowtune.data.prompt_format import PromptFormat
    from shadowtune.data.sources import Row

ROOM = 2
"""Tokens that an answer may have beyond the longest true one: the space before it, and its end."""


@dataclass(frozen=True)
class Labelled:
    """One request."""

    prompt: list[int]
    """Token ids, exactly as in training."""
    text: str
    """The same as text."""
    messages: tuple[dict[str, Any], ...] | None
    """What a user would have sent; None where a row is more than a user's words."""
    references: list[str]
    """All answers that count as right."""


@dataclass(frozen=True)
class LabelledSet:
    """Requests with what holds for all of them."""

    requests: list[Labelled]
    metric: str
    """One of ``evaluation.scoring.METRICS``."""
    max_new_tokens: int
    tokenizer: Any

    @property
    def digest(self) -> str:
        """Tells these requests from all others."""
        known = [[vars(asked) for asked in self.requests], self.metric, self.max_new_tokens]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def tokenize(self, answer: str) -> list[int]:
        """Return the token ids of an answer."""
        return list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def score(self, number: int, answer: str) -> float:
        """Return the score of an answer to one request, between 0 and 1."""
        from shadowtune.evaluation.scoring import score_answers

        return score_answers(self.metric, [answer.strip()], [self.requests[number].references])[0][0]


def read_labelled(data: "Dataset", tokenizer: Any, source: str | None, split: str, limit: int | None) -> LabelledSet:
    """Read requests as ``Dataset.held_out`` does, from the run's own data or another source.

    Raises:
        DataError: if there are none, or one has no answer.
    """
    rows = data.held_out(split, source, limit)[:limit]
    prompts = data.encode_prompts(rows, tokenizer)
    texts = tokenizer.batch_decode([prompt.input_ids for prompt in prompts])
    references = data.references(rows, prompts)
    requests = [
        Labelled(prompt.input_ids, text, _messages(data, row), right)
        for prompt, text, row, right in zip(prompts, texts, rows, references, strict=True)
    ]
    longest = max(len(tokenizer(prompt.target, add_special_tokens=False)["input_ids"]) for prompt in prompts)
    return LabelledSet(requests, data.metric, data.max_new_tokens or longest + ROOM, tokenizer)


def data_of_format(form: "PromptFormat", source: str) -> "Dataset":
    """Return rows of prompt and completion, or of whatever field the format names, as data of a run would be."""
    from shadowtune.config.data import DataConfig
    from shadowtune.data.dataset import Dataset

    settings = DataConfig(
        train=source,
        template=form.template,
        chat_template=form.chat_template,
        optional_fields=form.optional_fields,
        main_field=None if form.template is None else form.main_field,
    )
    return replace(Dataset.open(settings), form=form)


def _messages(data: "Dataset", row: "Row") -> tuple[dict[str, Any], ...] | None:
    """Return a user's words in a message, if the row has a field of them."""
    from shadowtune.config.templates import parse_template

    if data.task is not None or row.get("tools") or row.get("chat_template_kwargs"):
        return None
    pieces = [("", data.fields.prompt or "prompt")] if data.template is None else parse_template(data.template)
    fields = [name for _, name in pieces if name is not None]
    words = row.get(fields[0]) if len(fields) == 1 else None
    return ({"role": "user", "content": words},) if isinstance(words, str) else None
