"""From what a row says to the pieces of text a model reads, each learned or only read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shadowtune.data.messages import Message, is_learned, shorten
from shadowtune.data.prompts import Completion, Conversation, Example, Text
from shadowtune.errors import DataError, HiddenToolsError

PROBE = "Zq7probe"
"""A text that no chat template changes; where it is in the output shows what a template puts around a message."""


@dataclass(frozen=True)
class Piece:
    """A stretch of text."""

    text: str
    learned: bool
    """Whether it is an answer, which the model is to give, or a prompt."""
    opens: bool = False
    """Whether the tokenizer's begin token, if it adds one, stands before it; chat templates write their own."""
    closes: bool = False
    """Whether the end-of-sequence token must follow, because no token of the text itself ends it."""
    scaffold: str = field(default="", compare=False)
    """What the chat template puts before the content of an answer that has nothing but content."""


def has_template(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> bool:
    """Say whether prompts go through the tokenizer's chat template: it was asked for, and there is one."""
    return chat_template and tokenizer.chat_template is not None


class Renderer:
    """Renders examples with one tokenizer.

    Args:
        tokenizer: gives the chat template.
        chat_template: whether to use it. Without one a prompt and its completion are joined by a space, unless there is
            white space already; it belongs to the completion, as tokens begin with their space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> None:
        self._tokenizer, self._templated = tokenizer, has_template(tokenizer, chat_template)
        self._shown_roles: set[str] = set()

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        """Tokens that can end an answer: added ones, which no text contains by chance."""
        return tuple(sorted({*self._tokenizer.get_added_vocab(), self._tokenizer.eos_token or ""} - {""}))

    def sequences(self, example: Example, place: str) -> list[list[Piece]]:
        """Cut an example into the sequences that are learned, each of them into pieces.

        A sequence is prompt, answer, prompt, answer, ..., the last one an answer; or one plain text. A conversation is
        one sequence where the chat template renders earlier turns as it rendered them when they were the last; else
        every learned turn is a sequence of its own, as the last turn of the conversation up to it.

        Args:
            example: what the row says.
            place: names the row in errors.

        Raises:
            DataError: if the template refuses the messages or leaves out a text, or no answer can be told apart.
        """
        if isinstance(example, Text):
            return [[Piece(example.text, learned=True, opens=True, closes=True)]]
        if isinstance(example, Conversation):
            if not self._templated:
                raise DataError(f"{place}: messages need a tokenizer with a chat template, and data.chat_template=true")
            return self._conversation(example, place)
        if self._templated:
            messages = [asked(example.prompt), {"role": "assistant", "content": example.completion}]
            return self._conversation(Conversation(messages, 1, example.tools, example.template_kwargs), place)
        if example.tools:
            raise DataError(f"{place}: tools need a tokenizer with a chat template, and data.chat_template=true")
        prompt = Piece(example.prompt, learned=False, opens=True)
        return [[prompt, Piece(_joined(example), learned=True, closes=True)]]

    def prompt(self, example: Conversation, place: str) -> str:
        """Return what a model reads of a conversation before it answers; checked like those of training.

        Raises:
            DataError: if the template refuses the messages or leaves out a text.
        """
        text = self._apply(example.messages, example, place, awaiting=True)
        self._check_shown(example.messages, text, example, place)
        return text

    def _conversation(self, example: Conversation, place: str) -> list[list[Piece]]:
        """Find each answer as what the template adds for it; messages after the last answer are left out."""
        turns = _answers(example, place)
        messages = example.messages
        found = [self._turn(example, turn, place) for turn in turns]
        before, answer = found[-1]
        whole = before + answer.text
        self._check_shown(messages[: turns[-1] + 1], whole, example, place)
        pieces: list[Piece] = []
        position = 0
        for before, answer in found:
            if not (whole.startswith(before + answer.text) and position <= len(before)):
                return [[Piece(before, False), answer] for before, answer in found]
            pieces += [Piece(whole[position : len(before)], False), answer]
            position = len(before) + len(answer.text)
        return [pieces]

    def _turn(self, example: Conversation, turn: int, place: str) -> tuple[str, Piece]:
        """Return what is before an answer, and the answer, as the last turn of the conversation up to it."""
        earlier, message = example.messages[:turn], example.messages[turn]
        before = self._apply(earlier, example, place, awaiting=True)
        after = self._apply([*earlier, message], example, place)
        if not after.startswith(before):
            raise DataError(self._rewritten(example, turn, before, after, place))
        probe = self._apply([*earlier, {"role": "assistant", "content": PROBE}], example, place)
        start, found, rest = probe.rpartition(PROBE)
        if not found:
            raise DataError(f"{place}: the chat template leaves out the assistant's text (message {turn + 1})")
        answer = after[len(before) :].rstrip()  # the line break after the end-of-turn token begins the next prompt
        content = message.get("content") or ""
        if _squeezed(content) not in _squeezed(answer):
            raise DataError(
                f"{place}: the chat template changes or leaves out part of the assistant's text (message {turn + 1}), "
                "which then cannot be learned; train prompts and completions with data.chat_template=false instead"
            )
        added = start[len(before) :] if start.startswith(before) else ""
        return before, Piece(answer, True, closes=not rest.rstrip().endswith(self._end_texts), scaffold=added)

    def _rewritten(self, example: Conversation, turn: int, before: str, after: str, place: str) -> str:
        """Say why an answer cannot be told apart from what is before it."""
        plain = self._apply(example.messages[:turn], example, place) if turn else ""
        way = (
            "train prompts and completions with data.chat_template=false and a data.template, or change the chat "
            "template that is saved with the model"
        )
        if before.startswith(plain) and after.startswith(plain.rstrip()):
            opened = before[len(_shared_start([before, after])) :]
            return (
                f"{place}: the chat template's generation prompt ends in {shorten(opened)}, which it leaves out of a "
                f"finished turn (message {turn + 1}), so no answer follows the prompt that the model would be given; "
                f"{way}, so that both begin alike"
            )
        return (
            f"{place}: the chat template renders the messages before message {turn + 1} otherwise once that one is "
            f"there, so no answer follows the prompt that the model would be given; {way}"
        )

    def _check_shown(self, messages: Sequence[Message], text: str, example: Conversation, place: str) -> None:
        """Raise DataError if a text, a tool call or the tools do not reach the prompt."""
        for number, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str) and content.strip():
                role = str(message["role"])
                if role not in self._shown_roles or content.strip() not in text:
                    probed = [*messages[:number], {**message, "content": PROBE}, *messages[number + 1 :]]
                    if PROBE not in self._apply(probed, example, place):
                        raise DataError(
                            f"{place}: the chat template leaves out the text of message {number + 1} ({role}); it may "
                            "know only messages of several parts"
                        )
                    self._shown_roles.add(role)
            for call in message.get("tool_calls") or ():
                name = call.get("function", call)["name"]
                if name not in text:
                    raise HiddenToolsError(
                        f"{place}: the chat template leaves out the tool call {name!r} of message {number + 1}"
                    )
        if example.tools and "tools" not in self._shown_roles:
            bare = Conversation(example.messages, template_kwargs=example.template_kwargs)
            if self._apply(messages, bare, place) == self._apply(messages, example, place):
                raise HiddenToolsError(f"{place}: the chat template does not show tools to the model; leave them out")
            self._shown_roles.add("tools")

    def _apply(self, messages: Sequence[Message], example: Conversation, place: str, awaiting: bool = False) -> str:
        """Render messages as text; ``awaiting`` adds what comes before the assistant's answer."""
        given: list[Any] = [{name: value for name, value in each.items() if name != "weight"} for each in messages]
        settings = {"tokenize": False, "add_generation_prompt": awaiting, **example.template_kwargs}
        try:
            return str(self._tokenizer.apply_chat_template(given, tools=example.tools, **settings))
        except (TemplateError, TypeError) as error:  # TypeError: the template joins text with something that is none
            reason = " ".join(str(error).split())
            raise DataError(f"{place}: the tokenizer's chat template refuses the messages: {reason}") from None


def render(example: Example, tokenizer: PreTrainedTokenizerBase, chat_template: bool, place: str) -> list[Piece]:
    """Cut an example into pieces: the last of ``Renderer.sequences``, which ends in the last answer."""
    return Renderer(tokenizer, chat_template).sequences(example, place)[-1]


def render_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, chat_template: bool, example: Conversation | None = None
) -> Piece:
    """Return what a model reads before it answers: the first piece that ``render`` makes of prompt and completion.

    Args:
        prompt: the text.
        tokenizer: gives the chat template.
        chat_template: whether to use it.
        example: gives tools and other arguments of the chat template.
    """
    if not has_template(tokenizer, chat_template):
        return Piece(prompt, learned=False, opens=True)
    extra = example or Conversation([])
    return render_messages([asked(prompt)], tokenizer, extra, "the prompt")


