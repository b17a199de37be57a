"""How the edge reaches a cloud, and how long it waits."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from shadowtune.config.checking import check_range
from shadowtune.errors import ConfigError


@dataclass(frozen=True)
class CloudConfig:
    """A server with OpenAI's API: ours, vLLM's, llama.cpp's. Times are in seconds."""

    url: str
    """Where ``/v1`` is, with or without it: http://cloud:8000 or https://host/v1."""
    model: str | None = None
    """What to ask it for; None takes the model that was asked for if it has that, else the first that it lists."""
    key: str | None = field(default=None, repr=False)
    """Its API key."""
    connect_timeout: float = 3.0
    read_timeout: float = 10.0
    """Without a byte from it."""
    first_token_timeout: float = 10.0
    """From an attempt's start to the first token."""
    idle_timeout: float = 15.0
    """Between two parts of its answer; an answer that goes on may take as long as the server's ``timeout`` allows."""
    deadline: float = 15.0
    """From the hand-over to the first token, all attempts together: for so long the edge's own answer waits."""
    retries: int = 2
    """Further attempts while nothing of an answer has come."""
    backoff: float = 0.25
    """Before the first further attempt; twice as long before each one after it, half as much more or less by chance."""
    failures: int = 5
    """Failed attempts in a row after which it is left alone."""
    cool_down: float = 15.0
    """For which it is left alone; then one request tries it."""
    max_line_bytes: int = 1_000_000
    """Of its stream."""
    max_body_bytes: int = 16_000_000
    """Of an answer, all of its stream together."""

    def __post_init__(self) -> None:
        """Check the address and the ranges."""
        check_range(
            self,
            retries=(0, None),
            backoff=(0, None),
            failures=(1, None),
            cool_down=(0, None),
            max_line_bytes=(1, None),
            max_body_bytes=(1, None),
        )
        for name in ("connect_timeout", "read_timeout", "first_token_timeout", "idle_timeout", "deadline"):
            check_range(self, **{name: (0.001, None)})
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise ConfigError(f"the cloud's address must be like http://host:8000, got {self.url!r}")

    @property
    def api(self) -> str:
        """The address that ends in ``/v1``."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"
