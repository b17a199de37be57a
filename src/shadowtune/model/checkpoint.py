"""Files of a shadow: whole or absent, and checked when read.

A directory holds ``config.json`` and ``model.safetensors`` (in shards when large) with the trained tensors alone. Each
file is written beside its place, flushed and renamed over it. Each tensor file carries a SHA-256 of its contents.
"""

import hashlib
import json
import os
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

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "shadow_adapter.pt", "model.pt")
CHECKSUM = "sha256"


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], max_shard_size: str | int = "5GB") -> None:
    """Write tensors as safetensors into ``directory``, split into shards of at most ``max_shard_size``."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in plan.filename_to_tensors.items():
        shard = {key: tensors[key] for key in keys}
        save_file(shard, directory / name, metadata={"format": "pt", CHECKSUM: tensor_checksum(shard)})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class writing_into:  # noqa: N801 - used like a function
    """Context: collect files in a staging folder, then move each into ``directory``, ``config.json`` last.

    If anything fails before the moves, ``directory`` is as it was and the staging folder is gone.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> Path:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._staging = tempfile.TemporaryDirectory(prefix=".saving-", dir=self.directory)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.directory}: {error.strerror or error}") from None
        return Path(self._staging.name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._move()
        except OSError as problem:
            raise CheckpointError(f"cannot write to {self.directory}: {problem.strerror or problem}") from None
        finally:
            self._staging.cleanup()
        if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"cannot write to {self.directory}: {error}") from None

    def _move(self) -> None:
        files = sorted(Path(self._staging.name).iterdir(), key=lambda path: path.name == "config.json")
        for path in files:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(path, self.directory / path.name)


def trained_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Collect the tensors of modules under ``<module name>.<tensor name>``."""
    return {
        f"{prefix}.{name}": tensor for prefix, module in modules.items() for name, tensor in module.state_dict().items()
    }


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of CPU tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
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
    index = _find(path_or_id, INDEX, **hub)
    if index is None:
        names: list[str] = [WEIGHTS]
    else:
        names = sorted(set(_shards_of(index)))
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = _find(path_or_id, name, **hub)
        if file is None:
            pickles = [pickle for pickle in PICKLES if _find(path_or_id, pickle, **hub) is not None]
            hint = f"; {pickles[0]} is a pickle, which is not read because it can run code" if pickles else ""
            raise CheckpointError(f"{path_or_id} has no {name}{hint}; is it a shadow saved by save_pretrained?")
        tensors.update(_read_file(file))
    return tensors


def _find(path_or_id: str, name: str, **hub: Any) -> str | None:
    return cached_file(
        path_or_id,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        **hub,
    )


def _shards_of(index: str) -> Iterator[str]:
    try:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        yield from weight_map.values()
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from None


def _read_file(file: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            expected = (handle.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from None
    if expected is None:
        raise CheckpointError(f"{file} carries no checksum, so it was not saved as a shadow by this library")
    if tensor_checksum(tensors) != expected:
        raise CheckpointError(f"{file} is damaged: its contents do not match their checksum; copy it again")
    return tensors
