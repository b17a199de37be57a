"""``shadowtune push``."""

import argparse
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, write_json
from shadowtune.cli.loading import is_run
from shadowtune.errors import CheckpointError, ConfigError

EPILOG = """examples:
  shadowtune push runs/clinc150 my-name/clinc150
  shadowtune push runs/clinc150 my-name/clinc150 --base Qwen/Qwen3-0.6B
  shadowtune push clinc150-small my-org/clinc150-small --public
  shadowtune push clinc150-small-q8_0.gguf my-org/clinc150-small-gguf
Log in first with hf auth login, or set HF_TOKEN. Of a run the trained model is uploaded: the shadow or adapter without
its base. The card is the model's README.md.
"""
CARD = "README.md"
LEFT_OUT = ("training_args.bin",)
"""Names of files that are not uploaded, beside those that begin with a dot."""
CONFIGS = ("config.json", "adapter_config.json", "shadow_config.json")
"""Files of which a directory with a model has one."""
BASE_KEYS = {"base_name_or_path": "", "base_model_name_or_path": None}
"""Keys of these files that name the base of a shadow or adapter, with their values where it has no name."""
REVISION_KEYS = ("base_revision", "revision")
"""Keys that name the commit of that base."""
NO_BASE = "none"
UNNAMED = "BASE"
"""What stands for the base in a card that does not name it."""
_CARD_BASE = re.compile(r'^base_model: "(.*)"$', flags=re.MULTILINE)
"""The line of a card that names the base."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="a run directory, a directory with a model, or a GGUF file")
    parser.add_argument("repository", metavar="ORG/NAME", help="repository on the Hub; made if it does not exist")
    parser.add_argument("--public", action="store_true", help="let everyone see it (default: private)")
    named = f"name of the base on the Hub, where the model names a directory of this machine; {NO_BASE}: no name"
    parser.add_argument("--base", metavar="ORG/NAME", help=named)
    parser.add_argument("--message", default="Upload by shadowtune", help="of the commit (default: %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Collect the files, and upload them in one commit."""
    check_json_target(arguments.json)
    from shadowtune.model.hub import is_hub_id, upload_model

    repository = arguments.repository
    if not is_hub_id(repository):
        raise ConfigError(f"a repository is ORG/NAME in letters, digits, '-', '_' and '.', got {repository!r}")
    if arguments.base not in (None, NO_BASE) and not is_hub_id(arguments.base):
        raise ConfigError(f"--base is a Hub id, ORG/NAME, or {NO_BASE}, got {arguments.base!r}")
    files = model_files(Path(arguments.model))
    card = read_card(files, Path(arguments.model))
    files |= published_configs(files, arguments.base)
    files[CARD] = published_card(card, repository, arguments.base).encode()
    size = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values())
    visibility = "public" if arguments.public else "private"
    print_status(f"uploading {len(files)} files, {size / 1e6:,.1f} MB, to {repository} ({visibility})")
    if local_base(card) and arguments.base is None:
        print_status(f"note: the card names no base: {local_base(card)} is a path of this machine; --base names it")
    address = upload_model(files, repository, arguments.public, arguments.message)
    print(address)
    row = {"model": arguments.model, "repository": repository, "public": arguments.public, "files": sorted(files)}
    write_json(arguments.json, "push", [{**row, "bytes": size, "address": address}])
    return 0


def model_files(path: Path) -> dict[str, Path | bytes]:
    """Return the files of a model by their paths in the repository.

    Raises:
        CheckpointError: if there is no model.
    """
    if path.is_file() and path.suffix == ".gguf":
        from shadowtune.model.deferral_files import head_file

        return {file.name: file for file in (path, head_file(path)) if file.is_file()}
    directory = path / "model" if is_run(path) else path
    if not directory.is_dir():
        reason = "the run has not finished training" if is_run(path) else "name a run, a directory or a GGUF file"
        raise CheckpointError(f"there is no model at {directory}: {reason}")
    found = sorted(file for file in directory.rglob("*") if file.is_file() and file.name not in LEFT_OUT)
    named = {file.relative_to(directory).as_posix(): file for file in found}
    files: dict[str, Path | bytes] = {
        name: file for name, file in named.items() if not any(part.startswith(".") for part in Path(name).parts)
    }
    if not any(name in files for name in CONFIGS):
        raise CheckpointError(f"{directory} holds no model: it has none of {', '.join(CONFIGS)}")
    return files


