"""Settings of serving: the HTTP server, the remote endpoint of an edge, the routing policy, the simulation of both."""

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Lt
from pydantic import StrictBool, StrictInt

from shadowtune.config.settings import (
    NUMBER,
    Float,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    current_names,
    from_mapping,
    raise_errors,
    settings,
)
from shadowtune.errors import ConfigError, ShadowtuneError

PolicyKind = Literal["always-edge", "always-cloud", "tag", "confidence", "verify", "token"]
SignalName = Literal["logprob", "margin", "entropy", "first", "learned", "agreement", "deferral"]
HEAD_SIGNALS: tuple[SignalName, ...] = ("agreement", "deferral")
"""Signals of a deferral head, which not every model has."""
TOKEN_SIGNALS: tuple[SignalName, ...] = ("logprob", "margin", "entropy", "agreement")
"""Signals that single tokens have."""
TAG = "[REMOTE]"
HIGHEST_THRESHOLD = 1.000001
"""Upper bound of thresholds, exclusive; a threshold above 1 defers every request."""
ARRIVALS = "poisson:RATE (requests a second) or closed:CLIENTS (each waits for its answer)"

_Positive = Annotated[float, Ge(1e-6), NUMBER]


def hash_key(key: str) -> str:
    """Return what a server keeps of an API key: its SHA-256, as hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@settings
class ServerConfig:
    """Settings of the HTTP side of a server. Times are in seconds."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every address of the machine."""
    port: Annotated[StrictInt, Ge(0), Lt(65536)] = 8000
    """0 takes a free one."""
    key_hashes: tuple[str, ...] = field(default=(), repr=False)
    """``hash_key`` of every accepted API key; without any, no key is needed."""
    admin_hashes: tuple[str, ...] = field(default=(), repr=False)
    """``hash_key`` of every key that may change the server (adapters, the policy's threshold); valid as API keys too.
    """
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may address the server, beside this machine's own. A server that listens on the loopback
    address refuses every other name in ``Host`` and ``Origin``: a page of another site could otherwise reach it by a
    name that resolves to 127.0.0.1. On other addresses names are checked only if some are given here."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser (CORS), such as https://chat.example; "*" is any."""
    max_connections: PositiveInt = 512
    """Open connections; further ones wait in the system's queue."""
    max_body_bytes: PositiveInt = 4_000_000
    """Most bytes of a request's body."""
    max_requests: PositiveInt = 80
    """Answers that may be running or waiting at once; ``n`` and lists of prompts count each."""
    max_tokens: PositiveInt | None = None
    """Most tokens that a request may ask for; None leaves it to the model's positions."""
    timeout: Seconds = 300.0
    """From a request's arrival to the end of its answer."""
    read_timeout: Seconds = 30.0
    """For a request's head to arrive, for its body, and for a client to read what was sent."""
    idle_timeout: Seconds = 75.0
    """For which a connection is kept open without a request."""
    drain_timeout: NonNegativeFloat = 30.0
    """For which a server that shuts down continues running requests."""
    allow_loading: StrictBool = False
    """Allow adapters to be loaded and unloaded over HTTP, with an admin key where the server has keys."""
    adapter_root: str | None = None
    """Directory that adapters are loaded from; None accepts any path."""
    log_prompts: StrictBool = False
    """Write prompts and answers to the log."""

    def __post_init__(self) -> None:
        """Check hashes, origins and hosts."""
        raise_errors(self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        if any(len(digits) != 64 for digits in (*self.key_hashes, *self.admin_hashes)):
            yield "key_hashes and admin_hashes are made by hash_key, 64 hexadecimal digits each"
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s*]+", origin):
                yield f"an allowed origin is like https://chat.example, without a path, or *; got {origin!r}"
        for host in self.allowed_hosts:
            if not re.fullmatch(r"[A-Za-z0-9.:\[\]_-]+|\*", host):
                yield f"an allowed host is a name or address without scheme or path, or *; got {host!r}"

    @property
    def is_local(self) -> bool:
        """Whether it listens on the loopback address alone."""
        return is_loopback(self.host)


