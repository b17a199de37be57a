"""``shadowtune serve cloud`` and ``shadowtune serve edge``."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from shadowtune.cli.command import Command, print_status
from shadowtune.cli.loading import adapter_paths, check_finite, load_adapter, load_adapters, read_adapter_source
from shadowtune.cli.options import add_cloud, add_prices, cloud_of, prices_of
from shadowtune.cli.server import add_server, run_server, server_config
from shadowtune.cli.source import SOURCE, detached_model, open_source, source_path
from shadowtune.config.serving import CloudConfig, PolicyConfig, PolicyKind, Prices, ServerConfig, SignalName
from shadowtune.config.shadow import SpeculationConfig
from shadowtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from shadowtune.export.loading import LoadedModel
    from shadowtune.serving.edge.local import LocalModel
    from shadowtune.serving.engine.engine import LoadedAdapter

CLOSE_SECONDS = 5.0
"""Time for the engine to end running requests, after the server has waited for ``--drain-timeout``."""
CLOUD_EPILOG = """examples:
  shadowtune serve cloud runs/clinc150
  shadowtune serve cloud runs/clinc150 --name polite=runs/seed2 --port 9000 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "clinc150", "messages": [{"role": "user", "content": "wake me at six"}]}'
All runs share one base, which is served too, as model "base". SIGTERM and Ctrl-C finish running requests.
"""
EDGE_EPILOG = """examples:
  shadowtune serve edge robot.gguf
  shadowtune serve edge robot-int8 --cloud http://cloud:8000 --policy policy.json
  shadowtune serve edge robot.gguf --cloud http://cloud:8000 --policy-kind verify --cloud-key-file key.txt
  shadowtune serve edge robot-int8 --cloud https://vllm:8000/v1 --cloud-model big --threshold 0.8
Without --cloud the edge answers everything itself, token by token. With a cloud:
The policy decides on the edge's whole answer, before the first byte is sent; --policy-kind token decides at each token
while the edge streams, and the cloud continues from the first unsure one. If the cloud fails or is too slow, the
edge's own answer is sent, marked "fallback". See the response headers x-shadowtune-side, -reason, -confidence, -cost.
"""


def add_cloud_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``serve cloud``."""
    parser.add_argument("run", nargs="*", help="run directories, saved shadows, or Hub ids of these")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="a run and its model name; the others are named after their directory",
    )
    add_server(parser)
    parser.add_argument("--no-speculate", action="store_true", help="disable speculative decoding")
    parser.add_argument(
        "--learn",
        metavar="DIR",
        help="train draft heads on the model's own answers while the server is idle; DIR gets states and token ids of "
        "answers, no text. Answers do not change",
    )
    parser.add_argument(
        "--prefix-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="most prompt tokens whose keys and values of the base are kept for later requests, of any adapter with "
        "shadow.injection_after and of the base; 0 keeps none (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-loading",
        action="store_true",
        help="allow loading and unloading adapters over HTTP, with an admin key and from --adapter-root",
    )
    parser.add_argument("--adapter-root", metavar="DIR", help="directory that adapters may be loaded from")


def serve_cloud(arguments: argparse.Namespace) -> int:
    """Serve runs until the process is terminated."""
    config = server_config(arguments, arguments.allow_loading, arguments.adapter_root)
    paths = adapter_paths(arguments.run, arguments.name)
    return run_server(config, lambda: _cloud_app(paths, arguments, config))


def _cloud_app(paths: dict[str, Path], arguments: argparse.Namespace, config: ServerConfig) -> Any:
    """Load the runs and return the HTTP app."""
    from shadowtune.serving.engine.engine import Engine
    from shadowtune.serving.engine.scheduler import Limits
    from shadowtune.serving.http.app import create_app

    limits = Limits(
        max_sequences=arguments.max_rows,
        max_queue=arguments.max_queue,
        prefix_tokens=arguments.prefix_tokens,
        speculation=None if arguments.no_speculate else SpeculationConfig(),
        close_seconds=CLOSE_SECONDS,
    )
    loaded = load_adapters({name: source_path(str(path)) for name, path in paths.items()}, print_status)

    def open_adapter(path: str) -> "LoadedAdapter":
        try:
            source = read_adapter_source(Path(path))
            model = load_adapter(source, loaded.base)
            check_finite(path, model)
            return model, source.prompt_format
        except OSError as error:  # an invalid path, or one without permission
            raise CheckpointError(error.strerror or str(error)) from None

    learn = None if arguments.learn is None else Path(arguments.learn)
    engine = Engine(loaded.base, loaded.tokenizer, loaded.adapters, limits, open_adapter, learn)
    return create_app(engine, config, "cloud", adapters=engine, counters=engine.counters)


