"""Figures of a comparison's report: accuracies with intervals, training losses, costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from shadowtune.evaluation.report import new_figure, png
from shadowtune.tables import keep_within, line_style

COLUMNS = 3
"""Panels in a row of a figure."""
Curve = Sequence[tuple[int, float]]


def draw_accuracies(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> bytes:
    """Draw each method's accuracy with its 95 % interval, a panel for each task; detached ones hollow.

    Args:
        rows: flat rows with task, method, mode, accuracy, accuracy_low and accuracy_high, accuracies from 0 to 1.
        methods: all methods, in the order of their colours.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    tallest = max(sum(row["task"] == task for row in rows) for task in tasks)
    figure, panels = _panels(len(tasks), 0.8 + 0.32 * tallest)
    for task, axes in zip(tasks, panels, strict=False):
        shown = [row for row in rows if row["task"] == task]
        for height, row in enumerate(shown):
            color, detached = _color(methods, row["method"]), row["mode"] == "detached"
            low, mean, high = (100 * row[name] for name in ("accuracy_low", "accuracy", "accuracy_high"))
            axes.plot([low, high], [height, height], color=color)
            axes.plot([mean], [height], "o", color=color, markerfacecolor="white" if detached else color)
        names = [row["method"] + (" detached" if row["mode"] == "detached" else "") for row in shown]
        axes.set_yticks(range(len(shown)), names)
        axes.invert_yaxis()
        axes.set(title=task, xlabel="accuracy, %")
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -1.0), min(high, 101.0))
        axes.grid(axis="x", alpha=0.3)
        keep_within(axes.xaxis, 0, 100)
    return png(figure)


def draw_curves(curves: Mapping[str, Mapping[str, Sequence[Curve]]], methods: Sequence[str]) -> bytes:
    """Draw training losses over steps, a panel for each task, a line for each seed.

    Args:
        curves: (step, loss) of each seed, by task and method.
        methods: all methods, in the order of their colours.
    """
    figure, panels = _panels(len(curves), 2.6)
    for (task, by_method), axes in zip(curves.items(), panels, strict=False):
        for method, seeds in by_method.items():
            for number, points in enumerate(seeds):
                steps, losses = zip(*points, strict=True) if points else ((), ())
                axes.plot(
                    steps,
                    losses,
                    line_style(len(points)),
                    color=_color(methods, method),
                    label=method if number == 0 else None,
                    alpha=0.7,
                    linewidth=1,
                    markersize=4,
                )
        axes.set(title=task, xlabel="step", ylabel="training loss", yscale="log")
        axes.legend(fontsize="small")
    return png(figure)


def draw_scaling(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> bytes:
    """Draw accuracy over trained parameters, a panel for each task, a line for each kind of method; detached dashed.

    Args:
        rows: flat rows as for ``draw_accuracies``, with trainable_parameters; those that train nothing are left out.
        kinds: the kind of each method, such as "lora".
    """
    rows = [row for row in rows if row["trainable_parameters"]]
    tasks, names = (list(dict.fromkeys(names)) for names in ((row["task"] for row in rows), kinds.values()))
    figure, panels = _panels(len(tasks), 3.0)
    for task, axes in zip(tasks, panels, strict=False):
        shown = [row for row in rows if row["task"] == task]
        for kind, mode in dict.fromkeys((kinds[row["method"]], row["mode"]) for row in shown):
            line = [row for row in shown if (kinds[row["method"]], row["mode"]) == (kind, mode)]
            line.sort(key=lambda row: row["trainable_parameters"])
            low, mean, high = (
                [100 * row[key] for row in line] for key in ("accuracy_low", "accuracy", "accuracy_high")
            )
            millions = [row["trainable_parameters"] / 1e6 for row in line]
            color, detached = f"C{names.index(kind)}", mode == "detached"
            axes.fill_between(millions, low, high, color=color, alpha=0.1)
            style = "o--" if detached else "o-"
            axes.plot(millions, mean, style, color=color, label=f"{kind} detached" if detached else kind)
        axes.set(title=task, xlabel="trained parameters, millions", ylabel="accuracy, %", xscale="log")
        keep_within(axes.yaxis, 0, 100)
        axes.legend(fontsize="small")
    return png(figure)


def draw_pareto(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> bytes:
    """Draw the mean accuracy over tasks against training time and peak memory; the line is the Pareto front.

    Args:
        rows: flat rows with method, mode, accuracy, train_seconds and peak_memory_mb.
        methods: all methods, in the order of their colours.
    """
    figure = new_figure(11, 4.2)
    panels = (("train_seconds", "training time, s"), ("peak_memory_mb", "peak memory of training, MB"))
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        points = []
        for name, mode in dict.fromkeys((row["method"], row["mode"]) for row in rows if row[key]):
            own = [row for row in rows if (row["method"], row["mode"]) == (name, mode)]
            cost = sum(row[key] for row in own) / len(own)
            accuracy = 100 * sum(row["accuracy"] for row in own) / len(own)
            color, hollow = _color(methods, name), mode == "detached"
            axes.plot([cost], [accuracy], "o", color=color, markerfacecolor="white" if hollow else color)
            text = f"{name} detached" if hollow else name
            offset = (6, -11) if hollow else (6, 4)
            axes.annotate(text, (cost, accuracy), xytext=offset, textcoords="offset points", fontsize="small")
            points += [] if hollow else [(cost, accuracy)]
        front = pareto_front(points)
        axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0, drawstyle="steps-post")
        axes.set(xlabel=label, ylabel="accuracy, % (mean over tasks)")
        axes.margins(x=0.25, y=0.15)
        axes.grid(alpha=0.3)
    return png(figure)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, accuracy) that no other dominates, the cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def draw_costs(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> bytes:
    """Draw training time, peak memory and trained parameters of each method, means over the tasks.

    Args:
        rows: flat rows with method, mode, train_seconds, peak_memory_mb and trainable_parameters.
        methods: all methods, in the order of their colours.
    """
    trained = [row for row in rows if row["mode"] == "attached"]
    names = [method for method in methods if any(row["method"] == method for row in trained)]
    figure = new_figure(12, 1.2 + 0.32 * len(names))
    panels = (
        ("train_seconds", "training time, s", "%.0f"),
        ("peak_memory_mb", "peak memory of training, MB", "%.0f"),
        ("trainable_parameters", "trained parameters, millions", "%.2f"),
    )
    for axes, (key, title, form) in zip(figure.subplots(1, 3), panels, strict=True):
        values = []
        for name in names:
            own = [row[key] for row in trained if row["method"] == name]
            values.append(sum(own) / len(own) / (1e6 if key == "trainable_parameters" else 1))
        drawn = axes.barh(names, values, color=[_color(methods, name) for name in names])
        axes.bar_label(drawn, fmt=form, padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(title=title)
    return png(figure)


def _color(methods: Sequence[str], name: str) -> Any:
    """Return the colour of a method: one of matplotlib's ten, or of twenty where there are more methods."""
    index = methods.index(name)
    if len(methods) <= 10:
        return f"C{index}"
    from matplotlib import colormaps

    return colormaps["tab20"](index % 20)


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """Return a figure with so many axes."""
    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    figure = new_figure(4.2 * columns, height * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]