@settings
class CloudConfig:
    """A remote endpoint with OpenAI's API (ours, vLLM's, llama.cpp's), as an edge calls it. Times are in seconds."""

    url: str
    """Base URL, with or without /v1: http://cloud:8000 or https://host/v1."""
    model: str | None = None
    """Model to ask for; None takes the requested one if the endpoint has it, else the first that it lists."""
    key: str | None = field(default=None, repr=False)
    """API key."""
    connect_timeout: Seconds = 3.0
    """Until a connection is open."""
    read_timeout: Seconds = 10.0
    """Without a byte received."""
    first_token_timeout: Seconds = 10.0
    """From an attempt's start to the first token."""
    idle_timeout: Seconds = 15.0
    """Between two chunks of an answer; the whole answer may take as long as the server's ``timeout`` allows."""
    deadline: Seconds = 15.0
    """From deferring a request to the first token, all attempts together; the edge's own answer is kept until then."""
    retries: NonNegativeInt = 2
    """Further attempts while nothing of an answer was received."""
    backoff: NonNegativeFloat = 0.25
    """Before the first further attempt; doubled before each one after it, with random jitter of up to half of it."""
    failures: PositiveInt = 5
    """Consecutive failed attempts that open the circuit breaker."""
    cool_down: NonNegativeFloat = 15.0
    """For which the circuit breaker stays open; then one request probes the endpoint."""
    max_line_bytes: PositiveInt = 1_000_000
    """Most bytes of a line of a stream."""
    max_body_bytes: PositiveInt = 16_000_000
    """Most bytes of an answer, a whole stream included."""

    def __post_init__(self) -> None:
        """Check the address."""
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(f"the cloud's address must be like http://host:8000, got {self.url!r}")

    @property
    def api(self) -> str:
        """The URL that ends in ``/v1``."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"


@settings
class Prices:
    """Prices of the cloud, in any unit; by default that of one of its tokens."""

    prompt: NonNegativeFloat = 1.0
    """Of a prompt token."""
    completion: NonNegativeFloat = 1.0
    """Of a completion token."""
    request: NonNegativeFloat = 0.0
    """Of a request, beside its tokens."""


@settings
class Weights:
    """A logistic regression on the confidence signals of an edge's answer; its probability is the confidence."""

    bias: Float
    """Intercept."""
    logprob: Float
    """Weight of the log-odds of this signal."""
    margin: Float
    """Likewise."""
    entropy: Float
    """Likewise."""
    first: Float
    """Likewise."""
    length: Float
    """Weight of log(1 + number of the answer's tokens)."""
    agreement: Float = 0.0
    """Weight of the log-odds of this signal; 0 if the edge had no deferral head."""
    deferral: Float = 0.0
    """Likewise."""


@settings
class CurvePoint:
    """Result of one threshold on held-out requests."""

    threshold: Float
    """Confidence below which requests were deferred."""
    accuracy: Float
    """Mean score of the answers, the edge's and the cloud's together."""
    deferral_rate: Float
    """Fraction of the requests that were deferred to the cloud."""
    cost: Float
    """Mean cost of a request, in units of ``Prices``."""
    correction_rate: Float | None = None
    """Fraction of the requests that were deferred and got another answer than the edge's; None if not measured."""


@settings
class ReliabilityPoint:
    """The held-out requests whose confidence lies in one tenth of its range."""

    confidence: Float
    """Their mean confidence."""
    accuracy: Float
    """Fraction whose answer by the cloud was not better."""
    count: NonNegativeInt
    """Their number."""


@settings
class DriftConfig:
    """The alarm that an edge raises when its cloud corrects it more often than expected."""

    enabled: StrictBool = True
    """Whether corrections are watched."""
    false_alarm_interval: PositiveFloat = 2000.0
    """Least expected number of requests between two false alarms. A larger one finds a drift later."""
    warm_up: PositiveInt = 200
    """Number of first requests that measure the rate of corrections, where calibration has not; also the number of last
    requests that are reported."""
    delta: Annotated[float, Ge(1e-6), Lt(0.5), NUMBER] = 0.05
    """One minus the confidence level of the upper bound of the expected rate, below which no alarm is raised."""