def render_messages(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    extra: Conversation | None = None,
    place: str = "the conversation",
) -> Piece:
    """Return what a model reads of a whole conversation before it answers, by the tokenizer's chat template.

    Raises:
        DataError: if the template refuses the messages, or leaves out the text of one.
    """
    extra = extra or Conversation([])
    example = Conversation(messages, tools=extra.tools, template_kwargs=extra.template_kwargs)
    return Piece(Renderer(tokenizer, True).prompt(example, place), learned=False)


def common_scaffold(sequences: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what the chat template puts at the start of every answer, and what it puts before the content after that.

    The first belongs to the prompt. The second is empty unless answers have more than content, such as thoughts: then
    answers share less of what the template puts there, up to the end of a line or of an added token.
    """
    answers = [piece for pieces in sequences for piece in pieces if piece.learned]
    starts = {_shared_start([piece.scaffold, piece.text]) for piece in answers}
    whole = max((piece.scaffold for piece in answers), key=len, default="")
    shared = _shared_start(list(starts))
    if shared != whole:
        marks = ["\n", *tokenizer.get_added_vocab()]
        shared = shared[: max(shared.rfind(mark) + len(mark) if mark in shared else 0 for mark in marks)]
    prefix = shared.rstrip(" ") if shared.strip() else ""
    same = {piece.scaffold for piece in answers} == {whole}
    return prefix, whole.removeprefix(prefix).strip() if same else ""


def move_scaffold(pieces: Sequence[Piece], scaffold: str) -> list[Piece]:
    """Take a text off the start of every answer and put it at the end of the prompt before it."""
    if not scaffold:
        return list(pieces)
    moved: list[Piece] = []
    for piece in pieces:
        text = piece.text.removeprefix(scaffold) if piece.learned else piece.text + scaffold
        moved.append(Piece(text, piece.learned, piece.opens, piece.closes))
    return moved


def target_of(example: Example, place: str) -> str:
    """Return the true answer as text: the completion, or the assistant's last turn that is learned.

    Raises:
        DataError: if the example is plain text, or no turn is the assistant's.
    """
    if isinstance(example, Completion):
        return example.completion
    if isinstance(example, Text):
        raise DataError(f"{place}: plain text has no answer to compare with; give prompt and completion, or messages")
    return str(example.messages[_answers(example, place)[-1]].get("content") or "")


def asked(prompt: str) -> Message:
    """Return a user's words as a message."""
    return {"role": "user", "content": prompt}


def _joined(example: Completion) -> str:
    before, after = example.prompt[-1:], example.completion[:1]
    apart = not before or not after or before.isspace() or after.isspace()
    return example.completion if apart else " " + example.completion


def _shared_start(texts: Sequence[str]) -> str:
    """Return the longest text that all of them begin with."""
    if not texts:
        return ""
    first, last = min(texts), max(texts)
    length = next((place for place, (one, two) in enumerate(zip(first, last, strict=False)) if one != two), len(first))
    return first[:length]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _answers(example: Conversation, place: str) -> list[int]:
    """Return the numbers of the messages to be learned."""
    turns = [
        number
        for number, message in enumerate(example.messages)
        if is_learned(message) and number >= example.first_learned
    ]
    if not turns:
        raise DataError(f"{place}: no message of the assistant to learn from (roles: {_roles(example)})")
    if turns[0] == 0:
        raise DataError(f"{place}: begins with the assistant's turn; put a user's or system's message before it")
    return turns


def _roles(example: Conversation) -> str:
    weighted = [
        f"{message['role']} of weight 0" if message.get("weight") == 0 else str(message["role"])
        for message in example.messages
    ]
    return ", ".join(weighted)
