"""``shadowtune train``, ``shadowtune pretrain``, and ``shadowtune init``, which writes a settings file for them."""

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, print_table, write_json
from shadowtune.cli.plan import add_sizes, dry_run, sized
from shadowtune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from shadowtune.config.training import TrainConfig

TRAIN_EPILOG = """examples:
  shadowtune train --model smollm2-135m --data tickets.csv
  shadowtune train --model org/name --data hub:org/name --output runs/mine epochs=3 optimizer.learning_rate=5e-4
  shadowtune train configs/clinc150.yaml method=lora lora.rank=8 output=runs/lora
  shadowtune train runs/lora --resume
  shadowtune train configs/clinc150.yaml --dry-run
  shadowtune train configs/clinc150.yaml --budget 4.5M --minutes 10
  torchrun --nproc-per-node 2 -m shadowtune train configs/clinc150.yaml
Without a settings file the recommended recipe is used; shadowtune init writes it. Text needs no quotes of its own:
'data.template=Request: {text}'. All settings: docs/settings.md, or shadowtune schema reference.
"""
PRETRAIN_EPILOG = """examples:
  shadowtune pretrain configs/pretrain.yaml
  shadowtune pretrain configs/pretrain.yaml data.train=corpus.txt shadow.hidden_size=192 projection_steps=100
  shadowtune pretrain runs/pretrain --resume
  shadowtune train configs/clinc150.yaml shadow.init_from=runs/pretrain/model output=runs/from-pretrained
  shadowtune detach runs/pretrain --out small-lm
"""
INIT_EPILOG = """examples:
  shadowtune init
  shadowtune init --model org/name --data tickets.csv --out tickets.yaml
  shadowtune train tickets.yaml
"""
RECIPE = "configs/recommended.yaml"
"""Settings file of the package that holds where none is named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``train`` and ``pretrain``."""
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG | RUN | key=value",
        help="YAML file with the settings of the run, or a run directory, which holds its own; then settings that "
        "override them",
    )
    add_recipe(parser)
    parser.add_argument("--output", metavar="DIR", help="run directory (output=)")
    parser.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output directory")
    parser.add_argument("--quiet", action="store_true", help="no progress and no sample answers")
    add_sizes(parser)
    add_json(parser)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--data``, enough for a run by the recommended recipe."""
    parser.add_argument("--model", metavar="M", help="base model: a directory, a Hub id, or smollm2-135m (model=)")
    parser.add_argument("--data", metavar="FILE", help="training examples: a file, or hub:org/name (data.train=)")


def read_settings(arguments: argparse.Namespace, fixed: Sequence[str] = ()) -> "TrainConfig":
    """Return the settings of a run: those of the file, the run directory or the recipe, with overrides.

    Args:
        arguments: of ``add_arguments``.
        fixed: ``key=value`` settings that override all others.

    Raises:
        ConfigError: if a setting is wrong, or there is neither a file nor data.
        CheckpointError: if a directory is named that is no run.
    """
    from shadowtune.config.loading import load_config
    from shadowtune.config.training import TrainConfig

    words = list(arguments.settings)
    given = {"model": arguments.model, "data.train": arguments.data, "output": arguments.output}
    named = [f"{key}={value}" for key, value in given.items() if value is not None]
    file = words.pop(0) if words and ("=" not in words[0] or Path(words[0]).exists()) else None
    if file is None and fixed:  # the recipe is one for tasks
        raise ConfigError("name a settings file or a run: shadowtune pretrain configs/pretrain.yaml data.train=FILE")
    if file is None:
        file, start = RECIPE, _recipe_start([*named, *words])
        print_status("settings: the recommended recipe; shadowtune init writes it to a file")
    else:
        start = []
    if Path(file).is_dir():
        if not (Path(file) / "config.yaml").is_file():
            raise CheckpointError(f"{file} is not a run directory: it has no config.yaml")
        file, start = str(Path(file) / "config.yaml"), [f"output={file}"]
    return load_config(TrainConfig, file, [*start, *named, *words, *fixed])


def _recipe_start(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that make the recipe's example one of the user's data."""
    data = [text for text in overrides if text.startswith(("data.train=", "data.task="))]
    if not data:
        raise ConfigError(
            "name a settings file, a run to resume, or data: shadowtune train --model M --data FILE; shadowtune init "
            "writes a settings file"
        )
    return ["data.train=", f"output={default_output(data[-1].partition('=')[2])}"]


