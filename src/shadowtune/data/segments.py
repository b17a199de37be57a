"""Render an example as segments of text, each a prompt or a training target, and tokenize them.

The token ids of a prompt are the same alone and followed by its answer. In all functions ``where`` names the row in
error messages.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.data.examples import (
    ChatMessage,
    Completion,
    Conversation,
    Example,
    PlainText,
    is_target,
    shorten,
    user_message,
)
from shadowtune.errors import DataError, HiddenToolsError

PROBE = "Zq7probe"
"""A text that no chat template changes; its position in the output shows what a template puts around a message."""
CHUNK = 2048
"""Texts per tokenizer call: enough to use all cores, few enough to bound the memory of the result."""


@dataclass(frozen=True)
class Segment:
    """A piece of text that is a prompt or a training target."""

    text: str
    learned: bool
    """Whether it is an answer, a training target."""
    add_bos: bool = False
    """Whether the tokenizer's begin token, if it adds one, comes before it; chat templates write their own."""
    add_eos: bool = False
    """Whether the end-of-sequence token must follow, because no token of the text itself ends it."""
    template_prefix: str = field(default="", compare=False)
    """What the chat template puts before the content of an answer that has nothing but content."""


@dataclass
class TokenizedSegments:
    """One sequence as token ids.

    Attributes:
        ids: all tokens.
        labels: of the same length, -100 at tokens that are no targets.
        prompt_length: number of ids before the last answer; 0 if there is no prompt.
        ends: last token of each target segment, unless it was cut off.
        inside: the other tokens of target segments.
    """

    ids: list[int]
    labels: list[int]
    prompt_length: int
    ends: list[int] = field(default_factory=list)
    inside: set[int] = field(default_factory=set)

    def truncate(self, length: int, begin_token: int | None) -> None:
        """Cut to ``length`` tokens at the start of the prompt, keeping a begin token; without a prompt, at the end.

        Raises:
            DataError: if no token of the prompt would be left.
        """
        excess = len(self.ids) - length
        if self.prompt_length == 0:
            del self.ids[length:], self.labels[length:]
            self.ends = []
            return
        if excess >= self.prompt_length:
            answer = len(self.ids) - self.prompt_length
            raise DataError(f"the answer alone has {answer} tokens, which leaves no room for a prompt in {length}")
        first = 1 if self.ids[0] == begin_token and excess < self.prompt_length - 1 else 0
        del self.ids[first : first + excess], self.labels[first : first + excess]
        self.prompt_length -= excess