@settings
class PolicyConfig:
    """When a request is answered by the edge, and when it is deferred to the cloud."""

    kind: PolicyKind = "confidence"
    """"always-edge" and "always-cloud" are fixed. "tag" defers requests that the edge answers with ``tag``;
    "confidence" those and the ones with a low confidence; "verify" lets the cloud verify every answer of the edge in
    one forward pass; "token" streams the edge's answer up to its first token with a low confidence, and lets the cloud
    continue from there (greedy requests without tools, JSON schema and log-probabilities; others are treated as by
    "confidence")."""
    threshold: Annotated[float, Ge(0), Lt(HIGHEST_THRESHOLD), NUMBER] = 0.5
    """For "confidence": requests with a lower confidence are deferred; for "token", from the first token with a
    lower one on. From 0 to 1."""
    signal: SignalName = "logprob"
    """Confidence of an answer, computed from its tokens, the end token included. "logprob": their geometric mean
    probability; "margin": the smallest difference of the two highest probabilities; "entropy": 1 minus the mean entropy
    over its largest value; "first": the first token's probability; "learned": a logistic regression on all of
    them (``weights``). Of a model with a deferral head (``deferral_fraction`` of training): "agreement", the
    probability that the attached model would generate the same tokens; "deferral", 1 minus the probability that the
    attached model is right where the edge's answer is wrong."""
    tag: str | None = TAG
    """Answer by which an edge that was trained to do so asks to defer; None if there is none."""
    weights: Weights | None = None
    """For the signal "learned"."""
    prices: Prices = field(default_factory=Prices)
    """Prices of the cloud."""
    curve: tuple[CurvePoint, ...] = ()
    """Result of every threshold, ascending, as measured by ``shadowtune calibrate``."""
    examples: NonNegativeInt = 0
    """Number of held-out requests of the curve."""
    reliability: tuple[ReliabilityPoint, ...] = ()
    """How often the confidence is right, measured on other requests than the curve."""
    drift: DriftConfig = field(default_factory=DriftConfig)
    """The drift alarm."""
    value: PositiveFloat | None = None
    """For "token": worth of a right token, in units of ``prices``. It replaces the threshold: a token is deferred where
    (1 - confidence) times this exceeds what the cloud costs for the prompt and ``answer_tokens``."""
    answer_tokens: PositiveInt = 32
    """For ``value``: expected number of tokens of an answer of the cloud."""

    def __post_init__(self) -> None:
        """Check what the signal and the kind need."""
        raise_errors(self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        if self.signal == "learned" and self.weights is None:
            yield "signal learned needs its weights; take the policy.json of shadowtune calibrate"
        if self.kind == "token" and self.signal not in TOKEN_SIGNALS:
            yield f"kind token needs a signal of single tokens: {', '.join(TOKEN_SIGNALS)}; got {self.signal}"
        if self.value is not None and self.kind != "token":
            yield f"value={self.value:g} is for kind token; leave it out"
        if self.kind == "tag" and not self.tag:
            yield f"kind tag needs a tag, such as {TAG}"

    @property
    def reads_deferral_head(self) -> bool:
        """Whether the confidence depends on the edge's deferral head."""
        learned = self.signal == "learned" and self.weights is not None
        return self.signal in HEAD_SIGNALS or (learned and any(vars(self.weights)[name] for name in HEAD_SIGNALS))

    def save(self, file: Path) -> None:
        """Write the policy as JSON."""
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> "PolicyConfig":
        """Read what ``save`` wrote, or a part of it written by hand.

        Raises:
            ConfigError: naming the file and all errors in it.
        """
        try:
            return from_mapping(cls, current_names(json.loads(file.read_text(encoding="utf-8")), warn=False))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from None
        except (ValueError, RecursionError, ShadowtuneError) as error:
            raise ConfigError(f"{file}: {' '.join(str(error).split())}; write it with shadowtune calibrate") from None


@dataclass(frozen=True)
class Arrivals:
    """Arrival process of requests: open at a rate, or closed with clients that each wait for their answer."""

    rate: float | None = None
    """Requests a second of a Poisson process; None for a closed process."""
    clients: int = 1
    """Clients that send one request after the other, without a pause."""

    @classmethod
    def parse(cls, text: str) -> "Arrivals":
        """Read "poisson:2" or "closed:1".

        Raises:
            ConfigError: if it is neither.
        """
        kind, _, number = text.partition(":")
        try:
            if kind == "poisson" and 0 < (rate := float(number)) < float("inf"):
                return cls(rate=rate)
            if kind == "closed" and (clients := int(number)) >= 1:
                return cls(clients=clients)
        except ValueError:
            pass
        raise ConfigError(f"arrivals must be {ARRIVALS}, got {text!r}")


@settings
class SimulationConfig:
    """Network, prices, speeds and arrivals of a simulation of edge and cloud."""

    rtt_ms: NonNegativeFloat = 60.0
    """Round-trip time to the cloud without payload, in milliseconds."""
    jitter_ms: NonNegativeFloat = 10.0
    """Largest deviation of a round trip from that, in milliseconds."""
    bandwidth_mbit: _Positive = 20.0
    """Megabits a second in each direction."""
    price_per_1k_tokens: NonNegativeFloat = 1.0
    """Price of 1,000 prompt or completion tokens of the cloud."""
    edge_speed: _Positive = 1.0
    """Speed of the edge, relative to the machine on which its seconds were measured."""
    cloud_speed: _Positive = 1.0
    """Speed of the cloud, likewise."""
    arrivals: str = "poisson:2"
    """Arrival process, as ``Arrivals.parse`` reads it."""
    seed: StrictInt = 0
    """Of arrivals, jitter and the random routers."""

    def __post_init__(self) -> None:
        """Check the arrivals."""
        Arrivals.parse(self.arrivals)
