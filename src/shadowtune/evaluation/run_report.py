"""Report of one training run: curves, figures, sample answers, settings and commands, in one HTML file."""

import html
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowtune.config.training import TrainConfig
from shadowtune.evaluation.report import html_page, html_table
from shadowtune.evaluation.run import read_run_config
from shadowtune.model.files import writing_into
from shadowtune.tables import format_value

REPORT = "report.html"
STAGES = {
    "shadow": "Shadow-only stage",
    "lora": "LoRA",
    "": "Training",
    "distillation": "Distillation stage",
    "drafting": "Draft head stage",
}
"""Directory of each stage's metrics in that of its run, in the order of training, and the heading of its curves."""
CURVES = {
    "attached, training": ("#3b6fd4", False),
    "attached, validation": ("#3b6fd4", True),
    "detached, training": ("#e8913a", False),
    "detached, validation": ("#e8913a", True),
    "model, training": ("#3b6fd4", False),
    "model, validation": ("#3b6fd4", True),
}
"""Colour of each curve, and whether it is of the validation examples."""
Curve = Sequence[tuple[int, float]]

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 290, 60, 34, 40
"""Size of a chart in pixels, and of its margins: labels of the axes, the legend at the top."""


def write_run_report(directory: str | Path) -> Path:
    """Write ``report.html`` into a run directory, finished or not, and return its path.

    Raises:
        CheckpointError: if the directory is no run, or the file cannot be written.
    """
    run = Path(directory)
    config = read_run_config(run)
    summary = _json_file(run / "summary.json")
    parts = [f"<p>{html.escape(_description(config, summary))}</p>"]
    rows = []
    for folder, title in STAGES.items():
        curves = loss_curves(run / folder / "metrics.jsonl", config, folder)
        if curves:
            parts.append(f"<h2>{title}</h2>{draw_svg(curves, title)}")
            rows += [{"stage": title, "loss": name, **_figures(curve)} for name, curve in curves.items()]
    parts += ["<h2>Losses</h2>", html_table(rows)] if rows else ["<p>No step was logged yet.</p>"]
    if summary:
        shown = [{"": name.replace("_", " "), "value": value} for name, value in summary.items() if value is not None]
        parts += ["<h2>Costs</h2>", html_table(shown)]
    parts += _sample_tables(run)
    if summary:
        parts += ["<h2>Use the model</h2>", *_command_list(config, run)]
    settings = html.escape((run / "config.yaml").read_text())
    parts += ["<h2>Settings</h2>", f"<details><summary>config.yaml</summary><pre>{settings}</pre></details>"]
    if environment := _json_file(run / "environment.json"):
        facts = [{"": name, "value": _flat(value)} for name, value in environment.items() if value not in (None, [])]
        parts += ["<h2>Provenance</h2>", html_table(facts)]
    with writing_into(run) as staging:
        (staging / REPORT).write_text(html_page(f"shadowtune: {run.name}", parts), encoding="utf-8")
    return run / REPORT


def loss_curves(metrics_file: Path, config: TrainConfig, stage: str = "") -> dict[str, Curve]:
    """Return (step, loss) of each curve of ``CURVES`` that a stage's ``metrics.jsonl`` has.

    Args:
        metrics_file: may be missing.
        config: settings of the run.
        stage: a key of ``STAGES``.
    """
    if not metrics_file.is_file():
        return {}
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    of_shadow = stage in ("shadow", "distillation") or (config.stage == "pretrain" and stage == "")
    attached = "detached" if of_shadow else "attached" if config.method == "shadow" and stage == "" else "model"
    found: dict[str, Curve] = {}
    for kind, prefix in (("training", ""), ("validation", "eval_")):
        total = f"{prefix}loss"
        own = [(line["step"], line.get(f"{prefix}base_loss", line[total])) for line in lines if total in line]
        shadow = [(line["step"], line[f"{prefix}shadow_loss"]) for line in lines if f"{prefix}shadow_loss" in line]
        curves = {attached: own, "detached": shadow} if shadow and attached == "attached" else {attached: own}
        found |= {
            f"{mode}, {kind}": [point for point in curve if point[1] is not None] for mode, curve in curves.items()
        }
    return {name: found[name] for name in CURVES if found.get(name)}


