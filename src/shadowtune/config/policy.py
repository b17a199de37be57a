"""Who answers a request: the settings of a router, and what ``shadowtune calibrate`` measured for them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from shadowtune.config.checking import check_choices, check_range, from_mapping
from shadowtune.errors import ConfigError, ShadowtuneError

PolicyKind = Literal["always-edge", "always-cloud", "tag", "confidence", "verify"]
SignalName = Literal["logprob", "margin", "entropy", "first", "learned"]
TAG = "[REMOTE]"
HIGHEST_THRESHOLD = 1.000001
"""Thresholds lie below it; one above 1 hands everything over."""


@dataclass(frozen=True)
class Prices:
    """What the cloud costs, in units of what one of its tokens costs."""

    prompt: float = 1.0
    """A token that it reads."""
    completion: float = 1.0
    """A token that it writes."""
    request: float = 0.0
    """A request by itself."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(self, prompt=(0, None), completion=(0, None), request=(0, None))


@dataclass(frozen=True)
class Weights:
    """A logistic regression over the signals of an edge's answer; confidence is its probability."""

    bias: float
    logprob: float
    """Of the log-odds of the signal, as for the three below."""
    margin: float
    entropy: float
    first: float
    length: float
    """Of the logarithm of the answer's tokens plus one."""


@dataclass(frozen=True)
class CurvePoint:
    """What a threshold came to on held-out requests."""

    threshold: float
    accuracy: float
    """Mean score, of edge and cloud together."""
    hand_over_rate: float
    """Share of the requests that the cloud answered."""
    cost: float
    """Mean of a request, in units of ``Prices``."""


@dataclass(frozen=True)
class PolicyConfig:
    """When the edge's answer goes out, and when the cloud is asked."""

    kind: PolicyKind = "confidence"
    """Fixed are "always-edge" and "always-cloud". "tag" hands over what the edge answers with ``tag``; "confidence"
    that and what the edge is unsure of; "verify" lets the cloud check every answer of the edge in one pass."""
    threshold: float = 0.5
    """Of "confidence": an answer less confident than this is handed over. From 0 to 1."""
    signal: SignalName = "logprob"
    """What confidence is, of the answer's tokens with the one that ends it: "logprob" their geometric mean
    probability, "margin" the smallest distance of the two likeliest, "entropy" 1 less their mean entropy over its
    largest value, "first" the probability of the first, "learned" what ``weights`` make of all four."""
    tag: str | None = TAG
    """The answer with which an edge that was trained to do so hands over; None if there is none."""
    weights: Weights | None = None
    """Of signal "learned"."""
    prices: Prices = field(default_factory=Prices)
    curve: tuple[CurvePoint, ...] = ()
    """What every threshold came to, as ``shadowtune calibrate`` measured it, by rising threshold."""

    def __post_init__(self) -> None:
        """Check ranges, words, and what needs one another."""
        check_choices(self, kind=get_args(PolicyKind), signal=get_args(SignalName))
        check_range(self, threshold=(0, HIGHEST_THRESHOLD))
        if self.signal == "learned" and self.weights is None:
            raise ConfigError("signal learned needs its weights; take the policy.json of shadowtune calibrate")
        if self.kind == "tag" and not self.tag:
            raise ConfigError(f"kind tag needs a tag, such as {TAG}")

    def save(self, file: Path) -> None:
        """Write the policy as JSON."""
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> "PolicyConfig":
        """Read what ``save`` wrote, or a part of it written by hand.

        Raises:
            ConfigError: naming the file and what is wrong with it.
        """
        try:
            return from_mapping(cls, json.loads(file.read_text(encoding="utf-8")), where="")
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from None
        except (ValueError, RecursionError, ShadowtuneError) as error:
            raise ConfigError(f"{file}: {' '.join(str(error).split())}; write it with shadowtune calibrate") from None
