"""``shadowtune serve edge``."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from shadowtune.cli.cloud_options import add_cloud, add_prices, cloud_of, prices_of
from shadowtune.cli.command import Command
from shadowtune.cli.output import say
from shadowtune.cli.server import add_server, run_server, server_config
from shadowtune.config.cloud import CloudConfig
from shadowtune.config.policy import PolicyConfig, PolicyKind, SignalName
from shadowtune.errors import ConfigError

if TYPE_CHECKING:
    from shadowtune.config.serving import ServerConfig

EPILOG = """examples:
  shadowtune serve edge robot-int8 --cloud http://cloud:8000 --policy policy.json
  shadowtune serve edge robot.gguf --cloud http://cloud:8000 --policy-kind verify --cloud-key-file key.txt
  shadowtune serve edge robot-int8 --cloud https://vllm:8000/v1 --cloud-model big --threshold 0.8
The policy decides on the edge's whole answer, then the first byte goes out. A cloud that is slow or gone leaves the
edge's own answer, marked "fallback". Response headers x-shadowtune-side, -reason, -confidence and -cost tell.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("edge", help="a detached directory, an exported one, or a GGUF file")
    parser.add_argument(
        "--cloud", required=True, metavar="URL", help="a server with OpenAI's API: ours, vLLM, llama.cpp"
    )
    add_cloud(parser)
    defaults = CloudConfig("http://cloud")
    parser.add_argument(
        "--cloud-deadline",
        type=float,
        default=defaults.deadline,
        help="seconds for the first token of the cloud, all attempts together (default: %(default)g)",
    )
    waits = {
        "connect-timeout": "seconds for a connection to the cloud",
        "first-token-timeout": "seconds for the first token of one attempt",
        "idle-timeout": "seconds between two parts of its answer",
    }
    for name, what in waits.items():
        default = vars(defaults)[name.replace("-", "_")]
        parser.add_argument(f"--cloud-{name}", type=float, default=default, help=f"{what} (default: %(default)g)")
    parser.add_argument(
        "--cloud-retries", type=int, default=defaults.retries, help="while nothing has come (default: %(default)s)"
    )
    parser.add_argument("--name", help="of the model, as requests name it (default: of the directory or file)")
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--policy", metavar="FILE", help="what shadowtune calibrate wrote; the options below replace parts"
    )
    group.add_argument("--policy-kind", choices=get_args(PolicyKind), help="default: confidence")
    group.add_argument("--threshold", type=float, help="answers less confident are handed over (default: 0.5)")
    group.add_argument("--signal", choices=get_args(SignalName), help="what confidence is (default: logprob)")
    group.add_argument("--tag", help="answer by which the edge hands over itself (default: [REMOTE])")
    add_prices(group)
    group.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and answer (default: the model's)")
    add_server(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve a detached model, with a cloud behind it, until told to end."""
    config = server_config(arguments)
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
    return run_server(config, lambda: _build(arguments, config, policy, cloud))


def policy_of(arguments: argparse.Namespace) -> PolicyConfig:
    """Return the policy of the file with what the options replace.

    Raises:
        ConfigError: if the file or an option is no policy.
    """
    policy = PolicyConfig.load(Path(arguments.policy)) if arguments.policy else PolicyConfig()
    said = {"kind": arguments.policy_kind, "threshold": arguments.threshold, "signal": arguments.signal}
    changes = {name: value for name, value in {**said, "tag": arguments.tag}.items() if value is not None}
    if changes.get("signal", policy.signal) != policy.signal:
        changes["curve"] = ()  # it was measured with the other signal
    return replace(policy, **changes, prices=prices_of(arguments, policy.prices))


def _build(arguments: argparse.Namespace, config: "ServerConfig", policy: PolicyConfig, cloud: CloudConfig) -> Any:
    """Open the model and return the app in front of it."""
    from shadowtune.export.loading import load_model
    from shadowtune.serving.edge.local import LocalModel
    from shadowtune.serving.edge.remote import RemoteEndpoint
    from shadowtune.serving.edge.router import Router
    from shadowtune.serving.http.app import create_app

    path = Path(arguments.edge)
    say(f"loading {path}")
    opened = load_model(path, arguments.max_length)
    name = path.absolute().stem if path.is_file() else path.absolute().name
    edge = LocalModel(opened, arguments.name or name, arguments.max_queue)
    router = Router(edge, RemoteEndpoint(cloud), policy, config.timeout - cloud.deadline)
    return create_app(router, config, "edge", policy=router, counters=router.counters)


COMMAND = Command(
    "serve edge", "answer with a detached model, and ask a cloud for the rest", add_arguments, run, EPILOG
)
