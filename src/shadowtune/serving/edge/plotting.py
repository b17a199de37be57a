"""The picture of a calibration: accuracy over what is handed over, and over what it costs."""

from typing import Any

from shadowtune.serving.edge.policy_making import Calibration
from shadowtune.tables import keep_within, line_style


def draw(figure: Any, done: Calibration) -> None:
    """Draw into an empty figure of matplotlib."""
    shares, costs = figure.subplots(1, 2, sharey=True)
    for name, points in done.curves.items():
        strong = name == done.policy.signal
        style = {"linewidth": 2.2 if strong else 1.0, "alpha": 1.0 if strong else 0.6, "label": name}
        heights = [100 * point.accuracy for point in points]
        line = line_style(len(points))
        shares.plot([100 * point.hand_over_rate for point in points], heights, line, **style)
        costs.plot([point.cost for point in points], heights, line, **style)
    points = done.curves[done.policy.signal]
    ends = [100 * points[0].accuracy, 100 * points[-1].accuracy]
    for axes, far in ((shares, 100), (costs, points[-1].cost)):
        axes.plot([0, far], ends, ":", color="#888888", label="random")
    for point, marker, label in ((done.promised, "o", "chosen"), (done.found, "x", "checked")):
        if point is not None:
            shares.plot([100 * point.hand_over_rate], [100 * point.accuracy], marker, color="black", label=label)
            costs.plot([point.cost], [100 * point.accuracy], marker, color="black")
    shares.set(title="accuracy over hand-over rate", xlabel="requests handed over, %", ylabel="accuracy, %")
    costs.set(title="accuracy over cost", xlabel="cost of a request, in cloud tokens")
    for axes in (shares, costs):
        axes.grid(alpha=0.3)
        keep_within(axes.yaxis, 0, 100)
    keep_within(shares.xaxis, 0, 100)
    keep_within(costs.xaxis, 0)
    shares.legend(fontsize="small")
