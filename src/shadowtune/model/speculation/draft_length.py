"""The draft length: tokens are drafted while the next one is expected to save more time than it costs.

A token costs a drafting step and makes the verifying pass a little longer; it saves the time of a token if it and all
before it are accepted. Acceptance is counted by the drafter's confidence, so an overconfident drafter is corrected, and
one whose drafts are never accepted drafts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LEVELS = 10
"""Levels of confidence that are counted separately."""
BELIEF = 4.0
"""Number of observations that the drafter's own confidence counts for (a prior)."""
PAUSES = (8, 64)
"""Passes without drafting once no draft was accepted: the first pause, and the longest; each is twice the last."""

PROCESSOR = ((1, 1.0), (2, 1.09), (4, 1.14), (8, 1.24), (16, 1.42), (32, 1.75), (64, 2.47), (128, 4.74))
"""Tokens in a pass and its time on a processor, in units of a pass over one: SmolLM2-135M, float32, two cores."""
DEVICE = ((1, 1.0), (64, 1.2))
"""The same on an accelerator, which reads the weights once for all of them."""


@dataclass(frozen=True)
class Costs:
    """Times in units of a pass over one token per sequence; constants, so that a seed always gives the same samples."""

    draft: float = 0.05
    """A drafting step."""
    table: tuple[tuple[int, float], ...] = DEVICE
    """Tokens in a pass, and its time; interpolated and extrapolated linearly."""
    batch: int = 1
    """Sequences in the batch."""

    @classmethod
    def of(cls, device_type: str, share: float, batch: int) -> "Costs":
        """Return the expected costs on a device.

        Args:
            device_type: "cpu", "cuda", ...
            share: weights that a drafting step reads, relative to a pass.
            batch: sequences in the batch.
        """
        return cls(share, PROCESSOR if device_type == "cpu" else DEVICE, batch)

    def pass_time(self, tokens: int) -> float:
        """Return the time of a pass over so many tokens of each sequence."""
        return self._time(tokens * self.batch) / self._time(self.batch)

    def _time(self, tokens: int) -> float:
        index = next((index for index in range(1, len(self.table)) if tokens <= self.table[index][0]), -1)
        (x, low), (end, high) = self.table[index - 1], self.table[index]
        return low + (high - low) * (tokens - x) / (end - x)


@dataclass
class DraftLength:
    """Decides on the draft length from the acceptance so far; deterministic given the tokens."""

    costs: Costs
    longest: int
    """Most tokens at once."""
    fixed: bool = False
    """Whether to always draft the most tokens."""
    branches: int = 1
    """Tokens that are verified for each drafted one, itself included."""
    accepted: list[float] = field(default_factory=lambda: [0.0] * LEVELS)
    """Accepted drafts by level of confidence."""
    verified: list[float] = field(default_factory=lambda: [0.0] * LEVELS)
    """Verified drafts by level of confidence."""
    tokens: float = 1.0
    """Emitted tokens per sequence, decaying."""
    time: float = 1.0
    """The time they took, decaying."""
    idle: int = 0
    """Passes left without drafting."""
    pause: int = PAUSES[0]
    """Length of the next pause."""
    failures: int = 0
    """Passes in a row in which no draft was accepted."""

    def begin(self, room: int) -> int:
        """Return how many tokens may be drafted before the next pass, at most ``room``."""
        if self.fixed:
            return min(self.longest, room)
        if self.idle > 0:
            self.idle -= 1
            return 0
        return min(self.longest, room)

    def chance(self, confidence: Tensor) -> Tensor:
        """Return the expected acceptance (B,) of drafts with such confidence (B,)."""
        pairs = zip(_levels(confidence), confidence.tolist(), strict=True)
        return torch.tensor(
            [(self.accepted[level] + BELIEF * prior) / (self.verified[level] + BELIEF) for level, prior in pairs]
        )

    def worth(self, drafted: int, chances: Tensor, survival: Tensor) -> bool:
        """Return whether to verify one more token than the ``drafted`` ones.

        Args:
            drafted: tokens drafted so far.
            chances: (B,) probability that the next one is accepted, if all before it are.
            survival: (B,) probability that all before it are accepted.
        """
        if self.fixed:
            return True
        rate, gain, reach = self.time / self.tokens, 0.0, survival
        for ahead in range(drafted + 1, self.longest + 1):  # later tokens may pay for this one
            reach = reach * chances
            gain += rate * float(reach.mean())
            longer = self._pass_time(ahead) - self._pass_time(drafted)
            cost = longer + self.costs.draft * (ahead - drafted)
            if gain > cost:
                return True
        return False

    def learn(self, confidences: Sequence[Tensor], accepted: Sequence[int], emitted: float, attempts: int) -> None:
        """Update the counts after a verifying pass.

        Args:
            confidences: of each drafted token, (B,), for the running sequences.
            accepted: number of accepted drafts of each sequence.
            emitted: tokens that a sequence got, on average.
            attempts: calls of the drafter, those without a drafted token included.
        """
        for index, confidence in enumerate(confidences):
            for level, count in zip(_levels(confidence), accepted, strict=True):
                if count >= index:  # drafts after a rejected one were not verified
                    self.verified[level] += 1
                    self.accepted[level] += count > index
        self.tokens = 0.9 * self.tokens + emitted
        self.time = 0.9 * self.time + self._pass_time(len(confidences)) + self.costs.draft * attempts
        if not attempts:
            return
        self.failures = 0 if any(accepted) else self.failures + 1
        if self.failures == 0:
            self.pause = PAUSES[0]
        elif self.failures >= 4:
            self.idle, self.failures = self.pause, 3
            self.pause = min(2 * self.pause, PAUSES[1])

    def _pass_time(self, drafted: int) -> float:
        """Return the time of a pass that verifies so many drafted tokens, and their alternatives."""
        return self.costs.pass_time(1 + drafted * self.branches)


def _levels(confidence: Tensor) -> list[int]:
    return [min(int(value * LEVELS), LEVELS - 1) for value in confidence.tolist()]
