"""Tensor files with checksums, and the config keys that transformers 4 reads.

A directory holds ``config.json`` and ``model.safetensors``, in shards when large. Each tensor file carries a SHA-256 of
its contents, and the index of a sharded save those of its shards, so shards of two saves are never mixed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from shadowtune.errors import CheckpointError
from shadowtune.model.files import CONFIG, INDEX, WEIGHTS

PICKLES = ("pytorch_model.bin", "shadow_adapter.pt", "model.pt")
CHECKSUM = "sha256"
TOKENIZER_CONFIG = "tokenizer_config.json"
RENAMED_TENSORS = {"shadow.draft_fusion.": "shadow.draft_head."}
"""Beginnings of tensor names in saves of release 0.1.0 -> their names now."""


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
    """Write a safetensors file with the permissions of other new files; safetensors itself lets only the owner read."""
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt", **(metadata or {})})
    file.chmod(mode)


def trained_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the tensors of modules by ``<module name>.<tensor name>``."""
    return {
        f"{prefix}.{name}": tensor for prefix, module in modules.items() for name, tensor in module.state_dict().items()
    }


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of CPU tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)}:".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path_or_id: str, checked: bool = True, **hub: Any) -> dict[str, Tensor]:
    """Read all tensors of a directory or Hub repository, those of older saves by their names of today.

    Args:
        path_or_id: a local directory or a Hub id.
        checked: whether the files must have our checksums; one that a file has is compared in any case.
        hub: keywords of ``transformers.utils.cached_file``, such as ``revision``.

    Raises:
        CheckpointError: naming the file, if it is missing, damaged, a pickle or not safetensors.
    """
    index = find_file(path_or_id, INDEX, **hub)
    checksums: dict[str, str | None] = {WEIGHTS: None} if index is None else _shards_of(index, checked)
    tensors: dict[str, Tensor] = {}
    for name, checksum in checksums.items():
        file = find_file(path_or_id, name, **hub)
        if file is None:
            pickles = [pickle for pickle in PICKLES if find_file(path_or_id, pickle, **hub) is not None]
            hint = f"; {pickles[0]} is a pickle, which is not read because it can run code" if pickles else ""
            raise CheckpointError(f"{path_or_id} has no {name}{hint}; is it a shadow saved by save_pretrained?")
        tensors.update(read_file(file, checked, checksum))
    return {_current_name(name): tensor for name, tensor in tensors.items()}


def _current_name(name: str) -> str:
    for old, new in RENAMED_TENSORS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def find_file(path_or_id: str, name: str, **hub: Any) -> str | None:
    """Return the local path of a file in a directory or Hub repository, None if it has no such file."""
    return cached_file(
        path_or_id,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        **hub,
    )


def _shards_of(index: str, checked: bool) -> dict[str, str | None]:
    """Return the checksums of the shards by their file names; None for each if they are not ``checked``."""
    try:
        content = json.loads(Path(index).read_text())
        names = sorted(set(content["weight_map"].values()))
        return {name: content["metadata"][CHECKSUM][name] if checked else None for name in names}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged or not one of a shadow: {error!r}") from None


def read_file(file: str, checked: bool = True, expected: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file or raise CheckpointError.

    Args:
        file: path.
        checked: whether it must carry a checksum; one that it has is compared in any case, and without any its
            numbers must be finite.
        expected: the checksum in the index of the save, if there is one.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            own = (handle.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from None
    if own is None and checked:
        raise CheckpointError(f"{file} carries no checksum, so it was not saved as a shadow by this library")
    check_contents(tensors, own, file)
    if expected not in (None, own):
        raise CheckpointError(
            f"{file} belongs to another save than {INDEX} beside it; save or copy the directory again"
        )
    return tensors


def check_contents(tensors: Mapping[str, Tensor], checksum: str | None, source: str) -> None:
    """Raise CheckpointError unless tensors have this checksum or, where none is known, are finite."""
    if checksum is not None:
        if tensor_checksum(tensors) != checksum:
            raise CheckpointError(f"{source} is damaged: its contents do not match their checksum; copy it again")
        return
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{source} is damaged: {name} holds NaN or infinity")


def keep_rope_theta(config: PreTrainedConfig) -> None:
    """Make ``save_pretrained`` write ``rope_theta`` beside ``rope_parameters``, for transformers 4.

    Without it, transformers 4 uses the default of the architecture and does not warn.
    """
    rope = getattr(config, "rope_parameters", None)  # architectures with learned positions have none
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), int | float):
        config.rope_theta = rope["rope_theta"]


def write_older_keys(directory: Path) -> None:
    """Add to a saved model's ``config.json`` and ``tokenizer_config.json`` the keys that transformers 4 reads.

    These are ``rope_theta`` and ``rope_scaling`` beside ``rope_parameters``, and names of tokenizer settings that both
    versions read. Rotations that differ between layers are left alone: transformers 4 has no common keys for them.
    """
    for name, change in ((CONFIG, _add_older_rope), (TOKENIZER_CONFIG, _rename_tokenizer_keys)):
        file = directory / name
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            change(values)
            file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_older_rope(values: dict[str, Any]) -> None:
    rope = values.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return
    values["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":  # transformers 5 takes these for rope_parameters: both are equal
        values["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}


def _rename_tokenizer_keys(values: dict[str, Any]) -> None:
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Version 4 adds token_type_ids by default, which causal language models refuse.
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(values.get("extra_special_tokens"), list):  # transformers 4 has a mapping under this name
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
