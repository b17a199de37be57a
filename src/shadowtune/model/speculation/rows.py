"""The rows of a call while they grow by different lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class Rows:
    """What each row says, and where its next token goes.

    Args:
        prompts: (B, n) tokens of the prompts, padded on the left.
        positions: (B,) position of each row's next token.
        slots: slots of the cache that the prompts take.
        attention_mask: (B, slots), or None if each row attends to all of them.
        criteria: when a row ends.
        room: tokens that a row may have at most.
        pad: token behind the end of a row.
    """

    def __init__(
        self,
        prompts: Tensor,
        positions: Tensor,
        slots: int,
        attention_mask: Tensor | None,
        criteria: StoppingCriteriaList,
        room: int,
        pad: int,
    ) -> None:
        count, length = prompts.shape
        self.tokens = prompts.new_full((count, max(room, length) + 1), pad)
        self.tokens[:, :length] = prompts
        self.lengths = [length] * count
        self.done = [False] * count
        self.positions = positions
        self.slots = slots
        self.attention_mask = attention_mask
        self.room, self._pad = room, pad
        ends = [each.eos_token_id for each in criteria if isinstance(each, EosTokenCriteria)]
        self._ends = {int(token) for tokens in ends for token in tokens}
        self._others = [each for each in criteria if not isinstance(each, EosTokenCriteria | MaxLengthCriteria)]

    @property
    def running(self) -> list[int]:
        """Indices of the rows that have not ended."""
        return [row for row, done in enumerate(self.done) if not done]

    @property
    def left(self) -> int:
        """Tokens that the row with most room may still say."""
        return max(self.room - self.lengths[row] for row in self.running)

    def last(self) -> Tensor:
        """Return the last token of each row, (B, 1): said, but in no network yet; padding where the row has ended."""
        ends = torch.tensor([[length - 1] for length in self.lengths], device=self.tokens.device)
        return self.pad_ended(self.tokens.gather(1, ends)[:, 0])[:, None]

    def texts(self) -> list[list[int]]:
        """Return the tokens of each row, its padding in front included."""
        return [self.tokens[row, :length].tolist() for row, length in enumerate(self.lengths)]

    def pad_ended(self, tokens: Tensor) -> Tensor:
        """Put padding into (B,) tokens where a row has ended."""
        if not any(self.done):
            return tokens
        return tokens.masked_fill(torch.tensor(self.done, device=tokens.device), self._pad)

    def mask(self, new: int) -> Tensor | None:
        """Return the attention mask over the cache's slots and so many new ones of each row."""
        if self.attention_mask is None:
            return None
        ones = self.attention_mask.new_ones(len(self.lengths), new)
        return torch.cat([self.attention_mask, ones], 1)

    def next_positions(self, first: int, new: int) -> Tensor:
        """Return the positions (B, new) of new tokens, the first of them ``first`` after the last said one."""
        return self.positions[:, None] + torch.arange(first, first + new, device=self.positions.device)

    def say(self, row: int, tokens: Sequence[int]) -> int:
        """Append tokens to a row until one ends it; return how many were."""
        for count, token in enumerate(tokens, 1):
            self.tokens[row, self.lengths[row]] = token
            self.lengths[row] += 1
            if token in self._ends or self.lengths[row] >= self.room or self._stopped(row):
                self.done[row] = True
                self.tokens[row, self.lengths[row] :] = self._pad
                return count
        return len(tokens)

    def settle(self, kept: Sequence[int], slots: int) -> None:
        """Count ``slots`` more of the cache as used, of which each row attends to the first ``kept``."""
        counts = torch.tensor(kept, device=self.positions.device)
        if self.attention_mask is None and any(count < slots for count in kept):
            self.attention_mask = counts.new_ones(len(kept), self.slots)
        if self.attention_mask is not None:
            held = torch.arange(slots, device=counts.device) < counts[:, None]
            self.attention_mask = torch.cat([self.attention_mask, held.to(self.attention_mask.dtype)], 1)
        self.positions = self.positions + counts
        self.slots += slots

    def output(self) -> Tensor:
        """Return everything said, (B, longest), padded behind."""
        return self.tokens[:, : max(self.lengths)]

    def _stopped(self, row: int) -> bool:
        said = self.tokens[row : row + 1, : self.lengths[row]]
        return any(bool(criterion(said, None)) for criterion in self._others)