def has_template(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> bool:
    """Whether prompts go through the tokenizer's chat template: requested, and there is one."""
    return chat_template and tokenizer.chat_template is not None


class Renderer:
    """Renders examples with the chat template of a tokenizer, or as plain text.

    Args:
        tokenizer: has the chat template.
        chat_template: whether to use it. Without one, prompt and completion are joined by a space unless there is white
            space already; the space belongs to the completion, as tokens begin with their space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> None:
        self._tokenizer, self._templated = tokenizer, has_template(tokenizer, chat_template)
        self._verified: set[str] = set()  # roles whose text the template renders, and "tools"

    @cached_property
    def _end_texts(self) -> tuple[str, ...]:
        """Tokens that can end an answer: added ones, which no text contains by chance."""
        return tuple(sorted({*self._tokenizer.get_added_vocab(), self._tokenizer.eos_token or ""} - {""}))

    def sequences(self, example: Example, where: str) -> list[list[Segment]]:
        """Render the training sequences of an example: prompt, answer, prompt, answer, ...; or one plain text.

        A conversation is a single sequence if the chat template renders earlier turns as it did when they were the
        last. Otherwise every target turn becomes a sequence of its own, the last turn of the conversation up to it.

        Raises:
            DataError: if the template refuses the messages, omits a text, or its answers cannot be located.
        """
        if isinstance(example, PlainText):
            return [[Segment(example.text, learned=True, add_bos=True, add_eos=True)]]
        if isinstance(example, Conversation):
            if not self._templated:
                raise DataError(f"{where}: messages need a tokenizer with a chat template, and data.chat_template=true")
            return self._conversation(example, where)
        if self._templated:
            messages = [user_message(example.prompt), {"role": "assistant", "content": example.completion}]
            return self._conversation(Conversation(messages, 1, example.tools, example.template_kwargs), where)
        if example.tools:
            raise DataError(f"{where}: tools need a tokenizer with a chat template, and data.chat_template=true")
        prompt = Segment(example.prompt, learned=False, add_bos=True)
        return [[prompt, Segment(_spaced_completion(example), learned=True, add_eos=True)]]

    def prompt(self, example: Conversation, where: str) -> str:
        """Render a conversation up to where the assistant's answer begins; raises DataError as ``sequences``."""
        text = self._apply(example.messages, example, where, generation_prompt=True)
        self._check_rendered(example.messages, text, example, where)
        return text

    def _conversation(self, example: Conversation, where: str) -> list[list[Segment]]:
        """Locate each answer as what the template adds for it; messages after the last answer are dropped."""
        turns = _target_turns(example, where)
        messages = example.messages
        found = [self._turn(example, turn, where) for turn in turns]
        before, answer = found[-1]
        whole = before + answer.text
        self._check_rendered(messages[: turns[-1] + 1], whole, example, where)
        segments: list[Segment] = []
        position = 0
        for before, answer in found:
            if not (whole.startswith(before + answer.text) and position <= len(before)):
                return [[Segment(before, False), answer] for before, answer in found]
            segments += [Segment(whole[position : len(before)], False), answer]
            position = len(before) + len(answer.text)
        return [segments]

    def _turn(self, example: Conversation, turn: int, where: str) -> tuple[str, Segment]:
        """Return the text before an answer, and the answer, as the last turn of the conversation up to it."""
        earlier, message = example.messages[:turn], example.messages[turn]
        before = self._apply(earlier, example, where, generation_prompt=True)
        after = self._apply([*earlier, message], example, where)
        if not after.startswith(before):
            raise DataError(self._explain_mismatch(example, turn, before, after, where))
        probe = self._apply([*earlier, {"role": "assistant", "content": PROBE}], example, where)
        start, found, rest = probe.rpartition(PROBE)
        if not found:
            raise DataError(f"{where}: the chat template leaves out the assistant's text (message {turn + 1})")
        answer = after[len(before) :].rstrip()  # the line break after the end-of-turn token begins the next prompt
        content = message.get("content") or ""
        if _without_space(content) not in _without_space(answer):
            raise DataError(
                f"{where}: the chat template changes or leaves out part of the assistant's text (message {turn + 1}), "
                "which then cannot be learned; train prompts and completions with data.chat_template=false instead"
            )
        prefix = start[len(before) :] if start.startswith(before) else ""
        add_eos = not rest.rstrip().endswith(self._end_texts)
        return before, Segment(answer, True, add_eos=add_eos, template_prefix=prefix)

    def _explain_mismatch(self, example: Conversation, turn: int, before: str, after: str, where: str) -> str:
        """Explain why the rendered answer does not follow the generation prompt."""
        plain = self._apply(example.messages[:turn], example, where) if turn else ""
        hint = (
            "train prompts and completions with data.chat_template=false and a data.template, or change the chat "
            "template that is saved with the model"
        )
        if before.startswith(plain) and after.startswith(plain.rstrip()):
            opened = before[len(_common_prefix([before, after])) :]
            return (
                f"{where}: the chat template's generation prompt ends in {shorten(opened)}, which it leaves out of a "
                f"finished turn (message {turn + 1}), so no answer follows the prompt that the model would be given; "
                f"{hint}, so that both begin alike"
            )
        return (
            f"{where}: the chat template renders the messages before message {turn + 1} otherwise once that one is "
            f"there, so no answer follows the prompt that the model would be given; {hint}"
        )

    def _check_rendered(self, messages: Sequence[ChatMessage], text: str, example: Conversation, where: str) -> None:
        """Raise DataError if a text, a tool call or the tools are missing from the rendered text."""
        for number, message in enumerate(messages):
            self._check_content(messages, number, text, example, where)
            for call in message.get("tool_calls") or ():
                name = call.get("function", call)["name"]
                if name not in text:
                    raise HiddenToolsError(
                        f"{where}: the chat template leaves out the tool call {name!r} of message {number + 1}"
                    )
        if example.tools and "tools" not in self._verified:
            bare = Conversation(example.messages, template_kwargs=example.template_kwargs)
            if self._apply(messages, bare, where) == self._apply(messages, example, where):
                raise HiddenToolsError(f"{where}: the chat template does not show tools to the model; leave them out")
            self._verified.add("tools")

    def _check_content(
        self, messages: Sequence[ChatMessage], number: int, text: str, example: Conversation, where: str
    ) -> None:
        message = messages[number]
        content, role = message.get("content"), str(message["role"])
        if not isinstance(content, str) or not content.strip():
            return
        if role in self._verified and content.strip() in text:
            return
        probed = [*messages[:number], {**message, "content": PROBE}, *messages[number + 1 :]]
        if PROBE not in self._apply(probed, example, where):
            raise DataError(
                f"{where}: the chat template leaves out the text of message {number + 1} ({role}); it may "
                "know only messages of several parts"
            )
        self._verified.add(role)

    def _apply(
        self, messages: Sequence[ChatMessage], example: Conversation, where: str, generation_prompt: bool = False
    ) -> str:
        given: list[Any] = [{name: value for name, value in each.items() if name != "weight"} for each in messages]
        settings = {"tokenize": False, "add_generation_prompt": generation_prompt, **example.template_kwargs}
        try:
            return str(self._tokenizer.apply_chat_template(given, tools=example.tools, **settings))
        except (TemplateError, TypeError) as error:  # TypeError: the template concatenates text with another type
            reason = " ".join(str(error).split())
            raise DataError(f"{where}: the tokenizer's chat template refuses the messages: {reason}") from None


def render_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, chat_template: bool, example: Conversation | None = None
) -> Segment:
    """Render a prompt up to where the answer begins, as training does.

    Args:
        prompt: the text.
        tokenizer: has the chat template.
        chat_template: whether to use it.
        example: gives tools and other arguments of the chat template.
    """
    if not has_template(tokenizer, chat_template):
        return Segment(prompt, learned=False, add_bos=True)
    return render_messages([user_message(prompt)], tokenizer, example, "the prompt")


