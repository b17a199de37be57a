"""``shadowtune serve cloud --engine vllm``: vLLM's server on one run, as a process of its own."""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from shadowtune.cli.command import print_status
from shadowtune.cli.loading import adapter_paths, read_adapter_source, shadow_tokenizer
from shadowtune.cli.server import api_keys
from shadowtune.cli.source import source_path
from shadowtune.errors import ConfigError

PYTHON = "VLLM_PYTHON"
"""Environment variable with the interpreter of an environment that has vLLM; by default this one."""
KEY = "VLLM_API_KEY"
"""Environment variable from which vLLM reads an API key."""
OPTIONS = {
    *("run", "name", "host", "port", "api_key_file", "cors_origin", "max_rows", "no_speculate", "engine"),
    "vllm_arguments",
}
"""Options of ``serve cloud`` that hold for vLLM too; the others are of our own server and engine."""


def serve_with_vllm(arguments: argparse.Namespace, defaults: argparse.Namespace) -> int:
    """Serve one run by vLLM until the process is terminated; return vLLM's exit code.

    Args:
        arguments: of ``serve cloud``.
        defaults: of its options.

    Raises:
        ShadowtuneError: if vLLM is missing or untested, cannot run the adapter, or an option is not one of vLLM.
    """
    from shadowtune.model.loading import read_config
    from shadowtune.models import resolve
    from shadowtune.serving.vllm.launch import VllmServer, check_single, check_vllm, write_model_directory
    from shadowtune.serving.vllm.support import check_supported

    others = vars(defaults).keys() - OPTIONS
    given = [f"--{n.replace('_', '-')}" for n in sorted(others) if vars(arguments)[n] != vars(defaults)[n]]
    if given:
        raise ConfigError(f"{', '.join(given)}: of our own server, not of vLLM; leave it out, see --vllm-arguments")
    paths = adapter_paths(arguments.run, arguments.name)
    name = check_single(list(paths))
    environment = _environment(api_keys(arguments))
    python = os.environ.get(PYTHON) or sys.executable
    version = check_vllm(python)
    source = read_adapter_source(source_path(str(paths[name])))
    config = read_config(str(source.model))
    if source.loading.keys() - {"dtype"}:
        raise ConfigError(
            f"{name} was trained on a quantized base, which the vLLM plugin does not run; leave --engine out"
        )
    check_supported(config)
    config.base_name_or_path = str(Path(resolve(source.base or config.base_name_or_path)))
    dtype = source.loading.get("dtype") or (config.base_signature or {}).get("dtype", "auto")
    server = VllmServer(
        python=python,
        host=arguments.host,
        port=arguments.port or _free_port(arguments.host),
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        max_sequences=arguments.max_rows,
        origins=tuple(arguments.cors_origin),
        arguments=tuple(shlex.split(arguments.vllm_arguments)),
    )
    with tempfile.TemporaryDirectory(prefix="shadowtune-vllm-") as scratch:
        tokenizer = shadow_tokenizer(source.model, config.base_name_or_path)
        write_model_directory(source.model, Path(scratch), config, tokenizer, source.prompt_format)
        command = server.command(Path(scratch), config)
        print_status(f"starting vLLM {version}: {shlex.join(command)}")
        return _run(command, environment)


def _environment(keys: list[str]) -> dict[str, str]:
    """Return the environment of vLLM: this one's, with the API key, which does not belong on a command line."""
    if len(keys) > 1:
        raise ConfigError(f"vLLM takes one API key from its environment, got {len(keys)}; give one")
    return {**os.environ, **({KEY: keys[0]} if keys else {})}


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listening:
        return int(listening.getsockname()[1])


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Run vLLM, pass signals that end this process on to it, and return its exit code; 0 if it was asked to end."""
    ended = False
    process = subprocess.Popen(command, env=environment)

    def end(*_: object) -> None:
        nonlocal ended
        ended = True
        process.terminate()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if ended else code
