"""``shadowtune plan``: parameters, memory and time of a run before it starts; also ``shadowtune train --dry-run``."""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, print_table, write_json
from shadowtune.config.loading import build_config, load_config, settings_file
from shadowtune.config.settings import nearest
from shadowtune.config.shapes import device_table, shapes
from shadowtune.config.training import TrainConfig
from shadowtune.errors import ConfigError

if TYPE_CHECKING:
    from shadowtune.model.speed import Clock
    from shadowtune.training.planning import Lengths, RunPlan

EPILOG = """examples:
  shadowtune plan configs/clinc150.yaml
  shadowtune plan qwen3-1.7b --length 1024 batch_size=4
  shadowtune plan llama-3-70b --device h100 --devices 8 base_dtype=bfloat16 base_quantization=nf4
  shadowtune train configs/clinc150.yaml --dry-run
"""
HERE = "cpu"
"""The device whose times are measured: this machine's processor."""
GIB = 2**30
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    named = ", ".join(shapes())
    parser.add_argument("run", metavar="CONFIG|MODEL", help=f"settings file, or a base: a directory, a Hub id, {named}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of training")
    parser.add_argument("--length", type=int, metavar="T", help="tokens of an example; default: as in the data, or 512")
    parser.add_argument(
        "--labelled",
        type=float,
        default=1.0,
        metavar="S",
        help="with --length, fraction of its tokens that are learned",
    )
    parser.add_argument("--rows", type=int, metavar="N", help="with --length, number of training examples")
    add_device(parser)
    add_json(parser)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``shadowtune train`` that plan: ``--dry-run``, ``--budget`` and ``--minutes``."""
    parser.add_argument("--dry-run", action="store_true", help="print parameters, memory and time, and do nothing else")
    parser.add_argument("--budget", metavar="N", help="trained parameters, such as 4.5M: sets rank and backbone")
    parser.add_argument("--minutes", type=float, metavar="M", help="time of training: sets the passes over the data")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--devices`` and ``--tflops``."""
    names = ", ".join(device_table())
    parser.add_argument("--device", default=HERE, metavar="NAME", help=f"{HERE} (default: this machine's), {names}")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="devices over which FSDP shards (default: 1)"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="rate that products reach on a device, in place of half of its highest",
    )


def run(arguments: argparse.Namespace) -> int:
    """Estimate a run and print the tables."""
    check_json_target(arguments.json)
    for name, least in (("length", 2), ("rows", 1), ("devices", 1)):
        value = vars(arguments)[name]
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
    if not 0 < arguments.labelled <= 1:
        raise ConfigError(f"--labelled must be a fraction above 0 and up to 1, got {arguments.labelled:g}")
    config, base = _read(arguments.run, arguments.overrides)
    from shadowtune.training.planning import Lengths, measure_lengths

    if arguments.length is not None or config.data.source == _NO_DATA:
        lengths = Lengths.given(arguments.length or 512, arguments.labelled, arguments.rows)
    else:
        lengths = measure_lengths(config)
    return show(config, lengths, arguments, base)


_NO_DATA = "none"


def _read(run: str, overrides: list[str]) -> tuple[TrainConfig, Any]:
    """Return the settings of a file, or the recommended ones for a base; and the config of a base known by name."""
    if settings_file(run).suffix in (".yaml", ".yml"):
        config = load_config(TrainConfig, run, overrides)
    else:
        values = {"model": run, "preset": "recommended", "data": {"train": _NO_DATA}}
        config = build_config(TrainConfig, values, overrides, run)
    if config.model.lower() not in shapes() or Path(config.model).exists():
        return config, None
    from shadowtune.training.planning import named_config

    return config, named_config(config.model.lower())


def sized(config: TrainConfig, arguments: argparse.Namespace) -> TrainConfig:
    """Apply ``--budget`` and ``--minutes`` to the settings of a run, and print what they set.

    Raises:
        ConfigError: if they cannot be met.
    """
    if arguments.budget is None and arguments.minutes is None:
        return config
    from shadowtune.model.speed import machine_clock
    from shadowtune.training.planning import Planner, measure_lengths
    from shadowtune.training.sizing import fit_budget, fit_minutes

    planner = Planner(machine_clock())
    if arguments.budget is not None:
        config = fit_budget(config, read_count(arguments.budget), planner)
        sizes = ("rank", "hidden_size", "num_attention_heads", "intermediate_size")
        chosen = {name: value for name in sizes if (value := vars(config.shadow)[name]) is not None}
        trained = planner.trained_parameters(config)
        print_status(f"budget: {trained:,} trained parameters: {', '.join(f'{k} {v}' for k, v in chosen.items())}")
    if arguments.minutes is not None:
        if not 0 < arguments.minutes < float("inf"):
            raise ConfigError(f"--minutes must be above 0, got {arguments.minutes:g}")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("--minutes measures in one process, and several would disagree; set epochs")
        if has_accelerator():
            raise ConfigError(
                "--minutes measures this machine's processor, but its accelerator would train; set epochs"
            )
        config = fit_minutes(config, arguments.minutes, measure_lengths(config), planner)
        print_status(f"minutes: epochs {config.epochs:g}, shadow_epochs {config.shadow_epochs:g}")
    return config


