"""``shadowtune push``."""

import argparse
import os
import re
from pathlib import Path

from shadowtune.cli.command import Command, add_json, check_json_target, print_status, write_json
from shadowtune.cli.loading import is_run
from shadowtune.errors import CheckpointError, ConfigError

EPILOG = """examples:
  shadowtune push runs/clinc150 my-name/clinc150
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="a run directory, a directory with a model, or a GGUF file")
    parser.add_argument("repository", metavar="ORG/NAME", help="repository on the Hub; made if it does not exist")
    parser.add_argument("--public", action="store_true", help="let everyone see it (default: private)")
    parser.add_argument("--message", default="Upload by shadowtune", help="of the commit (default: %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Collect the files, and upload them in one commit."""
    check_json_target(arguments.json)
    from shadowtune.model.hub import is_hub_id, upload_model

    repository = arguments.repository
    if not is_hub_id(repository):
        raise ConfigError(f"a repository is ORG/NAME in letters, digits, '-', '_' and '.', got {repository!r}")
    files = model_files(Path(arguments.model))
    card = read_card(files, Path(arguments.model))
    files[CARD] = published_card(card, repository).encode()
    size = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values())
    visibility = "public" if arguments.public else "private"
    print_status(f"uploading {len(files)} files, {size / 1e6:,.1f} MB, to {repository} ({visibility})")
    if base := local_base(card):
        print_status(
            f"note: the model was trained beside {base}, a path of this machine; elsewhere it is loaded with base=..."
        )
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
        return {path.name: path}
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


def published_card(text: str, repository: str) -> str:
    """Return a card for the Hub: the example loads the repository, and no path of this machine is named as the base."""
    text = re.sub(r"from_pretrained\('[^']*'", f"from_pretrained({repository!r}", text)
    text = re.sub(r"(PeftModel\.from_pretrained\(base, )'[^']*'", rf"\g<1>{repository!r}", text)
    if local_base(text):
        text = re.sub(r"^base_model(_relation)?: .*\n", "", text, flags=re.MULTILINE)
    return text


def local_base(card: str) -> str | None:
    """Return the base that a card names, if it is a path of this machine or a short name of this package."""
    from shadowtune.models import NAMED

    found = re.search(r'^base_model: "(.*)"$', card, flags=re.MULTILINE)
    base = found[1] if found else ""
    return base if base and (os.path.isabs(base) or base in NAMED or Path(base).exists()) else None


PUSH = Command(add_arguments, run, EPILOG)