def read_card(files: dict[str, Path | bytes], path: Path) -> str:
    """Return the card beside a model, or in the metadata of a GGUF file.

    Raises:
        CheckpointError: if there is none.
    """
    from shadowtune.export import gguf_file

    text = None
    if isinstance(file := files.get(CARD), Path):
        text = file.read_text(encoding="utf-8")
    elif path.is_file():
        text = gguf_file.read_metadata(path).get(gguf_file.CARD)
    if text is None:
        raise CheckpointError(f"{path} has no card: write a {CARD} beside the model, with at least its title")
    return str(text)


def published_configs(files: dict[str, Path | bytes], base: str | None) -> dict[str, bytes]:
    """Return the configs that name a base, as they are uploaded.

    Args:
        files: the model's files by their paths in the repository.
        base: a Hub id that replaces the base's name, "none" for no name; None keeps it.

    Raises:
        CheckpointError: if a config is damaged.
        ConfigError: if a shadow or adapter names a directory of this machine as its base, and ``base`` is None.
    """
    configs = {name: _read_config(file) for name in CONFIGS if isinstance(file := files.get(name), Path)}
    named = {str(config[key]): name for name, config in configs.items() for key in BASE_KEYS if config.get(key)}
    if base is not None:
        changed = {name: _with_base(config, named.keys(), base) for name, config in configs.items()}
        return {
            name: json.dumps(config, indent=2).encode() for name, config in changed.items() if config != configs[name]
        }
    if local := next((each for each in named if os.path.isabs(each) or Path(each).exists()), None):
        raise ConfigError(
            f"{named[local]} names the base {local}, a path of this machine, from which nobody else can load it; pass "
            f"--base ORG/NAME with its name on the Hub, or --base {NO_BASE}; it is then loaded with base=..."
        )
    return {}


def _read_config(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError if it is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"cannot read {file}: it is damaged")
    return config


def _with_base(value: Any, named: Collection[str], base: str) -> Any:
    """Return a config in which ``base`` stands for a base of one of these names, at whatever depth."""
    if isinstance(value, list):
        return [_with_base(each, named, base) for each in value]
    if not isinstance(value, dict):
        return ("" if base == NO_BASE else base) if value in named else value
    changed: dict[str, Any] = {}
    for key, each in value.items():
        if key in BASE_KEYS:
            changed[key] = BASE_KEYS[key] if base == NO_BASE else base
        else:
            changed[key] = None if key in REVISION_KEYS else _with_base(each, named, base)
    return changed


def published_card(text: str, repository: str, base: str | None = None) -> str:
    """Return a card for the Hub: the example loads the repository, and no path of this machine is named as the base.

    Args:
        text: the card beside the model.
        repository: "org/name".
        base: a Hub id that replaces the base's name, "none" for no name; None keeps a name that others can load.
    """
    from shadowtune.models import NAMED

    text = re.sub(r"from_pretrained\('[^']*'", f"from_pretrained({repository!r}", text)
    text = re.sub(r"(PeftModel\.from_pretrained\(base, )'[^']*'", rf"\g<1>{repository!r}", text)
    if (found := _CARD_BASE.search(text)) is None:
        return text
    named, local = json.loads(f'"{found[1]}"'), local_base(text)
    if base not in (None, NO_BASE):
        return text.replace(named, str(base))
    if base == NO_BASE or local:  # the Hub knows no model of this name
        text = re.sub(r"^base_model(_relation)?: .*\n", "", text, flags=re.MULTILINE)
    if local and named not in NAMED:  # a short name works wherever this package is installed
        text = text.replace(named, UNNAMED)
    return text


def local_base(card: str) -> str | None:
    """Return the base that a card names, if it is a path of this machine or a short name of this package."""
    from shadowtune.models import NAMED

    found = _CARD_BASE.search(card)
    base = found[1] if found else ""
    return base if base and (os.path.isabs(base) or base in NAMED or Path(base).exists()) else None


PUSH = Command(add_arguments, run, EPILOG)
