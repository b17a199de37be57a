"""``shadowtune simulate``."""

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.cli.answers import (
    AnswerSource,
    edge_source,
    evaluation_set_of,
    record_answers,
    remote_source,
    run_source,
)
from shadowtune.cli.command import Command, add_json, check_json_target, print_status, print_table, write_json
from shadowtune.cli.options import add_cloud, cloud_of
from shadowtune.config.serving import ARRIVALS, PolicyConfig, SignalName, SimulationConfig
from shadowtune.errors import ConfigError

if TYPE_CHECKING:
    from shadowtune.serving.simulation.records import RequestRecord
    from shadowtune.serving.simulation.report import PolicySummary
    from shadowtune.serving.simulation.routing import AccuracyMatch
    from shadowtune.serving.simulation.simulator import SimulationResult

EPILOG = """examples:
  shadowtune simulate --edge robot-int8 --cloud runs/robot --policy policy.json
  shadowtune simulate requests.jsonl --edge robot.gguf --cloud runs/robot --lora runs/robot-lora --arrivals closed:1
  shadowtune simulate requests.jsonl --edge robot-int8 --cloud http://localhost:8000 --rtt-ms 0

Each model answers every request once, without load; its answers and seconds are kept in --output and reused by other
simulations of the same models and requests. The seconds of a cloud at a URL include the real network.
"""
HELP = {
    "rtt_ms": "round-trip time to the cloud in milliseconds",
    "jitter_ms": "largest deviation of a round trip, in milliseconds",
    "bandwidth_mbit": "megabits per second in each direction",
    "price_per_1k_tokens": "price of the cloud's prompt and completion tokens, in any currency; costs are in the same",
    "edge_speed": "speed of the edge relative to this machine",
    "cloud_speed": "speed of the cloud, likewise",
    "arrivals": ARRIVALS,
    "seed": "of arrivals, jitter and random routers",
}
PLAIN_SIGNALS: tuple[SignalName, ...] = ("logprob", "margin", "entropy", "first")
"""Signals evaluated beside the policies; the first is plotted if no policy with a threshold is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("requests", nargs="?", help="examples with answers, as in evaluate --data; default: the run's")
    parser.add_argument("--edge", required=True, help="a detached directory, a GGUF file, or a run, used detached")
    parser.add_argument("--cloud", required=True, help="a run, or the address of a server with OpenAI's API")
    parser.add_argument("--lora", metavar="RUN", help="another run, in place of the cloud")
    parser.add_argument("--policy", action="append", default=[], metavar="FILE", help="a policy.json; may be repeated")
    parser.add_argument("--split", default="test", help="split of the data set, or part of the task (default: test)")
    parser.add_argument("--limit", type=int, help="most requests")
    add_cloud(parser)
    for setting in fields(SimulationConfig):
        option, default = f"--{setting.name.replace('_', '-')}", setting.default
        parser.add_argument(
            option, type=type(default), default=default, help=f"{HELP[setting.name]} (default: {default})"
        )
    parser.add_argument("--output", default="runs/simulation", help="directory of all files (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record the answers, replay them, compare the policies."""
    check_json_target(arguments.json)
    from shadowtune.serving.simulation import routing
    from shadowtune.serving.simulation.simulator import Simulator

    config = SimulationConfig(**{setting.name: vars(arguments)[setting.name] for setting in fields(SimulationConfig)})
    policies = _policies(arguments.policy)
    simulator = Simulator(_records(arguments), config)
    results = routing.baselines(simulator)
    results += [routing.apply_policy(simulator, name, policy) for name, policy in policies.items()]
    with_threshold = (item for item in policies.items() if item[1].kind == "confidence")
    name, plotted = next(with_threshold, (PLAIN_SIGNALS[0], PolicyConfig()))
    routers = {signal: replace(plotted, signal=signal) for signal in PLAIN_SIGNALS} | policies
    rows, summaries = [_cells(result) for result in results], _summaries(results)
    areas = [{"router": name, "area": area} for name, area in routing.curve_areas(simulator, routers).items()]
    print_table(f"{len(simulator.records)} requests", [_readable(row) for row in rows])
    print_table("Area under accuracy over the fraction of deferred requests", areas)
    by_token = [item for item in policies.items() if item[1].kind == "token"]
    matches = [routing.match_accuracy(simulator, name, policy) for name, policy in by_token]
    for line in (*summaries, *matches, *map(_overload, simulator.overloaded())):
        print(line)
    _write(Path(arguments.output), results, routing.threshold_sweep(simulator, name, plotted))
    details = {"settings": asdict(config), "areas": areas, "summaries": [vars(summary) for summary in summaries]}
    details["at equal accuracy"] = [_match_row(match) for match in matches]
    write_json(arguments.json, "simulate", rows, **details)
    return 0


