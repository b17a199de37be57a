"""From pieces of text to token ids, such that a prompt has the same ids alone and with its answer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from transformers import PreTrainedTokenizerBase

from shadowtune.core.head import IGNORE_INDEX
from shadowtune.data.rendering import Piece
from shadowtune.errors import DataError

CHUNK = 2048
"""Texts tokenized in one go: enough to use all cores, few enough to bound the memory of what the tokenizer returns."""


@dataclass
class TokenizedPieces:
    """One example as token ids.

    Attributes:
        ids: all tokens.
        labels: of the same length, -100 where nothing is learned.
        prompt_length: how many ids come before the last answer; 0 if there is no prompt.
        ends: the token that ends each learned piece; not that of a text whose end was cut off.
        inside: the other tokens of learned pieces.
    """

    ids: list[int]
    labels: list[int]
    prompt_length: int
    ends: list[int] = field(default_factory=list)
    inside: set[int] = field(default_factory=set)

    def truncate(self, length: int, begin_token: int | None) -> None:
        """Cut to so many tokens: the start of the prompt, less a begin token; if there is no prompt, the end.

        Raises:
            DataError: if not one token of the prompt would be left.
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


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], add_special_tokens: bool = False
) -> Iterator[list[int]]:
    """Yield the token ids of each text."""
    remaining = iter(texts)
    while chunk := list(islice(remaining, CHUNK)):
        yield from tokenizer(chunk, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text: its begin token, or nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


def tokenize_pieces(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Sequence[Piece]]
) -> Iterator[TokenizedPieces]:
    """Tokenize examples piece by piece, each piece in the context of those before it.

    A piece's ids are what it adds to the ids of the text before it. Only where tokens would merge over the border is
    it tokenized alone, so that the ids of what comes before never depend on what follows.

    Raises:
        DataError: if a piece needs an end-of-sequence token and the tokenizer has none.
    """
    starts = chain.from_iterable(_starts(pieces) for pieces in examples)
    start_ids = tokenize(tokenizer, starts)
    begin = begin_tokens(tokenizer)
    for pieces in examples:
        result = TokenizedPieces([], [], 0)
        ids: list[int] = []
        for piece in pieces:
            extended = next(start_ids)
            merged = extended[: len(ids)] != ids
            fresh = next(tokenize(tokenizer, [piece.text])) if merged else extended[len(ids) :]
            fresh = [*fresh, _end_token(tokenizer)] if piece.closes else fresh
            ids = ids + fresh
            before = begin if piece.opens else []
            if piece.learned and len(pieces) > 1:
                result.prompt_length = len(result.ids) + len(before)
            if piece.learned and fresh:
                result.ends.append(fresh[-1])
                result.inside.update(fresh[:-1])
            result.ids += before + fresh
            result.labels += [IGNORE_INDEX] * len(before) + (fresh if piece.learned else [IGNORE_INDEX] * len(fresh))
        yield result


def _starts(pieces: Sequence[Piece]) -> Iterator[str]:
    """Yield the text up to the end of each piece."""
    text = ""
    for piece in pieces:
        text += piece.text
        yield text


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set its eos_token")
    return tokenizer.eos_token_id
