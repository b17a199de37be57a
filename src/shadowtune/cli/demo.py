"""``shadowtune demo``: train a shadow and LoRA on a small data set, and compare them in a report."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shadowtune.cli.command import Command, ProgressBar, print_status, print_table, write_json
from shadowtune.config.loading import dump_config, load_config
from shadowtune.config.settings import from_mapping
from shadowtune.config.training import TrainConfig
from shadowtune.errors import TrainingError

EPILOG = """examples:
  shadowtune demo
  shadowtune demo --rows 200 --test-rows 50 --output runs/quick
"""
NOTE = (
    "Requests of CLINC150 (Larson et al. 2019, CC BY 3.0): 15 intents and out-of-scope. The prompt does not list them, "
    "so the base cannot know their names. Both methods train on the same examples in the same order, and the same "
    "number of parameters. Intervals are 95 %, over the test examples; one seed. train_tokens_per_second is the whole "
    "training step; tokens_per_second is batched greedy generation of short answers, mostly prompt processing (the "
    "base's answers reach the limit)."
)
EVALUATED = {
    "base": ("shadow", "base"),
    "lora": ("lora", "attached"),
    "shadow": ("shadow", "attached"),
    "shadow-detached": ("shadow", "detached"),
}
"""Row of the report -> its run and its mode."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--output", default="runs/demo", help="directory of all files (default: runs/demo)")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default: smollm2-135m, from PyPI)")
    parser.add_argument("--rows", type=int, default=1200, help="training examples (default: 1200)")
    parser.add_argument("--test-rows", type=int, default=300, help="test examples (default: 300)")
    parser.add_argument("--epochs", type=float, default=2.0, help="epochs (default: 2)")
    parser.add_argument("--seed", type=int, default=42)


def run(arguments: argparse.Namespace) -> int:
    """Train a shadow, answer three requests, train LoRA, evaluate base, LoRA, attached and detached, and report.

    Finished parts of an interrupted demo are reused.
    """
    from shadowtune.evaluation.run import FinishedRun
    from shadowtune.models import resolve

    output = Path(arguments.output)
    print_status(f"model: {resolve(arguments.model)}")
    configs = demo_configs(arguments)
    _train("shadow", configs["shadow"])
    opened = {"shadow": FinishedRun.open(output / "shadow")}
    examples = _answer_three(opened["shadow"])
    print_table("Three requests, attached (the whole model) and detached (the shadow alone)", examples)
    _train("lora", configs["lora"])  # the comparison: what one can try is there before it
    opened["lora"] = FinishedRun.open(output / "lora")
    rows = []
    for name, (method, mode) in EVALUATED.items():
        rows.append({"method": name, **_evaluate(opened[method], mode, arguments.test_rows)})
    _report(output, rows, examples)
    print_table("Results", [_readable(row) for row in rows])
    print_status(f"look at: {output / 'report.html'}  {output / 'report.png'}  {output / 'report.json'}")
    return 0


def demo_configs(arguments: argparse.Namespace) -> dict[str, TrainConfig]:
    """Return the settings of the two runs: a shadow, and LoRA with as many trainable parameters."""
    data = {
        "train": "clinc150-demo",
        "validation": "clinc150-demo",
        "template": "Request: {prompt}\nIntent:",
        "chat_template": False,
        "limit": arguments.rows,
    }
    common: dict[str, Any] = {
        "data": data,
        "model": arguments.model,
        "epochs": arguments.epochs,
        "batch_size": 16,
        "padding_free": True,
        "samples": 0,  # they would count as training time
        "seed": arguments.seed,
    }
    methods: dict[str, dict[str, Any]] = {
        "shadow": {"preset": "recommended"},
        "lora": {"method": "lora", "lora": {"rank": 15, "alpha": 30.0}, "optimizer": {"learning_rate": 1e-3}},
    }
    return {
        name: from_mapping(TrainConfig, {**common, **settings, "output": f"{arguments.output}/{name}"})
        for name, settings in methods.items()
    }


