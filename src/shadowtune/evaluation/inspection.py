"""What a directory holds, told without loading a model."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from shadowtune.errors import CheckpointError
from shadowtune.evaluation.run import read_run_config
from shadowtune.model.checkpoint import read_tensors
from shadowtune.model.loading import read_config


def describe(directory: str | Path) -> dict[str, Any]:
    """Return flat facts about a run directory or a saved shadow.

    Raises:
        CheckpointError: if it is neither, or its files are damaged.
    """
    path = Path(directory)
    if (path / "config.yaml").is_file():
        return _describe_run(path)
    if (path / "config.json").is_file():
        return _describe_shadow(path)
    raise CheckpointError(f"{path} is neither a run directory (config.yaml) nor a saved shadow (config.json)")


def _describe_run(path: Path) -> dict[str, Any]:
    config = read_run_config(path)
    facts: dict[str, Any] = {"model": config.model, "method": config.method, "task": config.task}
    facts["stage"] = config.stage
    facts["train_data"] = config.data.train
    summary = path / "summary.json"
    if summary.is_file():
        facts |= {"finished": True, **json.loads(summary.read_text())}
    else:
        checkpoints = path / "checkpoints"
        last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        facts |= {"finished": False, "last_checkpoint": last}
    if config.method == "shadow" and (path / "model").is_dir():
        facts |= _describe_shadow(path / "model")
    return facts


def _describe_shadow(path: Path) -> dict[str, Any]:
    config = read_config(str(path))
    assert config.base_config is not None
    assert config.backbone_config is not None
    tensors = read_tensors(str(path))
    facts: dict[str, Any] = {
        "base": config.base_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "architecture": config.base_config.model_type,
        "base_blocks": config.base_config.get_text_config(decoder=True).num_hidden_layers,
        "base_width": config.base_config.get_text_config(decoder=True).hidden_size,
        "shadow_blocks": config.backbone_config.num_hidden_layers,
        "shadow_width": config.backbone_config.hidden_size,
    }
    facts |= {name: value for name, value in config.shadow.items() if value is not None}
    if config.start is not None:
        facts["start"] = str(config.start)
    parts: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = ".".join(name.split(".")[:2])
        parts[part] = parts.get(part, 0) + tensor.numel()
    facts |= {f"tensors_{part}": count for part, count in parts.items()}
    facts["tensors_total"] = sum(parts.values())
    facts["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return facts
