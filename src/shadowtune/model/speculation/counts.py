"""What came of the drafts."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Sums over passes, of each row by itself: a pass over a batch of three is three passes here."""

    passes: int = 0
    """Verifying passes; those over prompts are not counted."""
    said: int = 0
    """Tokens that came of them."""
    judged: list[int] = field(default_factory=list)
    """By place in the draft, 0 the first: drafts that were looked at, those before them having stood."""
    stood: list[int] = field(default_factory=list)
    """By place: how many of them stood."""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gave, 1 without drafts; 0 if there was none."""
        return self.said / self.passes if self.passes else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By place: the share of the drafts looked at that stood."""
        return [stood / judged for stood, judged in zip(self.stood, self.judged, strict=True) if judged]

    def add(self, drafted: int, accepted: Sequence[int], said: Sequence[int]) -> None:
        """Count a pass.

        Args:
            drafted: tokens drafted for each row.
            accepted: of the rows that ran, how many drafts stood.
            said: of these rows, how many tokens they got.
        """
        self.passes += len(accepted)
        self.said += sum(said)
        for places in (self.judged, self.stood):
            places.extend([0] * (drafted - len(places)))
        for place in range(drafted):
            self.judged[place] += sum(count >= place for count in accepted)
            self.stood[place] += sum(count > place for count in accepted)
