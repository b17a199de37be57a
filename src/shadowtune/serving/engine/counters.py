"""What an engine has done, for whoever shows it."""

from dataclasses import dataclass, field

from shadowtune.model.speculation.counts import Counts


@dataclass
class Counters:
    """Numbers of an engine; all but the first two only grow. Read them at any time."""

    running: int = 0
    """Requests that are answered now."""
    waiting: int = 0
    """Requests that wait for a row."""
    finished: int = 0
    """Answers that came to their end."""
    cancelled: int = 0
    """Answers that nobody wanted any more."""
    failed: int = 0
    """Answers that an error ended."""
    prompt_tokens: int = 0
    """Tokens of prompts read."""
    completion_tokens: int = 0
    """Tokens said; over the seconds between two looks, tokens per second."""
    passes: int = 0
    """Passes of the base."""
    drafts: Counts = field(default_factory=Counts)
    """Drafts of the shadows and what became of them."""
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gave, of all its rows; 0 if there was none."""
        return self.completion_tokens / self.passes if self.passes else 0.0

    def numbers(self) -> dict[str, float]:
        """All of them by name, with ``tokens_per_pass`` and the drafts that were looked at and stood."""
        own = {name: float(value) for name, value in vars(self).items() if name != "drafts"}
        drafts = {"judged_draft_tokens": sum(self.drafts.judged), "accepted_draft_tokens": sum(self.drafts.stood)}
        return {**own, **drafts, "tokens_per_pass": self.tokens_per_pass}