def read_count(text: str) -> int:
    """Read a number of parameters such as 4500000, 900k, 4.5M or 1B; raises ConfigError if it is none."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in _UNITS else (text, "")
    try:
        count = float(number.replace(",", "").replace("_", "")) * _UNITS.get(unit, 1)
    except ValueError:
        count = 0.0
    if not 1 <= count < 1e15:
        raise ConfigError(f"--budget takes a number of parameters, such as 4500000 or 4.5M, got {text!r}")
    return round(count)


def dry_run(config: TrainConfig, file: str | None) -> int:
    """Print the plan of a run of ``shadowtune train`` on this machine."""
    from shadowtune.training.planning import measure_lengths

    return show(config, measure_lengths(config), argparse.Namespace(device=HERE, devices=1, tflops=None, json=file))


def has_accelerator() -> bool:
    """Whether this machine trains on something else than its processor."""
    import torch

    return bool(torch.accelerator.is_available())


def clock_of(arguments: argparse.Namespace) -> "Clock":
    """Return the clock of the device in ``--device`` and ``--tflops``.

    Raises:
        ConfigError: if the device is not known.
    """
    from shadowtune.model.speed import BANDWIDTH_EFFICIENCY, EFFICIENCY, Roofline, machine_clock

    name, table = arguments.device.lower(), device_table()
    if name == HERE and arguments.tflops is None:
        return machine_clock()
    if name not in table:
        known = ", ".join([HERE, *table])
        hint = "; --tflops goes with a device other than cpu" if name == HERE else nearest(name, table)
        raise ConfigError(f"--device {arguments.device} is not known{hint}; devices: {known}")
    device = table[name]
    bandwidth = BANDWIDTH_EFFICIENCY * device["gigabytes_per_second"] * 1e9
    if arguments.tflops is not None:
        if arguments.tflops <= 0:
            raise ConfigError(f"--tflops must be above 0, got {arguments.tflops:g}")
        rate = arguments.tflops * 1e12
        return Roofline(rate, rate, bandwidth, f"not measured: {arguments.tflops:g} TFLOP/s as given")
    narrow, wide = (EFFICIENCY * device[f"tflops_{kind}"] * 1e12 for kind in ("16bit", "float32"))
    source = f"not measured: {EFFICIENCY:.0%} of the products and {BANDWIDTH_EFFICIENCY:.0%} of the bandwidth of {name}"
    return Roofline(narrow, wide, bandwidth, source)


def show(config: TrainConfig, lengths: "Lengths", arguments: argparse.Namespace, base: Any = None) -> int:
    """Print the plan of a run, and write it to ``--json``."""
    from shadowtune.training.planning import Planner

    clock = clock_of(arguments)
    plan = Planner(clock, arguments.devices, base).plan(config, lengths)
    print_plan(plan, config, lengths, arguments)
    write_json(arguments.json, "plan", [asdict(plan)], model=config.model, lengths=asdict(lengths))
    return 0


def print_plan(plan: "RunPlan", config: TrainConfig, lengths: "Lengths", arguments: argparse.Namespace) -> None:
    """Print parameters, memory and time as tables, and the notes."""
    from shadowtune.tables import duration

    table = [{"part": part, "parameters": total, "trained": trained} for part, total, trained in plan.parameters]
    totals = {"part": "all", "parameters": sum(row[1] for row in plan.parameters), "trained": plan.trained}
    print_table(f"Parameters: {config.method} on {config.model}", [*table, totals])
    each = "" if arguments.devices == 1 else f" on each of {arguments.devices} devices"
    batch = f"{config.batch_size} x {lengths.longest:.0f} tokens"
    numbers = ("weights", "optimizer", "gradients", "activations", "cache", "total")
    rows = [
        {"phase": each.phase, **{name: f"{vars(each)[name] / GIB:.2f}" for name in numbers}} for each in plan.memory
    ]
    print_table(f"Memory in GiB{each}, estimated: {batch}, base in {_precision(config)}", rows)
    times = [
        {
            "stage": time.stage,
            "steps": "?" if time.steps is None else time.steps,
            "seconds a step": f"{time.step_seconds:.3g}",
            "tokens a second": round(time.tokens_per_second),
            "time": "?" if time.seconds is None else duration(time.seconds),
        }
        for time in plan.times
    ]
    print_table(f"Time, estimated; {plan.clock}", times)
    device = device_table().get(arguments.device.lower())
    if device is not None:
        most = max(plan.memory, key=lambda each: each.total)
        fits = "fits" if most.total <= device["gib"] * GIB else "does not fit"
        room = f"the {device['gib']:g} GiB of {arguments.device}"
        print(f"{most.phase}: {most.total / GIB:.1f} GiB{each} {fits} into {room}")
    if arguments.device == HERE and has_accelerator():
        print("note: the times are those of the processor; name this machine's accelerator with --device")
    for note in plan.notes:
        print(f"note: {note}")


def _precision(config: TrainConfig) -> str:
    return config.base_dtype if config.base_quantization == "none" else config.base_quantization


PLAN = Command(add_arguments, run, EPILOG)
