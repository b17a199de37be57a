"""Reader and writer of adapters of our own PEFT method (``shadowtune.peft``).

``adapter_config.json`` holds the settings, under PEFT's names where these mean the same, and in ``record`` the rest of
what our ``config.json`` holds; ``sha256`` is the checksum of the shadow's tensors by our names. They are in
``adapter_model.safetensors``, which PEFT writes without a checksum.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from shadowtune.config.shadow import PEFT_NAMES, ShadowConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import (
    CHECKSUM,
    check_contents,
    find_file,
    read_file,
    tensor_checksum,
    trained_tensors,
)
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.formats.peft_shadow import ADAPTER, CONFIG, TASKS
from shadowtune.model.formats.third_party import Built, ThirdPartyAdapter, write_file, write_json

PEFT_TYPE = "SHADOWTUNE"
PREFIX, BASE_PREFIX = "base_model.shadowtune.", "base_model.model."
"""Beginnings of the keys in ``adapter_model.safetensors``: of the shadow's tensors, and of the base's."""
LIBRARY = "shadowtune: run `import shadowtune.peft` before PEFT reads this file"
"""A field of ``adapter_config.json``, for people who open an adapter without this package."""
OURS = {ours: theirs for theirs, ours in PEFT_NAMES.items()}


def adapter_settings(settings: ShadowConfig) -> dict[str, Any]:
    """Return settings by their names in ``adapter_config.json``."""
    return {OURS.get(name, name): value for name, value in settings.to_dict().items()}


def settings_of(values: Mapping[str, Any]) -> ShadowConfig:
    """Return the settings in the contents of ``adapter_config.json``; other keys are left out.

    Raises:
        ConfigError: if a value is outside its range, or settings contradict each other.
    """
    names = {OURS.get(name, name): name for name in ShadowConfig().to_dict()}
    return ShadowConfig.from_dict({ours: values[name] for name, ours in names.items() if name in values})


def record_of(config: ShadowModelConfig) -> dict[str, Any]:
    """Return what ``config.json`` holds beside the settings, as plain values."""
    record: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    del record["shadow"]
    return record


def model_config(values: Mapping[str, Any], source: str) -> ShadowModelConfig:
    """Return our config of the contents of ``adapter_config.json``.

    Raises:
        CheckpointError: if it has no record of the base and the backbone, or a damaged one.
        ConfigError: if a setting is wrong.
    """
    record = values.get("record")
    if not isinstance(record, Mapping):
        raise CheckpointError(f"{CONFIG} of {source} is damaged: it has no record of the base and the backbone")
    try:
        config = ShadowModelConfig(shadow=settings_of(values).to_dict(), **record)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{CONFIG} of {source} is damaged: {str(error).splitlines()[0]}") from None
    if config.base_config is None or config.backbone_config is None:
        raise CheckpointError(f"{CONFIG} of {source} is damaged: its record names no base or no backbone")
    return config


def shadow_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of ``adapter_model.safetensors`` by our names.

    Those of the base are left out: PEFT adds the embeddings of one that was resized, which the base itself holds.
    """
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if not name.startswith(BASE_PREFIX)}


def checksum_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the checksum of a shadow's tensors by our names; None if a process holds only its part of them."""
    if any(isinstance(tensor, DTensor) or tensor.is_meta for tensor in tensors.values()):
        return None
    return tensor_checksum({name: tensor.detach().cpu() for name, tensor in tensors.items()})


def open_shadowtune(path_or_id: str, values: dict[str, Any], **hub: Any) -> ThirdPartyAdapter:
    """Read an adapter of our PEFT method, given the contents of its ``adapter_config.json``.

    Raises:
        CheckpointError: if a file is missing or damaged.
        ConfigError: if it is for another task.
    """
    task = values.get("task_type")
    if task not in TASKS:
        raise ConfigError(f"{path_or_id} has task_type {task!r}; supported are {', '.join(TASKS)}")
    config = model_config(values, path_or_id)
    file = find_file(path_or_id, ADAPTER, **hub)
    if file is None:
        raise CheckpointError(f"{path_or_id} has no {ADAPTER}; an adapter_model.bin is not read, for it can run code")
    tensors = read_file(file, checked=False)
    if values.get(CHECKSUM) is not None:  # else their numbers are finite, which ``read_file`` has checked
        check_contents(shadow_tensors(tensors), values[CHECKSUM], file)

    def build(base: PreTrainedConfig, backbone: "str | PreTrainedConfig | None") -> Built:
        return config, shadow_tensors(tensors)

    score = tensors.get(f"{PREFIX}score.weight")
    return ThirdPartyAdapter(
        path_or_id,
        TASKS[task],
        build,
        base=values.get("base_model_name_or_path") or config.base_name_or_path,
        revision=values.get("revision") or config.base_revision,
        num_labels=None if score is None else len(score),
        library="shadowtune's PEFT method",
        settings=values,
        tensors=tensors,
    )


def write_shadowtune(model: Any, staging: Path) -> list[str]:
    """Write a shadow as an adapter of our PEFT method.

    Args:
        model: a ``ShadowForCausalLM`` or ``ShadowForSequenceClassification``.
        staging: an empty directory.

    Returns:
        A note on what loading needs.
    """
    tensors = trained_tensors(model.trained_modules())
    write_file(staging / ADAPTER, {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()})
    write_json(
        staging / CONFIG,
        {
            **adapter_settings(model.config.shadow_config),
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM" if model.can_generate() else "SEQ_CLS",
            "base_model_name_or_path": model.config.base_name_or_path or None,
            "revision": model.config.base_revision,
            "inference_mode": True,
            "library": LIBRARY,
            "record": record_of(model.config),
            CHECKSUM: checksum_of(tensors),
        },
    )
    return ["PEFT reads it after `import shadowtune.peft`"]
