"""The world that a simulation plays in: network, prices, speeds, and how requests come."""

from dataclasses import dataclass

from shadowtune.config.checking import check_range
from shadowtune.errors import ConfigError

ARRIVALS = "poisson:RATE (requests a second) or closed:CLIENTS (each waits for its answer)"


@dataclass(frozen=True)
class Arrivals:
    """How requests come: by themselves at a rate, or from clients that each wait for their answer."""

    rate: float | None = None
    """Requests a second of a Poisson process; None where clients wait."""
    clients: int = 1
    """Clients that ask one request after the other, without a pause."""

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


@dataclass(frozen=True)
class SimulationConfig:
    """What lies between edge and cloud, and what the cloud costs."""

    rtt_ms: float = 60.0
    """Milliseconds to the cloud and back, nothing being sent."""
    jitter_ms: float = 10.0
    """A round trip takes up to so many milliseconds more or less."""
    bandwidth_mbit: float = 20.0
    """Megabits a second in each direction."""
    price_per_1k_tokens: float = 1.0
    """Of a thousand tokens that the cloud reads or writes."""
    edge_speed: float = 1.0
    """The edge is so many times as fast as where its seconds were measured."""
    cloud_speed: float = 1.0
    """The cloud likewise."""
    arrivals: str = "poisson:2"
    """How requests come, as ``Arrivals.parse`` reads it."""
    seed: int = 0
    """Of arrivals, jitter and the random routers."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(
            self,
            rtt_ms=(0, None),
            jitter_ms=(0, None),
            bandwidth_mbit=(1e-6, None),
            price_per_1k_tokens=(0, None),
            edge_speed=(1e-6, None),
            cloud_speed=(1e-6, None),
        )
        Arrivals.parse(self.arrivals)
