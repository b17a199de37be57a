from matplotlib.figure import Figure

from shadowtune.serving.simulation.report import plot_simulation
from shadowtune.serving.simulation.simulator import SimulationResult


def result(policy, accuracy, cost, p50):
    return SimulationResult(policy, accuracy, 0.5, cost, p50, 1.0, 1.0, 10.0)


RESULTS = [
    result("always-edge", 0.8, 0, 0.01),
    result("random 10%", 0.81, 2, 0.02),
    result("random 90%", 0.89, 18, 0.2),
    result("mine", 0.9, 5, 0.03),
]


def drawn(curve):
    figure = Figure()
    plot_simulation(figure, RESULTS, curve)
    return [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figure.axes
    ]


def test_accuracy_stands_over_cost_and_over_the_median_latency():
    cost, latency = drawn([result("logprob", 0.7, 1, 0.1), result("logprob", 0.9, 3, 0.4)])
    assert cost["mine"] == ([5], [90])
    assert latency["mine"] == ([0.03], [90])
    assert cost["random"] == ([2, 18], [81, 89])
    assert latency["every threshold"] == ([0.1, 0.4], [70, 90])
    assert list(cost) == ["random", "every threshold", "always-edge", "mine"]


def test_without_a_curve_there_is_none():
    assert "every threshold" not in drawn([])[0]


def test_costs_have_a_unit_and_axes_show_nothing_that_there_cannot_be():
    figure = Figure()
    plot_simulation(figure, [result("always-edge", 0.0, 0, 0.01), result("always-cloud", 1.0, 20, 0.2)], [])
    left, _ = figure.axes
    assert left.get_xlabel() == "cost of 1,000 requests, in the unit of the token price"
    assert (left.get_xlim()[0], left.get_ylim()) == (0, (0, 100))


def test_a_curve_of_one_threshold_is_a_mark():
    figure = Figure()
    plot_simulation(figure, RESULTS, [result("logprob", 0.7, 1, 0.1)])
    lines = {line.get_label(): line.get_marker() for line in figure.axes[0].lines}
    assert lines["every threshold"] == "o"
