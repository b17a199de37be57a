"""Options of both servers, and running one: API keys, the log, the line with its address."""

import argparse
import gc
import importlib.util
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shadowtune.cli.command import print_status
from shadowtune.config.serving import ServerConfig, hash_key
from shadowtune.errors import ConfigError, ShadowtuneError

KEYS = "SHADOWTUNE_API_KEYS"
"""Environment variable with API keys, separated by commas."""
ADMIN_KEYS = "SHADOWTUNE_ADMIN_KEYS"
"""Environment variable with keys that may change the server, separated by commas."""
PACKAGES = ("fastapi", "uvicorn", "httpx2", "prometheus_client")
LOGGED = ("shadowtune.serving", "uvicorn", "asyncio")


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options of both servers."""
    defaults = ServerConfig()
    group = parser.add_argument_group("server")
    group.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=defaults.port, help="0 takes a free one (default: %(default)s)")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"API keys, one per line; the variable {KEYS} adds more, separated by commas (default: no key is needed)",
    )
    group.add_argument(
        "--admin-key-file",
        metavar="FILE",
        help="keys that may change the server (adapters, the policy's threshold), one per line; "
        f"the variable {ADMIN_KEYS} adds more",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which clients address the server, beside this machine's own; * is any (repeatable)",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may call the server, such as https://chat.example; * is any (repeatable)",
    )
    group.add_argument("--max-connections", type=int, default=defaults.max_connections, help="default: %(default)s")
    group.add_argument("--max-rows", type=int, default=16, help="answers running at once (default: %(default)s)")
    group.add_argument(
        "--max-queue", type=int, default=64, help="answers that may wait; one more gets 429 (default: %(default)s)"
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens that a request may ask for")
    group.add_argument("--max-body-bytes", type=int, default=defaults.max_body_bytes, help="default: %(default)s")
    group.add_argument(
        "--timeout", type=float, default=defaults.timeout, help="seconds for a request (default: %(default)g)"
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=defaults.drain_timeout,
        help="seconds for running requests after the server was told to stop (default: %(default)g)",
    )
    group.add_argument("--log-prompts", action="store_true", help="write prompts and answers to the log")


def server_config(
    arguments: argparse.Namespace, allow_loading: bool = False, adapter_root: str | None = None
) -> ServerConfig:
    """Return the server's settings.

    Raises:
        ShadowtuneError: if an option is out of its range, a key is not valid, or a package is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ShadowtuneError(f"a server needs {', '.join(missing)}; pip install 'shadowtune[serve]'")
    for name in ("max_rows", "max_queue"):
        if vars(arguments)[name] < (name == "max_rows"):
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {int(name == 'max_rows')}")
    admin_keys = _keys(arguments.admin_key_file, "--admin-key-file", ADMIN_KEYS)
    if allow_loading and not admin_keys:
        raise ConfigError(f"--allow-loading needs a key that may do so; give --admin-key-file or {ADMIN_KEYS}")
    if allow_loading and adapter_root is None:
        raise ConfigError("--allow-loading needs --adapter-root, the directory that adapters may be loaded from")
    if adapter_root is not None and not Path(adapter_root).is_dir():
        raise ConfigError(f"--adapter-root {adapter_root} is not a directory")
    return ServerConfig(
        host=arguments.host,
        port=arguments.port,
        key_hashes=tuple(hash_key(key) for key in api_keys(arguments)),
        admin_hashes=tuple(hash_key(key) for key in admin_keys),
        allowed_hosts=tuple(arguments.allowed_host),
        allowed_origins=tuple(arguments.cors_origin),
        max_connections=arguments.max_connections,
        max_body_bytes=arguments.max_body_bytes,
        max_requests=arguments.max_rows + arguments.max_queue,
        max_tokens=arguments.max_tokens,
        timeout=arguments.timeout,
        drain_timeout=arguments.drain_timeout,
        allow_loading=allow_loading,
        adapter_root=adapter_root,
        log_prompts=arguments.log_prompts,
    )


def api_keys(arguments: argparse.Namespace) -> list[str]:
    """Return the keys of ``--api-key-file`` and of the environment; raises ConfigError if either has none."""
    return _keys(arguments.api_key_file, "--api-key-file", KEYS)


def _keys(file: str | None, option: str, variable: str) -> list[str]:
    """Return the keys of a file, where # begins a comment, and of an environment variable.

    Raises:
        ConfigError: if either is given and has no key: the server would be open to all.
    """
    lines = [] if file is None else [line.split("#")[0].strip() for line in Path(file).read_text().splitlines()]
    keys = [key for key in lines if key]
    if file is not None and not keys:
        raise ConfigError(f"{file} has no API key; write one a line, or leave out {option}")
    value = os.environ.get(variable)
    if value is not None:
        found = [key.strip() for key in value.split(",") if key.strip()]
        if not found:
            raise ConfigError(f"{variable} is set and has no key in it; write one, or unset it")
        keys += found
    if any(not key.isascii() or " " in key for key in keys):
        raise ConfigError("an API key has spaces or other than ASCII characters; it could not be sent as a header")
    return keys


def run_server(config: ServerConfig, build: Callable[[], Any]) -> int:
    """Bind the port, build the app, and serve until the process is terminated.

    Args:
        config: of ``server_config``.
        build: loads the models and returns the app (of ``create_app``); called after the port is bound.

    Raises:
        ConfigError: if the port is in use.
    """
    from shadowtune.serving.http.server import address_of, bind, make_server

    with bind(config) as bound:
        app = build()
        gc.collect()
        gc.freeze()  # keep the model's objects out of later garbage collections, which large requests cause
        address = address_of(bound)
        names = [card.name for card in app.state.admission.backend.models()]
        _log(config.log_prompts)
        if not config.key_hashes and not config.is_local:
            print_status(f"note: {config.host} is open to the network and needs no key; --api-key-file sets one")
        make_server(app, config, lambda: print(_welcome(address, names, config), flush=True)).run([bound])
    failure = app.state.admission.failure()
    if failure is None:
        return 0
    print_status(f"the server could not go on: {failure}")
    sys.stdout.flush()
    os._exit(1)  # a thread that hangs in a forward pass would keep the interpreter from ending


def _welcome(address: str, names: list[str], config: ServerConfig) -> str:
    """Return one line with the server's address and an example request."""
    body = json.dumps({"model": names[0], "messages": [{"role": "user", "content": "Hello"}]})
    key = '-H "Authorization: Bearer $KEY" ' if config.key_hashes else ""
    curl = f"curl {address}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'"
    return f"{address} answers as {', '.join(names)}; try: {curl}"


def _log(prompts: bool) -> None:
    """Write the servers' log to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        (logging.Formatter if prompts else NoMessageFormatter)("%(asctime)s %(levelname)s %(message)s")
    )
    for name in LOGGED:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == LOGGED[0] else logging.WARNING)


class NoMessageFormatter(logging.Formatter):
    """Formats an exception as its type and stack frames, without its message, which may quote a prompt."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  logging's name
        """Return the frames and the type."""
        kind, _, frames = ei
        name = "" if kind is None else kind.__name__
        return "".join(traceback.format_tb(frames)) + name
