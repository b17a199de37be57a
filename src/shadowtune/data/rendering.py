"""From what a row says to the pieces of text a model reads, each learned or only read."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shadowtune.data.prompts import Completion, Conversation, Example, Message, Text
from shadowtune.errors import DataError


@dataclass(frozen=True)
class Piece:
    """A stretch of text."""

    text: str
    learned: bool
    """Whether it is an answer, which the model is to give, or a prompt."""
    opens: bool = False
    """Whether the tokenizer's begin token, if it adds one, stands before it; chat templates write their own."""
    closes: bool = False
    """Whether the end-of-sequence token must follow, because the text itself does not tell where it ends."""


def has_template(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> bool:
    """Say whether prompts go through the tokenizer's chat template: it was asked for, and there is one."""
    return chat_template and tokenizer.chat_template is not None


def render(example: Example, tokenizer: PreTrainedTokenizerBase, chat_template: bool, place: str) -> list[Piece]:
    """Cut an example into pieces: prompt, answer, prompt, answer, ..., the last one an answer; or one plain text.

    Args:
        example: what the row says.
        tokenizer: gives the chat template.
        chat_template: whether to use it. Without one a prompt and its completion are joined by a space, unless
            there is white space already; it belongs to the completion, as tokens begin with their space.
        place: names the row in errors.

    Raises:
        DataError: if the template refuses the messages, or no answer can be told apart.
    """
    if isinstance(example, Text):
        return [Piece(example.text, learned=True, opens=True, closes=True)]
    templated = has_template(tokenizer, chat_template)
    if isinstance(example, Conversation):
        if not templated:
            raise DataError(f"{place}: messages need a tokenizer with a chat template, and data.chat_template=true")
        return _render_conversation(example, tokenizer, place)
    if templated:
        answer = {"role": "assistant", "content": example.completion}
        return _render_conversation(Conversation([_asked(example.prompt), answer], 1), tokenizer, place)
    return [render_prompt(example.prompt, tokenizer, False), Piece(_joined(example), learned=True, closes=True)]


def render_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> Piece:
    """Return what a model reads before it answers: the first piece that ``render`` makes of prompt and completion."""
    if has_template(tokenizer, chat_template):
        return Piece(_apply(tokenizer, [_asked(prompt)], "the prompt", awaiting=True), learned=False)
    return Piece(prompt, learned=False, opens=True)


def render_messages(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Piece:
    """Return what a model reads of a whole conversation before it answers, by the tokenizer's chat template.

    Raises:
        DataError: if the template refuses the messages.
    """
    return Piece(_apply(tokenizer, messages, "the conversation", awaiting=True), learned=False)


def target_of(example: Example, place: str) -> str:
    """Return the true answer as text: the completion, or the assistant's last turn.

    Raises:
        DataError: if the example is plain text, or no turn is the assistant's.
    """
    if isinstance(example, Completion):
        return example.completion
    if isinstance(example, Text):
        raise DataError(f"{place}: plain text has no answer to compare with; give prompt and completion, or messages")
    return str(example.messages[_answers(example, place)[-1]]["content"])


def _asked(prompt: str) -> Message:
    return {"role": "user", "content": prompt}


def _joined(example: Completion) -> str:
    before, after = example.prompt[-1:], example.completion[:1]
    apart = not before or not after or before.isspace() or after.isspace()
    return example.completion if apart else " " + example.completion


def _answers(example: Conversation, place: str) -> list[int]:
    """Return the numbers of the messages to be learned."""
    turns = [
        number
        for number, message in enumerate(example.messages)
        if message["role"] == "assistant" and number >= example.first_learned
    ]
    if not turns:
        raise DataError(f"{place}: no message of the assistant to learn from (roles: {_roles(example)})")
    if turns[0] == 0:
        raise DataError(f"{place}: begins with the assistant's turn; put a user's or system's message before it")
    return turns


def _render_conversation(example: Conversation, tokenizer: PreTrainedTokenizerBase, place: str) -> list[Piece]:
    """Find each answer as what the template adds for it; messages after the last answer are left out."""
    turns = _answers(example, place)
    messages = example.messages[: turns[-1] + 1]
    whole = _apply(tokenizer, messages, place)
    pieces: list[Piece] = []
    position = 0
    for turn in turns:
        before = _apply(tokenizer, messages[:turn], place, awaiting=True)
        after = whole if turn == turns[-1] else _apply(tokenizer, messages[: turn + 1], place)
        if not (whole.startswith(before) and whole.startswith(after) and position <= len(before) < len(after)):
            raise DataError(
                f"{place}: the chat template writes earlier turns anew when message {turn + 1} is added, so answers "
                "cannot be told apart; put each of the assistant's turns into a row of its own"
            )
        answer = after[len(before) :].rstrip()  # the line break after the end-of-turn token begins the next prompt
        unended = _is_unended(answer, messages[turn]["content"].strip())
        pieces += [Piece(whole[position : len(before)], False), Piece(answer, True, closes=unended)]
        position = len(before) + len(answer)
    return pieces


def _is_unended(answer: str, content: str) -> bool:
    """Say whether a template added nothing after an answer's content."""
    start = answer.find(content)
    return start >= 0 and start + len(content) == len(answer)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: str, awaiting: bool = False) -> str:
    """Render messages as text; ``awaiting`` adds what comes before the assistant's answer."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=awaiting))  # type: ignore[arg-type]
    except TemplateError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{place}: the tokenizer's chat template refuses the messages: {reason}") from None


def _roles(example: Conversation) -> str:
    return ", ".join(str(message["role"]) for message in example.messages)
