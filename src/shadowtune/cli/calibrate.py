"""``shadowtune calibrate``."""

import argparse
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, print_table, write_json
from shadowtune.cli.options import add_cloud, add_prices, add_renamed, cloud_of, prices_of
from shadowtune.config.serving import TAG, PolicyConfig, Prices, SignalName
from shadowtune.errors import ConfigError

if TYPE_CHECKING:
    from shadowtune.serving.edge.calibration import Calibration
    from shadowtune.serving.edge.thresholds import CalibrationExample, CalibrationTarget
    from shadowtune.serving.edge.token_calibration import TokenExample
    from shadowtune.serving.simulation.records import RecordedAnswer

EPILOG = """examples:
  shadowtune calibrate runs/clinc150 --cloud-run runs/clinc150 --deferral-rate 0.2 -o policy.json
  shadowtune calibrate robot.gguf --cloud-run runs/robot --accuracy 0.95 --signal auto -o policy.json
  shadowtune calibrate robot-int8 --cloud-run runs/robot --accuracy-loss 0.02 -o policy.json
  shadowtune calibrate robot-int8 --cloud-run runs/robot --policy-kind token --accuracy 0.9 -o token.json
  shadowtune calibrate robot-int8 --cloud http://cloud:8000 --data held-out.jsonl --cost 12 -o policy.json

Edge and cloud answer the examples by greedy decoding. One half of the examples selects the threshold, the other half
checks it: "promised" and "found" in the table. With --accuracy-loss one half selects the signal, and the other half a
threshold that holds with probability --guarantee. If no threshold reaches the aim, the error names the best possible.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("edge", help="a detached directory, a GGUF file, or a run, which is used detached")
    cloud = parser.add_mutually_exclusive_group(required=True)
    cloud.add_argument("--cloud-run", metavar="RUN", help="a run whose attached model is the cloud")
    cloud.add_argument("--cloud", metavar="URL", help="a server with OpenAI's API")
    add_cloud(parser)
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--accuracy", type=float, metavar="A", help="reach this accuracy (0 to 1) at the lowest cost")
    aim.add_argument(
        "--deferral-rate", type=float, metavar="R", help="defer at most this fraction of requests (0 to 1)"
    )
    add_renamed(aim, "--hand-over", "--deferral-rate", type=float)
    aim.add_argument(
        "--accuracy-loss",
        type=float,
        metavar="X",
        help="guarantee an accuracy at most X below the cloud's (above 0, below 1), with the fewest deferrals",
    )
    aim.add_argument("--cost", type=float, metavar="X", help="spend at most this much per request, on average")
    parser.add_argument(
        "--guarantee",
        type=float,
        default=0.95,
        metavar="P",
        help="probability of --accuracy-loss (default: %(default)s)",
    )
    parser.add_argument(
        "--minimum",
        type=int,
        default=5,
        metavar="N",
        help="least examples with a better answer of the cloud, and without, in each half (default: %(default)s)",
    )
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="policy.json; a figure is written beside it")
    parser.add_argument("--data", metavar="FILE", help="held-out examples with their answers; default: the run's")
    parser.add_argument("--data-split", default="validation", help="split of the data set (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="most examples")
    parser.add_argument(
        "--policy-kind",
        default="confidence",
        choices=("confidence", "token"),
        help="defer whole answers, or from the first unsure token on (default: %(default)s)",
    )
    parser.add_argument(
        "--cost-model",
        action="store_true",
        help="for token: choose the worth of a right token (value) in place of a threshold, so that long prompts are "
        "deferred less",
    )
    signals = ("auto", *get_args(SignalName))
    parser.add_argument("--signal", default="auto", choices=signals, help="measure of confidence (default: the best)")
    parser.add_argument("--tag", default=TAG, help="answer by which the edge asks to defer (default: %(default)s)")
    add_prices(parser)
    parser.add_argument("--answers", metavar="DIR", help="keep all answers there, for other aims and for simulate")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record the answers of both sides, select a threshold, check it, save the policy."""
    check_json_target(arguments.json)
    aim = _aim(arguments)
    out = Path(arguments.out)
    _check_out(out)
    prices = prices_of(arguments, Prices())
    from shadowtune.evaluation.report import new_figure, png
    from shadowtune.evaluation.scoring import mean_interval
    from shadowtune.serving.edge.calibration import plot_calibration

    figure = new_figure(9, 3.6)
    done = _calibrated(arguments, aim, prices)
    plot_calibration(figure, done)
    done.policy.save(out)
    out.with_suffix(".png").write_bytes(png(figure))
    qualities = [asdict(quality) for quality in done.qualities]
    points = _points(done)
    print_table("Routers: area under accuracy over deferral rate; 95 % intervals", _quality_rows(done))
    print_table(_rule(done.policy), points)
    if aim.kind == "accuracy-loss":
        print_status(
            f"with probability {aim.confidence:g} the accuracy is at most {aim.value:g} below the cloud's, as long as "
            "requests are like these examples"
        )
    if done.found is not None:
        low, high = mean_interval(done.scores)
        print_status(
            f"accuracy found lies between {low:.3f} and {high:.3f} (95 % interval, {len(done.scores)} examples)"
        )
    print_status(f"wrote {out} and {out.with_suffix('.png')}")
    write_json(arguments.json, "calibrate", points, qualities=qualities, policy=asdict(done.policy))
    return 0


