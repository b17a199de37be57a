"""How an attached model decodes faster than token by token: its shadow drafts, one pass of both verifies."""

from dataclasses import dataclass
from typing import Literal, get_args

from shadowtune.config.checking import check_choices, check_range
from shadowtune.errors import ConfigError

DrafterName = Literal["shadow", "feedback", "ngram", "combined"]


@dataclass(frozen=True)
class SpeculationConfig:
    """Settings of ``generate(speculate=...)``. None of them changes what greedy decoding says, or how samples fall."""

    length: int | None = None
    """Tokens drafted before each verification; None chooses from what was accepted so far, 0 included."""
    drafter: DrafterName = "combined"
    """Who drafts. "shadow": the detached shadow. "feedback": the shadow and what the attached model knew one token
    earlier, if it was trained with ``draft_rank``. "ngram": what followed the same tokens earlier in the text.
    "combined": ngram where it is surer than feedback, if that was trained, or else than the shadow."""
    max_length: int = 8
    """Most tokens drafted where the length is chosen."""
    draft_vocabulary: bool = True
    """Whether the shadow drafts only tokens that are frequent in its training data, if it was saved with them."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, length=(1, 65), max_length=(1, 65))
        check_choices(self, drafter=get_args(DrafterName))

    @property
    def longest(self) -> int:
        """Most tokens drafted at once."""
        return self.max_length if self.length is None else self.length

    @classmethod
    def of(cls, speculate: "bool | int | str | SpeculationConfig") -> "SpeculationConfig | None":
        """Understand the ways to ask: True or "auto", a number of tokens, settings; None for False and 0.

        Raises:
            ConfigError: if it is none of these.
        """
        if isinstance(speculate, SpeculationConfig):
            return speculate
        if speculate is True or speculate == "auto":
            return cls()
        if speculate is False or speculate == 0:
            return None
        if isinstance(speculate, int):
            return cls(length=speculate)
        raise ConfigError(f'speculate must be True, False, "auto" or a number of tokens, got {speculate!r}')
