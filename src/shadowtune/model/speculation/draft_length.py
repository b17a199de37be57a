"""How many tokens to draft: as long as the next one is expected to save more time than it costs.

A token costs a drafting step and makes the verifying pass a little longer; it saves the time of a token if it and all
before it stand. How often drafts stand is counted by how sure the drafter was of them, so a drafter that overestimates
itself is believed less and less, and one that never hits drafts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LEVELS = 10
"""Levels of confidence that are counted apart."""
BELIEF = 4.0
"""Observations that a drafter's own confidence counts for."""
PAUSES = (8, 64)
"""Passes without a look at the drafter once it is of no use: at first, and at most; each pause is twice as long."""

PROCESSOR = ((1, 1.0), (2, 1.09), (4, 1.14), (8, 1.24), (16, 1.42), (32, 1.75), (64, 2.47), (128, 4.74))
"""Tokens in a pass and its time on a processor, in units of a pass over one: SmolLM2-135M, float32, two cores."""
DEVICE = ((1, 1.0), (64, 1.2))
"""The same on an accelerator, which reads the weights once for all of them."""


@dataclass(frozen=True)
class Costs:
    """Times in units of a pass over one token of each row; fixed, so that the same seed gives the same samples."""

    draft: float = 0.05
    """A drafting step."""
    table: tuple[tuple[int, float], ...] = DEVICE
    """Tokens in a pass, and its time: straight lines between, and beyond."""
    rows: int = 1
    """Rows in the batch."""

    @classmethod
    def of(cls, device_type: str, share: float, rows: int) -> "Costs":
        """Return what to expect of a device.

        Args:
            device_type: "cpu", "cuda", ...
            share: weights that a drafting step reads, relative to a pass.
            rows: of the batch.
        """
        return cls(share, PROCESSOR if device_type == "cpu" else DEVICE, rows)

    def passing(self, tokens: int) -> float:
        """Return the time of a pass over so many tokens of each row."""
        return self._time(tokens * self.rows) / self._time(self.rows)

    def _time(self, tokens: int) -> float:
        place = next((index for index in range(1, len(self.table)) if tokens <= self.table[index][0]), -1)
        (x, low), (end, high) = self.table[place - 1], self.table[place]
        return low + (high - low) * (tokens - x) / (end - x)


@dataclass
class DraftLength:
    """Decides from what it has seen in this call; the same tokens always give the same decisions."""

    costs: Costs
    longest: int
    """Most tokens at once."""
    fixed: bool = False
    """Whether to draft the most tokens always."""
    stood: list[float] = field(default_factory=lambda: [0.0] * LEVELS)
    judged: list[float] = field(default_factory=lambda: [0.0] * LEVELS)
    tokens: float = 1.0
    """Tokens said, and ..."""
    time: float = 1.0
    """... the time they took, both fading."""
    idle: int = 0
    """Passes left without a look at the drafter."""
    pause: int = PAUSES[0]
    fruitless: int = 0
    """Passes in a row in which no draft stood."""

    def begin(self, room: int) -> int:
        """Return how many tokens may be drafted before the next pass, of at most ``room``."""
        if self.fixed:
            return min(self.longest, room)
        if self.idle > 0:
            self.idle -= 1
            return 0
        return min(self.longest, room)

    def chance(self, confidence: Tensor) -> Tensor:
        """Return how often drafts of such confidence (B,) stand, (B,)."""
        levels = _levels(confidence)
        stood = [self.stood[level] + BELIEF * sure for level, sure in zip(levels, confidence.tolist(), strict=True)]
        return torch.tensor([s / (self.judged[level] + BELIEF) for s, level in zip(stood, levels, strict=True)])

    def worth(self, drafted: int, chances: Tensor, standing: Tensor) -> bool:
        """Whether to verify one more token than the ``drafted`` ones.

        Args:
            drafted: tokens drafted so far.
            chances: (B,) of the next one, if all before it stand.
            standing: (B,) that all before it stand.
        """
        if self.fixed:
            return True
        rate, gain, reach = self.time / self.tokens, 0.0, standing
        for ahead in range(drafted + 1, self.longest + 1):  # what follows may pay for a step that does not by itself
            reach = reach * chances
            gain += rate * float(reach.mean())
            longer = self.costs.passing(ahead + 1) - self.costs.passing(drafted + 1)
            cost = longer + self.costs.draft * (ahead - drafted)
            if gain > cost:
                return True
        return False

    def learn(self, confidences: Sequence[Tensor], accepted: Sequence[int], said: float, drafted: int) -> None:
        """Take in a verified round.

        Args:
            confidences: of each drafted token, (B,), rows that still ran.
            accepted: how many drafts of each row stood.
            said: tokens that a row got, on average.
            drafted: tokens drafted, looked at and thrown away ones included.
        """
        for index, confidence in enumerate(confidences):
            for level, count in zip(_levels(confidence), accepted, strict=True):
                if count >= index:  # a draft behind a wrong one was never judged
                    self.judged[level] += 1
                    self.stood[level] += count > index
        self.tokens = 0.9 * self.tokens + said
        self.time = 0.9 * self.time + self.costs.passing(len(confidences) + 1) + self.costs.draft * drafted
        if not drafted:
            return
        self.fruitless = 0 if any(accepted) else self.fruitless + 1
        if self.fruitless == 0:
            self.pause = PAUSES[0]
        elif self.fruitless >= 4:
            self.idle, self.fruitless = self.pause, 3
            self.pause = min(2 * self.pause, PAUSES[1])


def _levels(confidence: Tensor) -> list[int]:
    return [min(int(sure * LEVELS), LEVELS - 1) for sure in confidence.tolist()]
