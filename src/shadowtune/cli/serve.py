"""``shadowtune serve cloud``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.cli.command import Command
from shadowtune.cli.output import say
from shadowtune.cli.server import add_server, run_server, server_config
from shadowtune.errors import CheckpointError

if TYPE_CHECKING:
    from shadowtune.config.serving import ServerConfig
    from shadowtune.serving.engine.engine import LoadedAdapter

CLOSE_SECONDS = 5.0
"""For which the engine may end what runs after the server has waited for ``--drain-timeout``."""
EPILOG = """examples:
  shadowtune serve cloud runs/clinc150
  shadowtune serve cloud runs/clinc150 --name polite=runs/seed2 --port 9000 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "clinc150", "messages": [{"role": "user", "content": "wake me at six"}]}'
All runs share one base, which answers too, as model "base". SIGTERM and Ctrl-C finish what was begun.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", nargs="*", help="run directories of shadowtune train, or saved shadows")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="a run and the name it answers by; the others answer by their directory's",
    )
    add_server(parser)
    parser.add_argument("--no-speculate", action="store_true", help="shadows do not draft")
    parser.add_argument(
        "--allow-loading",
        action="store_true",
        help="adapters may be loaded and unloaded over HTTP, by an admin key and from --adapter-root",
    )
    parser.add_argument("--adapter-root", metavar="DIR", help="directory that adapters may be loaded from")


def run(arguments: argparse.Namespace) -> int:
    """Serve runs until told to end."""
    config = server_config(arguments, arguments.allow_loading, arguments.adapter_root)
    from shadowtune.cli.served import named_runs

    runs = named_runs(arguments.run, arguments.name)
    return run_server(config, lambda: _build(runs, arguments, config))


def _build(runs: dict[str, Path], arguments: argparse.Namespace, config: "ServerConfig") -> Any:
    """Load the runs and put the API in front of them."""
    from shadowtune.cli.served import check_finite, open_served, open_shadow, read_source
    from shadowtune.config.speculation import SpeculationConfig
    from shadowtune.serving.engine.engine import Engine
    from shadowtune.serving.engine.scheduler import Limits
    from shadowtune.serving.http.app import create_app

    limits = Limits(
        max_sequences=arguments.max_rows,
        max_queue=arguments.max_queue,
        speculation=None if arguments.no_speculate else SpeculationConfig(),
        close_seconds=CLOSE_SECONDS,
    )
    served = open_served(runs, say)

    def open_adapter(path: str) -> "LoadedAdapter":
        try:
            source = read_source(Path(path))
            model = open_shadow(source, served.base)
            check_finite(path, model)
            return model, source.prompt_format
        except OSError as error:  # a path that the system does not take, or may not read
            raise CheckpointError(error.strerror or str(error)) from None

    engine = Engine(served.base, served.tokenizer, served.adapters, limits, open_adapter)
    return create_app(engine, config, "cloud", adapters=engine, counters=engine.counters)


COMMAND = Command("serve cloud", "answer over HTTP with attached models", add_arguments, run, EPILOG)
