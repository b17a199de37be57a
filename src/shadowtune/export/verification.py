"""Whether an exported file says what the model it was made from says."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from shadowtune.errors import ShadowtuneError
from shadowtune.export.runtimes import Runtime, TorchModel

TIE = 0.02
"""For formats that only round: sums in another order, or a cache in 16 bits as llama.cpp keeps it, may choose another
token where two are this close."""


@dataclass(frozen=True)
class Agreement:
    """Greedy tokens of two models, beside each other."""

    prompts: int
    tokens: int
    """Tokens that the reference chose, ends included."""
    equal: int
    """Of these, how many the other model chose at the same place after the same beginning of its own."""
    ties: int
    """Prompts that part where the reference finds both tokens equally likely; compared up to there."""
    found: list[list[int]] = field(repr=False)
    expected: list[list[int]] = field(repr=False)

    @property
    def share(self) -> float:
        """Equal tokens over all tokens."""
        return self.equal / max(self.tokens, 1)


def compare(
    other: Runtime,
    reference: TorchModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    ends: Collection[int],
    tie: float = 0.0,
) -> Agreement:
    """Let two models continue prompts greedily and count equal tokens; an answer's end counts as a token.

    With ``tie``, a prompt is compared up to where the reference finds both models' tokens equally likely, which is
    where their logits differ by no more than this share of all logits' standard deviation.
    """
    tokens = equal = ties = 0
    found, expected = [], []
    for prompt in prompts:
        ours = other.generate(prompt, max_new_tokens, ends)
        theirs = reference.generate(prompt, max_new_tokens, ends)
        found.append(ours)
        expected.append(theirs)
        pair = [_ended(ids, max_new_tokens) for ids in (ours, theirs)]
        pairs = list(zip(*pair, strict=False))
        parted = next((place for place, (one, two) in enumerate(pairs) if one != two), None)
        if (
            tie
            and parted is not None
            and _tied(reference.logits(prompt + theirs[:parted]), pairs[parted][0], ends, tie)
        ):
            ties += 1
            pair[1], pairs = pair[1][:parted], pairs[:parted]
        tokens += len(pair[1])
        equal += sum(one == two for one, two in pairs)
    return Agreement(len(prompts), tokens, equal, ties, found, expected)


def require_equal(agreement: Agreement, what: str) -> None:
    """Raise ShadowtuneError unless every token is equal."""
    if agreement.equal != agreement.tokens:
        raise ShadowtuneError(
            f"{what} chooses other tokens than the detached model: {agreement.equal} of {agreement.tokens} are "
            f"equal on {agreement.prompts} prompts; nothing is kept"
        )


def _ended(ids: list[int], limit: int) -> list[int | None]:
    return [*ids, None] if len(ids) < limit else [*ids]


def _tied(logits: np.ndarray, chosen: int | None, ends: Collection[int], tie: float) -> bool:
    """Whether the chosen token, None for an end, is as good as the likeliest."""
    candidate = logits[list(ends)].max() if chosen is None else logits[chosen]
    return bool(logits.max() - candidate <= tie * logits.std())