def _aim(arguments: argparse.Namespace) -> "CalibrationTarget":
    from shadowtune.serving.edge.thresholds import CalibrationTarget

    if not 0.5 <= arguments.guarantee < 1:
        raise ConfigError(f"--guarantee must be at least 0.5 and below 1, got {arguments.guarantee:g}")
    if arguments.minimum < 0:
        raise ConfigError(f"--minimum must be at least 0, got {arguments.minimum}")
    if arguments.accuracy_loss is not None:
        if not 0 < arguments.accuracy_loss < 1:
            raise ConfigError(f"--accuracy-loss must be above 0 and below 1, got {arguments.accuracy_loss:g}")
        return CalibrationTarget("accuracy-loss", arguments.accuracy_loss, arguments.guarantee)
    for kind, high in (("accuracy", 1.0), ("deferral-rate", 1.0), ("cost", float("inf"))):
        value = vars(arguments)[kind.replace("-", "_")]
        if value is None:
            continue
        if not 0 <= value <= high:
            raise ConfigError(f"--{kind} must be {'0 to 1' if high == 1 else 'at least 0'}, got {value:g}")
        return CalibrationTarget(kind, value)  # type: ignore[arg-type]
    raise ConfigError("name an aim: --accuracy, --accuracy-loss, --deferral-rate or --cost")


def _check_out(out: Path) -> None:
    """Check now, not after an hour's work, that the policy can be written."""
    if out.is_dir() or out.suffix != ".json":
        raise ConfigError(f"-o {out} must name a file that ends in .json")
    if not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"-o {out}: {out.absolute().parent} is not a writable directory")


def _calibrated(arguments: argparse.Namespace, aim: "CalibrationTarget", prices: Prices) -> "Calibration":
    from shadowtune.serving.edge.calibration import calibrate
    from shadowtune.serving.edge.token_calibration import calibrate_tokens

    if arguments.cost_model and arguments.policy_kind != "token":
        raise ConfigError("--cost-model is for --policy-kind token; add it, or leave out --cost-model")
    pairs = _measure(arguments)
    signal, minimum = arguments.signal, arguments.minimum
    if arguments.policy_kind == "token":
        tokens = [_token_example(ours, theirs) for ours, theirs in pairs]
        return calibrate_tokens(tokens, aim, signal, prices, arguments.cost_model, minimum)
    whole = [_example(ours, theirs, arguments.tag, prices) for ours, theirs in pairs]
    return calibrate(whole, aim, signal, arguments.tag, prices, minimum)


def _measure(arguments: argparse.Namespace) -> "list[tuple[RecordedAnswer, RecordedAnswer]]":
    """Return the answers of edge and cloud to every example."""
    from shadowtune.cli.answers import edge_source, evaluation_set_of, record_answers, remote_source, run_source

    edge = edge_source(arguments.edge)
    if arguments.cloud_run:
        cloud = run_source("cloud", arguments.cloud_run)
    else:
        cloud = remote_source("cloud", cloud_of(arguments))
    examples = evaluation_set_of(edge, cloud, arguments.data, arguments.data_split, arguments.limit)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(arguments.answers or scratch)
        directory.mkdir(parents=True, exist_ok=True)
        both = [record_answers(source, examples, directory, arguments.quiet) for source in (edge, cloud)]
    return list(zip(*both, strict=True))


def _example(ours: "RecordedAnswer", theirs: "RecordedAnswer", tag: str, prices: Prices) -> "CalibrationExample":
    from shadowtune.serving.edge.confidence import has_tag
    from shadowtune.serving.edge.thresholds import CalibrationExample, response_cost
    from shadowtune.serving.requests import Usage

    cost = response_cost(prices, Usage(theirs.prompt_tokens, theirs.completion_tokens))
    corrected = ours.text.strip() != theirs.text.strip()
    return CalibrationExample(ours.signals, has_tag(ours.text, tag), ours.score, theirs.score, cost, corrected)


def _token_example(ours: "RecordedAnswer", theirs: "RecordedAnswer") -> "TokenExample":
    from shadowtune.serving.edge.token_calibration import TokenExample
    from shadowtune.serving.requests import Usage
    from shadowtune.serving.simulation.records import RequestRecord
    from shadowtune.serving.simulation.simulator import common_prefix

    return TokenExample(
        ours.token_confidences,
        ours.score,
        theirs.score,
        common_prefix(RequestRecord(ours, theirs)),
        len(ours.tokens),
        len(theirs.tokens),
        ours.prompt_tokens,
        Usage(theirs.prompt_tokens, theirs.completion_tokens),
    )


def _rule(policy: PolicyConfig) -> str:
    """Return in words what the policy defers."""
    if policy.value is not None:
        return f"tokens with (1 - {policy.signal}) x {policy.value:.6g} above the cost of the cloud are deferred"
    what = "tokens with " if policy.kind == "token" else ""
    return f"{what}{policy.signal} below {policy.threshold:.6g} {'are' if what else 'is'} deferred"


def _quality_rows(done: "Calibration") -> list[dict[str, Any]]:
    """Return the quality of each router for a table."""
    return [
        {
            "router": each.router,
            "area": each.area,
            "area, checked": str(each.checked or "-"),
            "share of the gap": str(each.gap_share or "-"),
            "AUROC of a better answer": str(each.auroc or "-"),
            "expected calibration error": str(each.calibration_error or "-"),
            "after isotonic regression": str(each.isotonic_error or "-"),
        }
        for each in done.qualities
    ]


def _points(done: "Calibration") -> list[dict[str, Any]]:
    """Return accuracy and cost of the threshold on either half, and of edge and cloud alone."""
    curve = done.curves[done.policy.signal]
    rows = [("edge alone", curve[0]), ("promised", done.promised), ("found", done.found), ("cloud alone", curve[-1])]
    return [
        {"": name, "accuracy": point.accuracy, "deferral rate": point.deferral_rate, "cost, cloud tokens": point.cost}
        for name, point in rows
        if point is not None
    ]


CALIBRATE = Command(add_arguments, run, EPILOG)