def _policies(files: list[str]) -> dict[str, PolicyConfig]:
    """Read policies, each under the name of its file."""
    named = {Path(file).stem: PolicyConfig.load(Path(file)) for file in files}
    if len(named) < len(files):
        raise ConfigError(f"two of the policies {', '.join(files)} have one name; rename one of the files")
    return named


def _records(arguments: argparse.Namespace) -> "list[RequestRecord]":
    """Return the answers of each model to each request."""
    from shadowtune.serving.simulation.records import RequestRecord

    sources = {"edge": edge_source(arguments.edge), "cloud": _cloud(arguments)}
    if arguments.lora:
        sources["lora"] = run_source("lora", arguments.lora)
    edge, cloud = sources["edge"], sources["cloud"]
    examples = evaluation_set_of(edge, cloud, arguments.requests, arguments.split, arguments.limit)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    answers = {name: record_answers(source, examples, output, arguments.quiet) for name, source in sources.items()}
    return [
        RequestRecord(**dict(zip(answers, row, strict=True)), request_bytes=len(request.text.encode()))
        for request, *row in zip(examples.requests, *answers.values(), strict=True)
    ]


def _cloud(arguments: argparse.Namespace) -> AnswerSource:
    if "://" in arguments.cloud:
        return remote_source("cloud", cloud_of(arguments))
    return run_source("cloud", arguments.cloud)


def _summaries(results: "list[SimulationResult]") -> "list[PolicySummary]":
    """Compare everything but random routers with the cloud alone, on the same requests."""
    import torch

    from shadowtune.comparison.statistics import bootstrap
    from shadowtune.serving.simulation.report import summarize

    cloud = next(result for result in results if result.policy == "always-cloud")
    summaries = []
    for result in results:
        if result is not cloud and not result.policy.startswith("random "):
            both = (bootstrap(torch.tensor([scores])) for scores in (result.scores, cloud.scores))
            estimate = next(both).minus(next(both)).estimate()
            summaries.append(summarize(result, cloud, (estimate.low, estimate.high)))
    return summaries


def _overload(side: str) -> str:
    return (
        f"note: the {side} alone needs longer for a request than the mean time between two of them, so its queue grows "
        "until the end; lower the rate in --arrivals"
    )


def _cells(result: "SimulationResult") -> dict[str, Any]:
    return {name: value for name, value in vars(result).items() if name != "scores"}


def _match_row(match: "AccuracyMatch") -> dict[str, Any]:
    whole = None if match.by_answer is None else _cells(match.by_answer)
    return {"policy": match.policy, "in mid-answer": _cells(match.by_token), "whole answers": whole}


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the units in its keys; a cost is in the unit of --price-per-1k-tokens."""
    words = {"cost": "cost of 1,000 requests", "p50": "p50, s", "p90": "p90, s", "p99": "p99, s"}
    words |= {"cloud_tokens": "tokens that the cloud generates"}
    words |= {"first_p50": "first token p50, s", "first_p90": "first token p90, s"}
    return {words.get(name, name): value for name, value in row.items()}


def _write(output: Path, results: "list[SimulationResult]", curve: "list[SimulationResult]") -> None:
    """Write results.jsonl and simulation.png."""
    from shadowtune.evaluation.report import new_figure, png
    from shadowtune.model.files import writing_into
    from shadowtune.serving.simulation.report import plot_simulation

    figure = new_figure(11, 4.5)
    plot_simulation(figure, results, curve)
    lines = [{"kind": "policy", **_cells(result)} for result in results]
    lines += [{"kind": "threshold", **_cells(result)} for result in curve]
    with writing_into(output) as staging:
        (staging / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (staging / "simulation.png").write_bytes(png(figure))
    print_status(f"look at: {output / 'simulation.png'}  {output / 'results.jsonl'}")


SIMULATE = Command(add_arguments, run, EPILOG)
