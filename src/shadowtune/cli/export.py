"""``shadowtune export``."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from shadowtune.cli.command import Command, add_json
from shadowtune.cli.output import check_json_target, print_table, write_json
from shadowtune.cli.trained import Trained, open_trained

EPILOG = """examples:
  shadowtune export runs/clinc150 --to gguf --quant q8_0
  shadowtune export clinc150-small --to onnx --quant int8 --out clinc150-onnx
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("directory", help="a detached directory, or a run or saved shadow, which is detached first")
    parser.add_argument("--to", required=True, choices=("gguf", "onnx", "safetensors"))
    quantizations = ("f32", "f16", "bf16", "q8_0", "q4_0", "int8", "int4")
    parser.add_argument("--quant", choices=quantizations, help="default: f32, for safetensors f16")
    parser.add_argument("--out", metavar="PATH", help="new file or directory; default: beside the input")
    parser.add_argument("--limit", type=int, default=32, help="held-out prompts to check on (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of each check (default %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Detach if need be, export, check, print how well the file agrees."""
    check_json_target(arguments.json)
    _check_counts(arguments)
    from shadowtune.data.prompt_format import PromptFormat
    from shadowtune.export.card import read_card
    from shadowtune.export.detaching import built_in_prompts, write_detached
    from shadowtune.export.exporting import check_export, check_free, default_path, export, read_plain

    source = Path(arguments.directory)
    quantization = check_export(arguments.to, arguments.quant)
    out = Path(arguments.out) if arguments.out else default_path(source, arguments.to, quantization)
    check_free(out)
    with tempfile.TemporaryDirectory() as scratch:
        trained = open_trained(source, arguments.limit) if _needs_detaching(source) else None
        if trained is not None:
            plain = Path(scratch) / source.name
            write_detached(
                trained.model, trained.tokenizer, plain, trained.card, trained.prompts, None, trained.prompt_format
            )
            trained.model = None  # its memory is needed no longer
        model, tokenizer = read_plain(Path(scratch) / source.name if trained else source)
        prompts = trained.prompts if trained else built_in_prompts(tokenizer)
        form = trained.prompt_format if trained else PromptFormat.load(source)
        card = trained.card if trained else read_card(source)
        limits = (arguments.max_new_tokens, form, card)
        exported = export((model, tokenizer), arguments.to, quantization, out, prompts, *limits)
    row = _row(exported, quantization, trained)
    print_table(f"Exported: {out}", [row])
    write_json(arguments.json, "export", [row])
    return 0


def _check_counts(arguments: argparse.Namespace) -> None:
    from shadowtune.errors import ConfigError

    for name in ("limit", "max_new_tokens"):
        if vars(arguments)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {vars(arguments)[name]}")


def _needs_detaching(source: Path) -> bool:
    """Whether the directory holds a run or a saved shadow rather than a plain model."""
    import json

    from shadowtune.cli.trained import is_run
    from shadowtune.errors import CheckpointError

    if is_run(source):
        return True
    try:
        return bool(json.loads((source / "config.json").read_text()).get("model_type") == "shadow")
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "config.json is damaged"
        raise CheckpointError(f"cannot read a model from {source}: {reason}") from None


def _row(exported: Any, quantization: str, trained: Trained | None) -> dict[str, Any]:
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
    if trained is not None and trained.score is not None:
        for name, answers in (("accuracy", agreement.found), ("accuracy before", agreement.expected)):
            texts = [trained.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
            row[name] = sum(trained.score(texts)) / len(texts)
    return row


COMMAND = Command("export", "write the shadow alone as GGUF, ONNX or smaller safetensors", add_arguments, run, EPILOG)
