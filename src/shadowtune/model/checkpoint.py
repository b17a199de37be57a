"""Files of a shadow: whole or absent, and checked when read.

A directory holds ``config.json`` and ``model.safetensors`` (in shards when large) with the trained tensors alone. Each
file is written beside its place, flushed and renamed over it. Each tensor file carries a SHA-256 of its contents, and
the index of a sharded save those of its shards, so that shards of two saves are never mixed.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from shadowtune.errors import CheckpointError
from shadowtune.model.replacement import flush

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "shadow_adapter.pt", "model.pt")
CHECKSUM = "sha256"
TORCH_WRITE_ERRORS = ("inline_container", "iostream error", "PytorchStreamWriter")
"""What ``torch.save`` says, in a RuntimeError, when a file ends early; it does not say why."""


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], max_shard_size: str | int = "5GB") -> None:
    """Write tensors as safetensors into ``directory``, split into shards of at most ``max_shard_size``."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    checksums = {}
    for name, keys in plan.filename_to_tensors.items():
        shard = {key: tensors[key] for key in keys}
        checksums[name] = tensor_checksum(shard)
        save_readable(shard, directory / name, {CHECKSUM: checksums[name]})
    if plan.is_sharded:
        index = {"metadata": {**plan.metadata, CHECKSUM: checksums}, "weight_map": plan.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save_readable(tensors: dict[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that everybody may read who may read new files; by itself it is the owner's alone."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})
    file.chmod(mode)


@contextlib.contextmanager
def writing_into(directory: Path) -> Iterator[Path]:
    """Collect files in the staging folder that this context gives, then move each into ``directory``.

    If anything fails before the moves, ``directory`` is as it was and the staging folder is gone. New tensors replace
    those of an earlier save, sharded or not, and ``config.json`` is moved last.

    Raises:
        CheckpointError: if something cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as staging:
            yield Path(staging)
            _move(Path(staging), directory)
    except Exception as error:
        if isinstance(error, CheckpointError) or not is_write_error(error):
            raise
        raise CheckpointError(f"cannot write to {directory}: {write_reason(error)}") from error


def is_write_error(error: Exception) -> bool:
    """Whether an exception means that a file could not be written.

    Libraries in Rust tell of the operating system's errors in exceptions of other kinds: safetensors in its own,
    tokenizers in bare ones.
    """
    bare = type(error) is Exception and "os error" in str(error)
    return bare or isinstance(error, OSError | SafetensorError)


def write_reason(error: Exception) -> str:
    """Return why a file could not be written, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if any(part in str(error) for part in TORCH_WRITE_ERRORS):
        return "a file could not be written to its end; is the disk full?"
    if number := re.search(r"os error (\d+)", str(error)):
        return os.strerror(int(number[1]))
    return " ".join(str(error).split())


def _move(staging: Path, directory: Path) -> None:
    files = sorted(staging.iterdir(), key=lambda path: (path.name == "config.json", path.name == INDEX))
    for path in files:
        flush(path)
    names = {path.name for path in files}
    stale: list[Path] = []
    if not names.isdisjoint({WEIGHTS, INDEX}):  # the index comes first: with it gone, its shards are read by nobody
        old = [directory / INDEX, *directory.glob("model*.safetensors")]
        stale = [path for path in old if path.name not in names]
    for path in files:
        if path.name == "config.json":
            for gone in stale:
                gone.unlink(missing_ok=True)
        os.replace(path, directory / path.name)
    flush(directory)


def trained_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Collect the tensors of modules under ``<module name>.<tensor name>``."""
    return {
        f"{prefix}.{name}": tensor for prefix, module in modules.items() for name, tensor in module.state_dict().items()
    }


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)}:".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path_or_id: str, **hub: Any) -> dict[str, Tensor]:
    """Read all tensors of a directory or Hub repository.

    Args:
        path_or_id: a local directory or a Hub id.
        hub: keywords of ``transformers.utils.cached_file``, such as ``revision``.

    Raises:
        CheckpointError: naming the file, if it is missing, damaged, a pickle or not safetensors.
    """
    index = find_file(path_or_id, INDEX, **hub)
    checksums: dict[str, str | None] = {WEIGHTS: None} if index is None else _shards_of(index)
    tensors: dict[str, Tensor] = {}
    for name, checksum in checksums.items():
        file = find_file(path_or_id, name, **hub)
        if file is None:
            pickles = [pickle for pickle in PICKLES if find_file(path_or_id, pickle, **hub) is not None]
            hint = f"; {pickles[0]} is a pickle, which is not read because it can run code" if pickles else ""
            raise CheckpointError(f"{path_or_id} has no {name}{hint}; is it a shadow saved by save_pretrained?")
        tensors.update(_read_file(file, checksum))
    return tensors


def find_file(path_or_id: str, name: str, **hub: Any) -> str | None:
    """Return the local path of a file in a directory or Hub repository, None if it has no such file."""
    return cached_file(
        path_or_id,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        **hub,
    )


def _shards_of(index: str) -> dict[str, str | None]:
    """Names of the shards, each with its checksum."""
    try:
        content = json.loads(Path(index).read_text())
        return {name: content["metadata"][CHECKSUM][name] for name in sorted(set(content["weight_map"].values()))}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged or not one of a shadow: {error!r}") from None


def _read_file(file: str, expected: str | None) -> dict[str, Tensor]:
    """Read one tensor file and check it against its own checksum and, if given, the one ``expected`` by the index."""
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            own = (handle.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from None
    if own is None:
        raise CheckpointError(f"{file} carries no checksum, so it was not saved as a shadow by this library")
    if tensor_checksum(tensors) != own:
        raise CheckpointError(f"{file} is damaged: its contents do not match their checksum; copy it again")
    if expected not in (None, own):
        raise CheckpointError(
            f"{file} belongs to another save than {INDEX} beside it; save or copy the directory again"
        )
    return tensors
