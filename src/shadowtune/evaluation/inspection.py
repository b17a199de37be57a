"""Description of a run directory or a saved shadow, without loading a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shadowtune.errors import CheckpointError
from shadowtune.evaluation.run import read_run_config
from shadowtune.model.checkpoint import read_tensors
from shadowtune.model.formats.third_party import ThirdPartyAdapter
from shadowtune.model.loading import open_third_party, read_config


def describe(directory: str | Path) -> dict[str, Any]:
    """Return flat facts about a run directory, a saved shadow, or a shadow of another library.

    Raises:
        CheckpointError: if it is none of them, or its files are damaged.
    """
    path = Path(directory)
    if (path / "config.yaml").is_file():
        return _describe_run(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name a run of shadowtune train or a saved shadow")
    if (adapter := open_third_party(str(path))) is not None:
        return _describe_third_party(adapter)
    if (path / "config.json").is_file():
        return _describe_shadow(path)
    raise CheckpointError(
        f"{path} is neither a run directory (config.yaml), nor a saved shadow (config.json), nor one of shadow-peft "
        "(shadow_config.json) or PEFT (adapter_config.json)"
    )


def _describe_run(path: Path) -> dict[str, Any]:
    config = read_run_config(path)
    facts: dict[str, Any] = {"model": config.model, "method": config.method, "task": config.task}
    facts["stage"] = config.stage
    facts["train_data"] = config.data.source
    summary = path / "summary.json"
    if summary.is_file():
        facts |= {"finished": True, **json.loads(summary.read_text())}
    else:
        from transformers.trainer_utils import get_last_checkpoint  # imports peft where that is installed: seconds

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
    return facts | _describe_tensors(tensors)


def _describe_third_party(adapter: ThirdPartyAdapter) -> dict[str, Any]:
    """Describe an adapter of another library by its own settings; the base is not read."""
    facts: dict[str, Any] = {
        "library": adapter.library,
        "task": "classification" if adapter.classifies else "causal_lm",
        "base": adapter.base or "not stored",
    }
    settings = {name: value for name, value in sorted(adapter.settings.items()) if isinstance(value, int | float | str)}
    return facts | settings | _describe_tensors(adapter.tensors)


def _describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Count the parameters of each part; a part is the first two components of a name."""
    parts: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = ".".join(name.split(".")[:2])
        parts[part] = parts.get(part, 0) + tensor.numel()
    facts: dict[str, Any] = {f"tensors_{part}": count for part, count in parts.items()}
    facts["tensors_total"] = sum(parts.values())
    facts["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return facts
