r"""A drift alarm: does the cloud correct the edge more often than when the policy was calibrated?

Each request gives one outcome: 1 if it was deferred and the cloud's answer was another text, else 0. Requests unlike
those of calibration are deferred and corrected more often, and so are all deferred ones once the cloud runs another
model. The null hypothesis is a rate of at most p; against an alternative q > p the likelihood ratio of an outcome x is

    L(x) = (q / p)^x ((1 - q) / (1 - p))^(1 - x),          M_n = (1 + M_(n-1)) L(x_n),   M_0 = 0.

M is the Shiryaev-Roberts statistic, averaged over several q (an e-detector: Shin, Ramdas and Rinaldo, 2022,
https://arxiv.org/abs/2203.03532). Under the null hypothesis M_n - n is a supermartingale, so that the expected number
of requests until M reaches A is at least A, and false alarms come at most once in A requests on average. p is an upper
confidence bound of the rate in calibration.
"""

import logging
import math
from collections import deque
from dataclasses import dataclass

from shadowtune.config.serving import DriftConfig, PolicyConfig
from shadowtune.serving.edge.risk import rate_bound

LOGGER = logging.getLogger(__name__)
RATIOS = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Alternatives: q = p + ratio (1 - p)."""
LOWEST_RATE = 1e-3
"""Least p: a rate of 0 could be exceeded by a single outcome."""


@dataclass(frozen=True)
class DriftBaseline:
    """The rate of corrections that is expected."""

    rate: float
    bound: float
    """Its upper confidence bound, p."""
    requests: int
    """Requests that it was measured on."""
    calibrated: bool
    """Whether calibration measured it, else the first requests after the start."""


@dataclass(frozen=True)
class DriftStatus:
    """The state of the alarm, for metrics and the page."""

    expected: float | None
    """Rate of corrections; None while the first requests measure it."""
    bound: float | None
    rate: float
    """Rate in the last requests."""
    requests: int
    """Number of these."""
    evidence: float
    """M / A; an alarm is raised at 1."""
    alarms: int
    alarmed: bool
    """Whether there was an alarm since the start or the last change of the threshold."""


class DriftDetector:
    """The Shiryaev-Roberts statistic of Bernoulli outcomes against a rise of their rate.

    Args:
        rate: p, between 0 and 1.
        interval: A, expected requests between two false alarms.
    """

    def __init__(self, rate: float, interval: float) -> None:
        p = min(max(rate, LOWEST_RATE), 1 - 1e-6)
        alternatives = [p + ratio * (1 - p) for ratio in RATIOS]
        self._factors = [((1 - q) / (1 - p), q / p) for q in alternatives]
        self._interval = interval
        self._statistics = [0.0] * len(RATIOS)

    @property
    def evidence(self) -> float:
        """M / A."""
        return math.fsum(self._statistics) / len(self._statistics) / self._interval

    def update(self, outcome: bool) -> bool:
        """Add an outcome; return whether an alarm is due, after which the statistic starts anew."""
        self._statistics = [
            (1 + value) * factors[outcome] for value, factors in zip(self._statistics, self._factors, strict=True)
        ]
        if self.evidence < 1:
            return False
        self._statistics = [0.0] * len(RATIOS)
        return True


class DriftMonitor:
    """Watches the outcomes of a router's requests.

    Args:
        policy: with the calibrated rates of its thresholds; without them the first requests give the rate.
    """

    def __init__(self, policy: PolicyConfig) -> None:
        self.alarms = 0
        self.set_policy(policy)

    def set_policy(self, policy: PolicyConfig) -> None:
        """Start anew with another policy or threshold."""
        self._config: DriftConfig = policy.drift
        self._outcomes: deque[bool] = deque(maxlen=policy.drift.warm_up)
        self._alarmed = False
        self._detector: DriftDetector | None = None
        self.baseline: DriftBaseline | None = None
        rate = calibrated_rate(policy)
        if rate is not None:
            self._begin(rate, policy.examples, True)

    def observe(self, corrected: bool, greedy: bool) -> None:
        """Add a request that either side answered as the policy says.

        Args:
            corrected: whether it was deferred and the cloud's answer was another text than the edge's.
            greedy: whether its temperature was 0, as in calibration; others do not count against a calibrated rate,
                for two samples differ by chance.
        """
        if not self._config.enabled or (self.baseline is not None and self.baseline.calibrated and not greedy):
            return
        self._outcomes.append(corrected)
        if self._detector is None:
            if len(self._outcomes) == self._config.warm_up:
                self._begin(sum(self._outcomes) / len(self._outcomes), len(self._outcomes), False)
            return
        if self._detector.update(corrected):
            self._alarm()

    def status(self) -> DriftStatus:
        """Return the state."""
        baseline, count = self.baseline, len(self._outcomes)
        return DriftStatus(
            expected=None if baseline is None else baseline.rate,
            bound=None if baseline is None else baseline.bound,
            rate=sum(self._outcomes) / count if count else 0.0,
            requests=count,
            evidence=0.0 if self._detector is None else self._detector.evidence,
            alarms=self.alarms,
            alarmed=self._alarmed,
        )

    def _begin(self, rate: float, requests: int, calibrated: bool) -> None:
        bound = rate_bound(round(rate * requests), requests, self._config.delta)
        self.baseline = DriftBaseline(rate, bound, requests, calibrated)
        self._detector = DriftDetector(bound, self._config.false_alarm_interval)

    def _alarm(self) -> None:
        assert self.baseline is not None
        self.alarms += 1
        self._alarmed = True
        count = len(self._outcomes)
        LOGGER.warning(
            "drift: the cloud corrected %.1f %% of the last %d requests, and %.1f %% in %s; requests or the cloud's "
            "model have changed, so the threshold may promise too much: run shadowtune calibrate again",
            100 * sum(self._outcomes) / count,
            count,
            100 * self.baseline.rate,
            "calibration" if self.baseline.calibrated else f"the first {self.baseline.requests}",
        )


def calibrated_rate(policy: PolicyConfig) -> float | None:
    """Return the rate of corrections at a policy's threshold; None if calibration did not measure it.

    A policy that asks the cloud for everything has the rate of the highest threshold.
    """
    rates = [(point.threshold, point.correction_rate) for point in policy.curve if point.correction_rate is not None]
    if not rates or not policy.examples or policy.kind not in ("confidence", "verify", "tag"):
        return None
    if policy.kind == "verify":
        return rates[-1][1]
    threshold = policy.threshold if policy.kind in ("confidence", "token") else 0.0
    return next((rate for each, rate in rates if each >= threshold), rates[-1][1])
