"""How a server listens, and what it lets in."""

import hashlib
import ipaddress
import re
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
    admin_hashes: tuple[str, ...] = field(default=(), repr=False)
    """``hash_key`` of every key that may change the server (adapters, the policy's threshold); opens the rest too."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may address the server, beside this machine's own. A server that listens on the loopback
    address refuses every other name in ``Host`` and ``Origin``: a page of another site could otherwise reach it by a
    name that resolves to 127.0.0.1. On other addresses names are checked only if some are given here."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser (CORS), such as https://chat.example; "*" is any."""
    max_connections: int = 512
    """Open connections; further ones wait in the system's queue."""
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
    """Whether adapters may be loaded and unloaded over HTTP, by an admin key where the server has keys."""
    adapter_root: str | None = None
    """Directory that adapters are loaded from; None takes any path."""
    log_prompts: bool = False
    """Whether prompts and answers are written to the log."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(
            self,
            port=(0, 65536),
            max_body_bytes=(1, None),
            max_connections=(1, None),
            max_requests=(1, None),
            max_tokens=(1, None),
            drain_timeout=(0, None),
        )
        for name in ("timeout", "read_timeout", "idle_timeout"):
            check_range(self, **{name: (0.001, None)})
        if any(len(digits) != 64 for digits in (*self.key_hashes, *self.admin_hashes)):
            raise ConfigError("key_hashes and admin_hashes are made by hash_key, 64 hexadecimal digits each")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s*]+", origin):
                raise ConfigError(
                    f"an allowed origin is like https://chat.example, without a path, or *; got {origin!r}"
                )
        for host in self.allowed_hosts:
            if not re.fullmatch(r"[A-Za-z0-9.:\[\]_-]+|\*", host):
                raise ConfigError(f"an allowed host is a name or address without scheme or path, or *; got {host!r}")

    @property
    def is_local(self) -> bool:
        """Whether it listens on the loopback address alone."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