def add_edge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``serve edge``."""
    parser.add_argument("edge", help=f"{SOURCE}; a shadow is detached")
    parser.add_argument(
        "--cloud",
        metavar="URL",
        help="a server with OpenAI's API, for what the policy defers: ours, vLLM, llama.cpp (default: none)",
    )
    add_cloud(parser)
    defaults = CloudConfig("http://cloud")
    timeouts = {
        "deadline": "seconds until the first token of the cloud, all attempts together",
        "connect-timeout": "seconds for a connection to the cloud",
        "first-token-timeout": "seconds until the first token of one attempt",
        "idle-timeout": "seconds between two chunks of its answer",
    }
    for name, what in timeouts.items():
        default = vars(defaults)[name.replace("-", "_")]
        parser.add_argument(f"--cloud-{name}", type=float, default=default, help=f"{what} (default: %(default)g)")
    parser.add_argument(
        "--cloud-retries",
        type=int,
        default=defaults.retries,
        help="further attempts while nothing was received (default: %(default)s)",
    )
    parser.add_argument("--name", help="model name in requests (default: that of the directory or file)")
    group = parser.add_argument_group("policy")
    group.add_argument("--policy", metavar="FILE", help="file of shadowtune calibrate; the options below override it")
    group.add_argument("--policy-kind", choices=get_args(PolicyKind), help="default: confidence")
    group.add_argument("--threshold", type=float, help="answers with a lower confidence are deferred (default: 0.5)")
    group.add_argument("--signal", choices=get_args(SignalName), help="measure of confidence (default: logprob)")
    group.add_argument(
        "--value", type=float, help="policy kind token: worth of a right token in cloud tokens, in place of --threshold"
    )
    group.add_argument("--tag", help="answer by which the edge itself asks to defer (default: [REMOTE])")
    add_prices(group)
    group.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and answer (default: the model's)")
    add_server(parser)


def serve_edge(arguments: argparse.Namespace) -> int:
    """Serve a detached model with a cloud behind it until the process is terminated."""
    config = server_config(arguments)
    if arguments.cloud is None:
        _check_no_policy(arguments)
        return run_server(config, lambda: _lone_edge_app(arguments, config))
    policy = policy_of(arguments)
    cloud = cloud_of(
        arguments,
        deadline=arguments.cloud_deadline,
        retries=arguments.cloud_retries,
        connect_timeout=arguments.cloud_connect_timeout,
        first_token_timeout=arguments.cloud_first_token_timeout,
        read_timeout=max(arguments.cloud_first_token_timeout, arguments.cloud_idle_timeout),
        idle_timeout=arguments.cloud_idle_timeout,
    )
    if cloud.deadline >= config.timeout:
        raise ConfigError(
            f"--cloud-deadline {cloud.deadline:g} leaves no time for the edge; --timeout is {config.timeout:g}"
        )
    return run_server(config, lambda: _edge_app(arguments, config, policy, cloud))


def _check_no_policy(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for options that have no effect without a cloud."""
    prices = [f"price_{name}" for name in vars(Prices())]
    names = ("policy", "policy_kind", "threshold", "signal", "tag", "value", "cloud_model", "cloud_key_file", *prices)
    given = [f"--{name.replace('_', '-')}" for name in names if vars(arguments)[name] is not None]
    if given:
        raise ConfigError(f"{', '.join(given)}: there is nothing to decide without a cloud; name one with --cloud URL")


def policy_of(arguments: argparse.Namespace) -> PolicyConfig:
    """Return the policy of the file, overridden by the options.

    Raises:
        ConfigError: if the file or an option is not valid.
    """
    policy = PolicyConfig.load(Path(arguments.policy)) if arguments.policy else PolicyConfig()
    options = {name: vars(arguments)[name] for name in ("threshold", "signal", "tag", "value")}
    options["kind"] = arguments.policy_kind
    changes = {name: value for name, value in options.items() if value is not None}
    if changes.get("signal", policy.signal) != policy.signal:
        changes["curve"] = ()  # it was measured with the other signal
    if changes.get("kind", policy.kind) == "token":
        changes["curve"] = ()  # it is of whole answers
    return replace(policy, **changes, prices=prices_of(arguments, policy.prices))


def _edge_app(arguments: argparse.Namespace, config: ServerConfig, policy: PolicyConfig, cloud: CloudConfig) -> Any:
    """Load the model and return the HTTP app."""
    from shadowtune.serving.edge.remote import RemoteEndpoint
    from shadowtune.serving.edge.router import Router
    from shadowtune.serving.http.app import create_app

    edge = _edge(arguments, policy)
    router = Router(edge, RemoteEndpoint(cloud), policy, config.timeout - cloud.deadline)
    return create_app(router, config, "edge", policy=router, counters=router.counters)


def _lone_edge_app(arguments: argparse.Namespace, config: ServerConfig) -> Any:
    """Load the model and return the HTTP app of an edge without a cloud, which streams its answers."""
    from shadowtune.serving.http.app import create_app

    edge = _edge(arguments)
    return create_app(edge, config, "edge", counters=edge.counters)


def _check_deferral_head(opened: "LoadedModel", policy: PolicyConfig, path: Path) -> None:
    """Raise ConfigError if the policy reads a deferral head that the model does not have, or not at each token."""
    from shadowtune.export.runtimes import GgufModel

    if opened.deferral_head is None:
        raise ConfigError(
            f"signal {policy.signal} of the policy reads a deferral head, and {path} has none; train with "
            "deferral_fraction, or take another --signal"
        )
    if policy.kind == "token" and isinstance(opened.runtime, GgufModel):
        raise ConfigError(
            "kind token reads the deferral head at each token, which llama.cpp has for whole answers only; serve an "
            f"ONNX or transformers directory, or take another --signal than {policy.signal}"
        )


def _edge(arguments: argparse.Namespace, policy: PolicyConfig | None = None) -> "LocalModel":
    """Load the edge's model, and its deferral head if the policy reads it."""
    from shadowtune.serving.edge.local import LocalModel

    path = Path(arguments.edge)
    print_status(f"loading {path}")
    opened = detached_model(open_source(arguments.edge, max_length=arguments.max_length))
    if arguments.max_length is not None:
        opened.max_length = min(opened.max_length, arguments.max_length)
    if policy is not None and policy.reads_deferral_head:
        _check_deferral_head(opened, policy, path)
    elif opened.deferral_head is not None:
        opened.set_deferral_head(None)  # nothing would read it
    name = path.absolute().stem if path.is_file() else path.absolute().name
    return LocalModel(opened, arguments.name or name, arguments.max_queue)


CLOUD = Command(add_cloud_arguments, serve_cloud, CLOUD_EPILOG)
EDGE = Command(add_edge_arguments, serve_edge, EDGE_EPILOG)