def render_messages(
    messages: Sequence[ChatMessage],
    tokenizer: PreTrainedTokenizerBase,
    extra: Conversation | None = None,
    where: str = "the conversation",
) -> Segment:
    """Render a conversation with the tokenizer's chat template, up to where the answer begins.

    Raises:
        DataError: if the template refuses the messages, or omits the text of one.
    """
    extra = extra or Conversation([])
    example = Conversation(messages, tools=extra.tools, template_kwargs=extra.template_kwargs)
    return Segment(Renderer(tokenizer, True).prompt(example, where), learned=False)


def shared_answer_prefix(sequences: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the text that the chat template puts at the start of every answer, and what follows before the content.

    The first belongs to the prompt. The second is empty unless answers hold more than content, such as reasoning: then
    they share less of the template's text, up to the end of a line or of an added token.
    """
    answers = [segment for segments in sequences for segment in segments if segment.learned]
    starts = {_common_prefix([segment.template_prefix, segment.text]) for segment in answers}
    whole = max((segment.template_prefix for segment in answers), key=len, default="")
    shared = _common_prefix(list(starts))
    if shared != whole:
        marks = ["\n", *tokenizer.get_added_vocab()]
        shared = shared[: max(shared.rfind(mark) + len(mark) if mark in shared else 0 for mark in marks)]
    prefix = shared.rstrip(" ") if shared.strip() else ""
    same = {segment.template_prefix for segment in answers} == {whole}
    return prefix, whole.removeprefix(prefix).strip() if same else ""


def move_prefix_to_prompt(segments: Sequence[Segment], prefix: str) -> list[Segment]:
    """Move a text from the start of every answer to the end of the prompt before it."""
    if not prefix:
        return list(segments)
    moved: list[Segment] = []
    for segment in segments:
        text = segment.text.removeprefix(prefix) if segment.learned else segment.text + prefix
        moved.append(Segment(text, segment.learned, segment.add_bos, segment.add_eos))
    return moved


def target_text(example: Example, where: str) -> str:
    """Return the reference answer: the completion, or the last target turn of the assistant.

    Raises:
        DataError: if the example is plain text, or has no such turn.
    """
    if isinstance(example, Completion):
        return example.completion
    if isinstance(example, PlainText):
        raise DataError(f"{where}: plain text has no answer to compare with; give prompt and completion, or messages")
    return str(example.messages[_target_turns(example, where)[-1]].get("content") or "")


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], add_special_tokens: bool = False
) -> Iterator[list[int]]:
    """Yield the token ids of each text."""
    remaining = iter(texts)
    while chunk := list(islice(remaining, CHUNK)):
        yield from tokenizer(chunk, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the begin token as a list if the tokenizer puts it before a text, otherwise an empty list."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


def tokenize_segments(
    tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[Segment]]
) -> Iterator[TokenizedSegments]:
    """Tokenize each segment in the context of those before it.

    The ids of a segment are what it adds to the ids of the text before it. Only where tokens would merge across the
    border is it tokenized alone, so that the ids before it never depend on what follows.

    Raises:
        DataError: if a segment needs an end-of-sequence token and the tokenizer has none.
    """
    starts = chain.from_iterable(accumulate(segment.text for segment in segments) for segments in sequences)
    start_ids = tokenize(tokenizer, starts)
    begin = begin_tokens(tokenizer)
    for segments in sequences:
        result = TokenizedSegments([], [], 0)
        ids: list[int] = []
        for segment in segments:
            extended = next(start_ids)
            merged = extended[: len(ids)] != ids
            fresh = next(tokenize(tokenizer, [segment.text])) if merged else extended[len(ids) :]
            fresh = [*fresh, _eos_token(tokenizer)] if segment.add_eos else fresh
            ids = ids + fresh
            before = begin if segment.add_bos else []
            if segment.learned and len(segments) > 1:
                result.prompt_length = len(result.ids) + len(before)
            if segment.learned and fresh:
                result.ends.append(fresh[-1])
                result.inside.update(fresh[:-1])
            result.ids += before + fresh
            result.labels += [IGNORE_INDEX] * len(before) + (fresh if segment.learned else [IGNORE_INDEX] * len(fresh))
        yield result


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set its eos_token")
    return tokenizer.eos_token_id


def _spaced_completion(example: Completion) -> str:
    before, after = example.prompt[-1:], example.completion[:1]
    apart = not before or not after or before.isspace() or after.isspace()
    return example.completion if apart else " " + example.completion


def _common_prefix(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    first, last = min(texts), max(texts)
    length = next((index for index, (one, two) in enumerate(zip(first, last, strict=False)) if one != two), len(first))
    return first[:length]


def _without_space(text: str) -> str:
    return "".join(text.split())


def _target_turns(example: Conversation, where: str) -> list[int]:
    """Return the indexes of the messages that are training targets."""
    turns = [
        number
        for number, message in enumerate(example.messages)
        if is_target(message) and number >= example.first_learned
    ]
    if not turns:
        raise DataError(f"{where}: no message of the assistant to learn from (roles: {_roles(example)})")
    if turns[0] == 0:
        raise DataError(f"{where}: begins with the assistant's turn; put a user's or system's message before it")
    return turns


def _roles(example: Conversation) -> str:
    weighted = [
        f"{message['role']} of weight 0" if message.get("weight") == 0 else str(message["role"])
        for message in example.messages
    ]
    return ", ".join(weighted)