def draw_svg(curves: Mapping[str, Curve], title: str) -> str:
    """Draw losses over steps as an SVG element; a logarithmic axis if they span more than a factor of ten."""
    values = [loss for curve in curves.values() for _, loss in curve]
    last = max(step for curve in curves.values() for step, _ in curve)
    logarithmic = min(values) > 0 and max(values) > 10 * min(values)
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    span = (high - low) or 1.0

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 12) * step / max(last, 1)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - BOTTOM - TOP) * (1 - (scale(loss) - low) / span)

    parts = []
    for tick in _ticks(min(values), max(values), logarithmic):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - 12}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _ticks(0, last, False):
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{tick:.4g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 5}" text-anchor="middle">step</text>')
    for index, (name, curve) in enumerate(curves.items()):
        color, validation = CURVES[name]
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        dashes = ' stroke-dasharray="5 4"' if validation else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"{dashes}/>')
        if validation or len(curve) == 1:
            parts += [f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3" fill="{color}"/>' for step, loss in curve]
        left = LEFT + 172 * index
        parts.append(f'<path d="M{left} 10h24" stroke="{color}" stroke-width="2"{dashes}/>')
        parts.append(f'<text x="{left + 30}" y="14">{html.escape(name)}</text>')
    return (
        f'<svg role="img" aria-label="{html.escape(title)}: losses over steps" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'style="width:100%;font:12px system-ui,sans-serif">{"".join(parts)}</svg>'
    )


def commands(config: TrainConfig, run: Path) -> list[tuple[str, str]]:
    """Return what can be done with a finished run: a description and a command line each."""
    name, detached = shlex.quote(str(run)), shlex.quote(f"{run}-detached")
    evaluate = ("measure it on held-out examples", f"shadowtune evaluate {name}")
    if config.task == "classification":
        return [evaluate]
    to_files = [
        ("the shadow alone, as a plain transformers directory", f"shadowtune detach {name} --out {detached}"),
        ("the shadow alone, for llama.cpp", f"shadowtune export {name} --to gguf --quant q8_0"),
    ]
    if config.stage == "pretrain":
        start = f"shadowtune train CONFIG.yaml shadow.init_from={shlex.quote(str(run / 'model'))}"
        return [("train it on a task", start), *to_files]
    ask = f'shadowtune generate {name} "..."'
    if config.method != "shadow":
        return [("ask the model", ask), evaluate]
    return [
        ("ask the attached model", ask),
        ("ask the detached model", f"{ask} --mode detached"),
        evaluate,
        ("serve the attached model over HTTP", f"shadowtune serve cloud {name}"),
        *to_files,
    ]


def _command_list(config: TrainConfig, run: Path) -> Iterator[str]:
    for what, command in commands(config, run):
        yield f"<p>{html.escape(what)}<br><code>{html.escape(command)}</code></p>"


def _description(config: TrainConfig, summary: Mapping[str, Any]) -> str:
    what = f"method {config.method} on {config.model}, trained on {config.data.source}"
    return f"{what}: finished after {summary['steps']:,} steps." if summary else f"{what}: not finished."


def _figures(curve: Curve) -> dict[str, Any]:
    best = min(curve, key=lambda point: point[1])
    return {"first": float(curve[0][1]), "lowest": float(best[1]), "at_step": best[0], "last": float(curve[-1][1])}


def _sample_tables(run: Path) -> list[str]:
    """Tables of sample answers of each stage, the last evaluation's open and the earlier ones folded."""
    parts = []
    for folder, title in STAGES.items():
        file = run / folder / "samples.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        steps = list(dict.fromkeys(line["step"] for line in lines))
        for step in reversed(steps):
            shown = [line for line in lines if line["step"] == step]
            table = html_table([{name: line[name] for name in line if name != "step"} for line in shown])
            opened = " open" if step == steps[-1] else ""
            parts.append(f"<details{opened}><summary>{title}, step {step}</summary>{table}</details>")
    return ["<h2>Sample answers</h2>", *parts] if parts else []


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Return round numbers from ``low`` to ``high``, about five."""
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    else:
        raw = (high - low or abs(high) or 1.0) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
        found = [width * index for index in range(math.ceil(low / width), math.floor(high / width) + 1)]
    return [tick for tick in found if low <= tick <= high] or [low]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else format_value(value)


def _json_file(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}
