"""The picture of a simulation: accuracy over cost, and over the median latency."""

from collections.abc import Sequence
from typing import Any

from shadowtune.serving.simulation.world import Result
from shadowtune.tables import keep_within, line_style

MARKERS = {"always-edge": "s", "always-cloud": "D", "lora-cloud": "v", "verify": "^", "oracle": "*"}
AXES = {"cost": "cost of 1,000 requests, in the unit of the token price", "p50": "median latency, s"}


def draw(figure: Any, results: Sequence[Result], curve: Sequence[Result]) -> None:
    """Draw results and the points of a threshold's curve into an empty figure of matplotlib."""
    random = [result for result in results if result.policy.startswith("random ")]
    others = [result for result in results if result not in random]
    for axes, (x, label) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        axes.plot(*_points(random, x), ".:", color="#9aa0a6", label="random")
        if curve:
            axes.plot(
                *_points(curve, x), line_style(len(curve)), color="#3b6fd4", linewidth=1.2, label="every threshold"
            )
        for number, result in enumerate(others):
            marker = MARKERS.get(result.policy, "o")
            axes.plot(*_points([result], x), marker, color=f"C{number}", markersize=8, label=result.policy)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    left, right = figure.axes
    left.set(ylabel="accuracy, %")
    right.set(xscale="log")
    keep_within(left.yaxis, 0, 100)  # which both share
    keep_within(left.xaxis, 0)
    right.legend(fontsize="small")


def _points(results: Sequence[Result], x: str) -> tuple[list[float], list[float]]:
    return [vars(result)[x] for result in results], [100 * result.accuracy for result in results]