def default_output(data: str) -> str:
    """Return the run directory for training examples: "runs/tickets" for data/tickets.csv.gz."""
    name = re.search(r"\w[\w -]*", Path(data).name)
    return f"runs/{name[0] if name else 'train'}"


def train(arguments: argparse.Namespace) -> int:
    """Fine-tune, and print sizes, times and losses."""
    return _train("train", "Trained", arguments)


def pretrain(arguments: argparse.Namespace) -> int:
    """Pretrain a shadow, and print sizes, times and losses."""
    return _train("pretrain", "Pretrained", arguments, ["stage=pretrain"])


def _train(command: str, title: str, arguments: argparse.Namespace, fixed: Sequence[str] = ()) -> int:
    """Train with the settings of the file, of the arguments, and of the command itself."""
    check_json_target(arguments.json)
    config = read_settings(arguments, fixed)
    config = sized(config, arguments)
    if arguments.dry_run:
        return dry_run(config, arguments.json)
    from shadowtune.training.run import train

    try:
        summary = train(config, arguments.resume, arguments.overwrite, print_status, arguments.quiet)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # the first of the processes of torchrun or accelerate, which writes
            _report(config.output)
        raise
    if summary is None:  # not the main process of a distributed run, which reports
        return 0
    _report(config.output)
    row = {name: value for name, value in asdict(summary).items() if value is not None}
    shown = {name: value for name, value in row.items() if not name.startswith("best_")}  # which has a line of its own
    print_table(f"{title}: {config.output}", [shown])
    write_json(arguments.json, command, [{"run": config.output, **row}])
    return 0


def _report(output: str) -> None:
    """Write the report of a run, if there is one, and name its file."""
    from shadowtune.evaluation.run_report import write_run_report

    if (Path(output) / "config.yaml").is_file():
        print_status(f"report: {write_run_report(output)}")


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``init``."""
    add_recipe(parser)
    parser.add_argument("--out", default="train.yaml", metavar="FILE", help="new settings file (default: %(default)s)")


def init(arguments: argparse.Namespace) -> int:
    """Write the recipe with its comments."""
    from shadowtune.config.loading import settings_file

    out = Path(arguments.out)
    if out.exists():
        raise ConfigError(f"{out} exists already; name another --out, or remove it")
    output = None if arguments.data is None else default_output(arguments.data)
    values = {"model": arguments.model, "train": arguments.data, "output": output}
    text = fill_recipe(settings_file(RECIPE).read_text(encoding="utf-8"), values, str(out))
    out.write_text(text, encoding="utf-8")
    print(f"{out}: shadowtune train {out}")
    return 0


def fill_recipe(text: str, values: Mapping[str, str | None], file: str) -> str:
    """Return the text of the recipe with other values, for a file of the user.

    Args:
        text: of the package's file.
        values: setting, by the last part of its key, -> value; None leaves the recipe's.
        file: name of the new file.
    """
    lines = [line for line in text.splitlines() if "yaml-language-server" not in line and "--data" not in line]
    lines[1] = f"#   shadowtune train {file}"
    for name, value in values.items():
        if value is not None:
            number = next(index for index, line in enumerate(lines) if line.strip().startswith(f"{name}: "))
            before, _, example = lines[number].partition(": ")
            lines[number] = f"{before}: {json.dumps(value, ensure_ascii=False)}{example[len(example.split()[0]) :]}"
    return "\n".join(lines) + "\n"


TRAIN = Command(add_arguments, train, TRAIN_EPILOG)
PRETRAIN = Command(add_arguments, pretrain, PRETRAIN_EPILOG)
INIT = Command(add_init_arguments, init, INIT_EPILOG)
