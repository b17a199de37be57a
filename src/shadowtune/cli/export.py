"""``shadowtune detach`` and ``shadowtune export``: the shadow alone, as files for other programs."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, print_table, write_json
from shadowtune.cli.loading import LoadedRun, is_run, load_run
from shadowtune.cli.source import source_path
from shadowtune.errors import CheckpointError, ConfigError

DETACH_EPILOG = """examples:
  shadowtune detach runs/clinc150 --out clinc150-small
  shadowtune detach runs/clinc150 --out clinc150-small --dtype bfloat16
"""
EXPORT_EPILOG = """examples:
  shadowtune export runs/clinc150 --to gguf --quant q8_0
  shadowtune export clinc150-small --to onnx --quant int8 --out clinc150-onnx
"""
CHECKED_PROMPTS = 8
"""Prompts on which ``detach`` compares the logits."""


def add_detach_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``detach``."""
    parser.add_argument("run", help="run directory of shadowtune train, a saved shadow, or a Hub id of one")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as trained")


def detach(arguments: argparse.Namespace) -> int:
    """Write the detached shadow as a plain transformers directory, and check it."""
    import torch

    from shadowtune.export.deferral import add_deferral_head
    from shadowtune.export.detaching import write_detached
    from shadowtune.export.exporting import check_free

    out = Path(arguments.out)
    check_free(out)
    run = load_run(source_path(arguments.run), CHECKED_PROMPTS)
    dtype = vars(torch)[arguments.dtype] if arguments.dtype else None
    model = write_detached(run.model, run.tokenizer, out, run.card, run.prompts, dtype, run.prompt_format)
    if run.deferral_head is not None:
        add_deferral_head(run.deferral_head, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {type(model).__name__}, {parameters:,} parameters, {size / 1e6:,.1f} MB")
    print_status(
        f"checked: the same logits as detached mode on {len(run.prompts)} prompts; loads with plain transformers"
    )
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``export``."""
    parser.add_argument(
        "directory", help="a detached directory, a run or saved shadow, which is detached first, or a Hub id"
    )
    parser.add_argument("--to", required=True, choices=("gguf", "onnx", "safetensors"))
    quantizations = ("f32", "f16", "bf16", "q8_0", "q4_0", "int8", "int4")
    parser.add_argument("--quant", choices=quantizations, help="default: f32, for safetensors f16")
    where = "new file or directory; default: beside the input, of a Hub id here"
    parser.add_argument("--out", metavar="PATH", help=where)
    parser.add_argument("--limit", type=int, default=32, help="held-out prompts to check on (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of each check (default %(default)s)")
    add_json(parser)


def export(arguments: argparse.Namespace) -> int:
    """Detach if need be, export, check, and print how well the file agrees."""
    check_json_target(arguments.json)
    for name in ("limit", "max_new_tokens"):
        if vars(arguments)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {vars(arguments)[name]}")
    from shadowtune.data.prompt_format import PromptFormat
    from shadowtune.export.card import read_card
    from shadowtune.export.deferral import add_deferral_head
    from shadowtune.export.detaching import built_in_prompts, write_detached
    from shadowtune.export.exporting import check_export, check_free, default_path, export, read_plain
    from shadowtune.model.deferral_files import read_deferral_head

    quantization = check_export(arguments.to, arguments.quant)
    given = Path(arguments.directory)
    beside = given if given.exists() else Path(given.name)
    out = Path(arguments.out) if arguments.out else default_path(beside, arguments.to, quantization)
    check_free(out)
    source = source_path(arguments.directory)
    with tempfile.TemporaryDirectory() as scratch:
        plain = source
        run = load_run(source, arguments.limit) if _needs_detaching(source) else None
        if run is not None:
            plain = Path(scratch) / given.name
            write_detached(run.model, run.tokenizer, plain, run.card, run.prompts, None, run.prompt_format)
            run.model = None  # free its memory
        model, tokenizer = read_plain(plain)
        prompts = run.prompts if run else built_in_prompts(tokenizer)
        prompt_format = run.prompt_format if run else PromptFormat.load(source)
        card = run.card if run else read_card(source)
        limits = (arguments.max_new_tokens, prompt_format, card)
        head = run.deferral_head if run else read_deferral_head(source)
        exported = export((model, tokenizer), arguments.to, quantization, out, prompts, *limits)
    if head is not None:
        add_deferral_head(head, out)
    row = _row(exported, quantization, run)
    print_table(f"Exported: {out}", [row])
    write_json(arguments.json, "export", [row])
    return 0


def _needs_detaching(source: Path) -> bool:
    """Whether the directory holds a run or a saved shadow rather than a plain model."""
    if is_run(source):
        return True
    try:
        return bool(json.loads((source / "config.json").read_text()).get("model_type") == "shadow")
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "config.json is damaged"
        raise CheckpointError(f"cannot read a model from {source}: {reason}") from None


def _row(exported: Any, quantization: str, run: LoadedRun | None) -> dict[str, Any]:
    agreement = exported.agreement
    row = {
        "file": str(exported.path),
        "quant": quantization,
        "megabytes": exported.bytes / 1e6,
        "checked in": exported.runtime,
        "prompts": agreement.prompts,
        "tokens": agreement.tokens,
        "equal tokens": agreement.share,
        "ties": agreement.ties,
    }
    if run is not None and run.score is not None:
        for name, answers in (("accuracy", agreement.found), ("accuracy before", agreement.expected)):
            texts = [run.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
            row[name] = sum(run.score(texts)) / len(texts)
    return row


DETACH = Command(add_detach_arguments, detach, DETACH_EPILOG)
EXPORT = Command(add_export_arguments, export, EXPORT_EPILOG)
