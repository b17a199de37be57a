import pytest

from shadowtune.comparison import plots
from shadowtune.comparison.plots import (
    draw_accuracies,
    draw_costs,
    draw_curves,
    draw_pareto,
    draw_scaling,
    pareto_front,
)

COSTS = {"train_seconds": 3.0, "peak_memory_mb": 100.0, "trainable_parameters": 5e6}
ROWS = [
    {
        "task": task,
        "method": method,
        "mode": mode,
        "accuracy": value,
        "accuracy_low": value - 0.1,
        "accuracy_high": value + 0.1,
        **COSTS,
    }
    for task in ("a", "b")
    for method, mode, value in (("lora", "attached", 0.6), ("shadow", "attached", 0.7), ("shadow", "detached", 0.4))
]
METHODS = ["lora", "shadow"]
CURVES = {"a": {"lora": [[(1, 2.0), (2, 1.0)], [(1, 2.0), (2, 1.5)]], "shadow": [[]]}}


def test_pictures_are_pngs_and_change_with_the_numbers():
    drawings = (
        (draw_accuracies, ROWS, [{**ROWS[0], "accuracy": 0.2}, *ROWS[1:]]),
        (draw_accuracies, ROWS, [*ROWS[:2], {**ROWS[2], "mode": "attached"}, *ROWS[3:]]),
        (draw_costs, ROWS, [{**ROWS[0], "train_seconds": 9.0}, *ROWS[1:]]),
        (draw_pareto, ROWS, [{**ROWS[0], "train_seconds": 9.0}, *ROWS[1:]]),
        (draw_pareto, ROWS, [{**ROWS[0], "peak_memory_mb": 9.0}, *ROWS[1:]]),
        (draw_pareto, ROWS, [*ROWS[:2], {**ROWS[2], "mode": "attached"}, *ROWS[3:]]),
        (draw_curves, CURVES, {"a": {"lora": [[(1, 2.0), (2, 1.9)]]}}),
    )
    for draw, shown, changed in drawings:
        picture = draw(shown, METHODS)
        assert picture.startswith(b"\x89PNG")
        assert picture == draw(shown, METHODS)
        assert picture != draw(changed, METHODS)


def test_accuracy_over_parameters_is_a_line_for_each_kind():
    rows = [
        {**row, "method": f"{row['method']}-{size}", "trainable_parameters": size} for size in (1, 4) for row in ROWS
    ]
    rows.append({**ROWS[0], "method": "base", "mode": "base", "trainable_parameters": None})
    kinds = {f"{kind}-{size}": kind for kind in METHODS for size in (1, 4)} | {"base": "base"}
    picture = draw_scaling(rows, kinds)
    assert picture == draw_scaling(list(reversed(rows[:-1]))[::-1], kinds)
    assert picture != draw_scaling([{**rows[0], "trainable_parameters": 2}, *rows[1:]], kinds)
    assert picture != draw_scaling(rows, kinds | {"lora-4": "shadow"})


def axes_of(monkeypatch, draw_it):
    """The axes that a drawing function fills."""
    figures = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    draw_it()
    return figures[0].axes


def test_a_loss_that_was_logged_once_is_a_mark(monkeypatch):
    curves = {"a": {"lora": [[(1, 2.0), (2, 1.0)]], "shadow": [[(3, 1.5)]]}}
    (axes,) = axes_of(monkeypatch, lambda: draw_curves(curves, METHODS))
    assert [line.get_marker() for line in axes.lines] == ["None", "o"]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_axes_show_no_accuracy_below_0_or_above_100(value, monkeypatch):
    rows = [
        {**row, "accuracy": value, "accuracy_low": max(0, value - 0.1), "accuracy_high": min(1, value + 0.1)}
        for row in ROWS
    ]
    for axes in axes_of(monkeypatch, lambda: draw_accuracies(rows, METHODS)):
        assert 0 <= axes.get_xlim()[0] < axes.get_xlim()[1] <= 100
    kinds = {"lora": "lora", "shadow": "shadow"}
    for axes in axes_of(monkeypatch, lambda: draw_scaling(rows, kinds)):
        assert 0 <= axes.get_ylim()[0] < axes.get_ylim()[1] <= 100


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 5.0), (2.0, 4.0), (3.0, 6.0)], [(1.0, 5.0), (3.0, 6.0)]),
        ([(2.0, 5.0), (1.0, 5.0)], [(1.0, 5.0)]),
        ([(1.0, 4.0), (1.0, 5.0)], [(1.0, 5.0)]),
        ([(3.0, 1.0)], [(3.0, 1.0)]),
    ],
)
def test_the_front_has_what_no_other_beats_in_cost_and_accuracy(points, front):
    assert pareto_front(points) == front


def test_every_one_of_twelve_methods_has_a_colour_of_its_own():
    from shadowtune.comparison.plots import _color

    methods = [f"m{number}" for number in range(12)]
    assert len({_color(methods, name) for name in methods}) == 12


def test_a_curve_of_one_point_is_seen():
    assert draw_curves({"a": {"lora": [[(1, 2.0)]]}}, METHODS) != draw_curves({"a": {"lora": [[]]}}, METHODS)