def _train(method: str, config: TrainConfig) -> None:
    """Train in a process of its own, so that its peak memory is its own; a finished run is reused."""
    output = Path(config.output)
    if (output / "summary.json").is_file() and load_config(TrainConfig, output / "config.yaml", []) == config:
        print_status(f"{method}: trained already in {output}")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = output.with_suffix(".yaml")
    dump_config(config, settings)
    print_status(f"{method}: training")
    command = [sys.executable, "-m", "shadowtune", "train", str(settings), "--resume"]
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
        raise TrainingError(f"training {method} failed, see above; delete {output} to start it anew")
    for stale in output.glob("evaluation-*.json"):
        stale.unlink()


def _evaluate(run: Any, mode: str, limit: int) -> dict[str, Any]:
    """Evaluate one mode of a finished run, or read an earlier evaluation; return a flat row."""
    file = run.path / f"evaluation-{mode}-{limit}.json"
    if not file.is_file():
        with ProgressBar() as bar:
            show = partial(bar.show, f"evaluate {run.path.name} {mode}")
            result = run.evaluate(mode, limit=limit, batch_size=64, progress=show)
        write_json(file, "evaluate", [vars(result)])
    measured = json.loads(file.read_text())["rows"][0]
    cost = json.loads((run.path / "summary.json").read_text()) if mode != "base" else {"trainable_parameters": 0}
    return {
        "accuracy": measured["accuracy"],
        "accuracy_low": measured["accuracy_low"],
        "accuracy_high": measured["accuracy_high"],
        "loss": measured["loss"],
        "trainable_parameters": cost["trainable_parameters"],
        "train_seconds": cost.get("train_seconds"),
        "train_tokens_per_second": cost.get("tokens_per_second"),
        "peak_memory_mb": cost.get("peak_memory_mb"),
        "tokens_per_second": measured["tokens_per_second"],
    }


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns for the terminal; the report files have all."""
    interval = f"{100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f}"
    return {
        "method": row["method"],
        "accuracy %": f"{100 * row['accuracy']:.1f}",
        "95 % interval": interval,
        "trained": row["trainable_parameters"],
        "training s": row["train_seconds"],
        "tokens/s": row["train_tokens_per_second"],
        "memory MB": row["peak_memory_mb"],
        "answers, tokens/s": row["tokens_per_second"],
    }


def _answer_three(run: Any) -> list[dict[str, Any]]:
    """Answer three held-out requests, the last one out of scope, with the attached and the detached model."""
    from shadowtune.data.sources import load_rows
    from shadowtune.evaluation.generation import GenerationOptions, generate_answer

    rows = load_rows("clinc150-demo", "test")
    inside = [row for row in rows if row["completion"] != "out of scope"]
    outside = [row for row in rows if row["completion"] == "out of scope"]
    examples = [{"request": row["prompt"], "expected": row["completion"]} for row in (*inside[:2], *outside[:1])]
    for mode in ("attached", "detached"):
        with run.mode(mode) as model:
            for example in examples:
                prompt = run.prompt(example["request"])
                sampling, form = GenerationOptions(max_new_tokens=12), run.prompt_format
                answered = generate_answer(model, run.tokenizer, prompt, sampling, prompt_format=form)
                example |= {mode: answered.answer.strip(), f"{mode}_seconds": answered.seconds}
    return examples


def _report(output: Path, rows: Sequence[dict[str, Any]], examples: Sequence[dict[str, Any]]) -> None:
    """Write report.json, report.png and report.html."""
    from shadowtune.evaluation.report import draw, page, read_losses, write_page

    write_json(output / "report.json", "demo", rows, examples=list(examples))
    curves = {method: read_losses(output / method / "metrics.jsonl") for method in ("lora", "shadow")}
    picture = draw(rows, curves)
    write_page(output, picture, page("shadowtune demo: which intent?", rows, examples, picture, NOTE))


DEMO = Command(add_arguments, run, EPILOG)
