"""How a server listens, and what it lets in."""

import hashlib
from dataclasses import dataclass, field

from shadowtune.config.checking import check_range
from shadowtune.errors import ConfigError


def hash_key(key: str) -> str:
    """Return what a server keeps of an API key: its SHA-256, as hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class ServerConfig:
    """Settings of the HTTP side of a server, whoever answers behind it. Times are in seconds."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of the machine."""
    port: int = 8000
    """0 takes a free one."""
    key_hashes: tuple[str, ...] = field(default=(), repr=False)
    """``hash_key`` of every API key that opens the server; none leaves it open to all."""
    max_body_bytes: int = 4_000_000
    """Bytes of a request's body at most."""
    max_requests: int = 80
    """Answers that may be under way or waiting at once; ``n`` and lists of prompts count each."""
    max_tokens: int | None = None
    """Tokens that a request may ask for at most; None leaves it to the model's positions."""
    timeout: float = 300.0
    """From a request's arrival to the end of its answer."""
    read_timeout: float = 30.0
    """For a request's head to come, for its body, and for a client to take what was sent."""
    idle_timeout: float = 75.0
    """For which a connection is kept without a request."""
    drain_timeout: float = 30.0
    """For which a server that shall end goes on with what it began."""
    allow_loading: bool = False
    """Whether adapters may be loaded and unloaded over HTTP."""
    log_prompts: bool = False
    """Whether prompts and answers are written to the log."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(
            self,
            port=(0, 65536),
            max_body_bytes=(1, None),
            max_requests=(1, None),
            max_tokens=(1, None),
            drain_timeout=(0, None),
        )
        for name in ("timeout", "read_timeout", "idle_timeout"):
            check_range(self, **{name: (0.001, None)})
        if any(len(digits) != 64 for digits in self.key_hashes):
            raise ConfigError("key_hashes are made by hash_key, 64 hexadecimal digits each")
