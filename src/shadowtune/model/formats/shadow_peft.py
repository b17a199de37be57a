"""Adapter directories of shadow-peft 0.1: ``shadow_config.json``, ``shadow_adapter.safetensors`` and, where heads were
trained, ``shadow_modules.safetensors``.

The directory names neither its base nor, unless the backbone is a mirror of the base, the backbone's architecture. We
write the latter beside it (``backbone_config.json``); shadow-peft reads past that file.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import find_file
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.formats.adapter import (
    BACKBONE_CONFIG,
    MIRROR_SIZES,
    Built,
    PeerAdapter,
    check_base_shape,
    load_backbone_config,
    lost_settings,
    mirror_differences,
    peer_mirror,
    place_of,
    projection_faults,
    read_file,
    read_json,
    setting_faults,
    shapes_of,
    sizes_for,
    write_file,
    write_json,
)
from shadowtune.model.formats.mapping import as_ours, as_peer, folded_state, shadow_peft_dead, shadow_peft_entries

CONFIG, ADAPTER, MODULES = "shadow_config.json", "shadow_adapter.safetensors", "shadow_modules.safetensors"
HEADS = {"score": "classifier_head", "shadow_score": "shadow_classifier_head"}
"""Our heads, and what shadow-peft calls them."""
SETTINGS: dict[str, Any] = {
    "update": True,
    "depth_sharing": "backbone",
    "update_norm": True,
    "update_bias": False,
    "activation": "silu",
    "inject_first": False,
    "head_mixing": None,
    "variant": "paper",
}
"""How shadow-peft computes."""
TRAINING: dict[str, Any] = {"transform_dropout": True, "dropout_position": "rank"}
"""How it drops out in training."""
NAMES = {"injection_hidden_size": "rank", "gate_hidden_size": "update_width", "alpha": "alpha", "dropout": "dropout"}
DEFAULTS: dict[str, Any] = {
    "injection_hidden_size": 16,
    "gate_hidden_size": 10,
    "alpha": 0.1,
    "dropout": 0.2,
    "num_shadow_layers": 1,
}
SIZES = {
    "num_hidden_layers": "num_shadow_layers",
    "intermediate_size": "shadow_intermediate_size",
    "num_attention_heads": "shadow_num_attention_heads",
    "num_key_value_heads": "shadow_num_key_value_heads",
    "head_dim": "shadow_head_dim",
}
"""Sizes of a mirror in a config of transformers, and in ``shadow_config.json``."""


def open_shadow_peft(path_or_id: str, **hub: Any) -> PeerAdapter:
    """Read the files of a shadow-peft adapter.

    Raises:
        CheckpointError: if one is missing or damaged.
    """
    config = read_json(str(find_file(path_or_id, CONFIG, **hub)))
    file = find_file(path_or_id, ADAPTER, **hub)
    if file is None:
        raise CheckpointError(f"{path_or_id} has no {ADAPTER}; a shadow_adapter.pt is not read, for it can run code")
    tensors = read_file(file)
    modules_file = find_file(path_or_id, MODULES, **hub)
    modules = {} if modules_file is None else read_file(modules_file)
    listed = config.get("modules_to_save") or []
    if listed:
        modules = {name: tensor for name, tensor in modules.items() if name.split(".")[0] in listed}
    for name in sorted(modules):
        if name.split(".")[0] not in HEADS.values():
            raise ConfigError(
                f"{path_or_id}: modules_to_save holds a trained {name.split('.')[0]}; a shadow uses the base's own "
                "frozen head and cannot hold it"
            )
    classes = next((len(tensor) for name, tensor in modules.items() if name.endswith(".weight")), None)
    stored = find_file(path_or_id, BACKBONE_CONFIG, **hub)

    def build(base: PreTrainedConfig, backbone: "str | PreTrainedConfig | None") -> Built:
        if backbone is None and stored is not None:
            backbone = _stored_config(stored)
        return _build(path_or_id, config, tensors, modules, base, backbone)

    classifies = bool(modules) or any(name in HEADS.values() for name in listed)
    return PeerAdapter(
        path_or_id,
        classifies,
        build,
        num_labels=classes,
        library="shadow-peft",
        settings=config,
        tensors=tensors | modules,
    )


def _stored_config(file: str) -> PreTrainedConfig:
    values = read_json(file)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _build(
    source: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    modules: dict[str, Tensor],
    base: PreTrainedConfig,
    given: "str | PreTrainedConfig | None",
) -> Built:
    text = base.get_text_config(decoder=True)
    downs = tensors.get("shadow_injection_model.injection_downs")
    if downs is None or downs.ndim != 3:
        raise CheckpointError(f"{source} has no shadow_injection_model.injection_downs of three axes: it is damaged")
    count, width = downs.shape[:2]
    check_base_shape(source, (width, count + 1), text)
    values = {**DEFAULTS, **config}
    sizes = {name: values.get(theirs) for name, theirs in SIZES.items()}
    backbone = peer_mirror(text, sizes) if given is None else load_backbone_config(given)
    place = place_of(backbone, nested=True)
    embedding = f"shadow_model.{place.embedding_key}"
    own = given is not None and embedding in tensors
    if given is None and (
        "shadow_hidden_projection.weight" in tensors
        or (embedding in tensors and place.embedding_key == "embed_tokens.weight")
    ):
        raise ConfigError(
            f"{source} has an explicit backbone, whose architecture shadow-peft does not store; pass backbone=, the "
            "directory, id or config of the model that was its shadow_model"
        )
    shape = {ours: sizes[name] for name, ours in MIRROR_SIZES.items() if name in sizes and given is None}
    named = {ours: values[theirs] for theirs, ours in NAMES.items()} | SETTINGS | TRAINING | shape
    if own:
        named["backbone"] = given if isinstance(given, str) else source
    settings = ShadowConfig.from_dict(named | {"num_shadow_layers": backbone.num_hidden_layers})
    if not own and backbone.hidden_size != width:
        raise CheckpointError(
            f"{source} has no embedding of its own, but its backbone has width {backbone.hidden_size} and the base "
            f"{width}"
        )
    shapes = shapes_of(settings, base, backbone)
    entries = shadow_peft_entries(count, shapes, place)
    ignored = shadow_peft_dead(count) | ({embedding} if not own else set())
    ours = as_ours(entries, tensors, shapes, ignored, source)
    result = {f"shadow.{name}": tensor for name, tensor in ours.items()}
    for name, theirs in HEADS.items():
        for key, tensor in modules.items():
            if key.startswith(f"{theirs}."):
                result[f"{name}.{key.removeprefix(f'{theirs}.')}"] = tensor
    return ShadowModelConfig(settings.to_dict(), base, backbone), result


def write_shadow_peft(model: Any, staging: Path) -> list[str]:
    """Write a shadow as an adapter of shadow-peft; the update after its last block, which we do not have, is zero.

    Args:
        model: a ``ShadowForCausalLM`` or ``ShadowForSequenceClassification``.
        staging: an empty directory.

    Returns:
        Notes: settings that the files do not keep though the outputs are the same, and what loading needs.

    Raises:
        ConfigError: naming every setting that shadow-peft computes otherwise.
    """
    shadow, config = model.shadow, model.config.shadow_config
    base, backbone = model.config.base_config, shadow.backbone.config
    text = base.get_text_config(decoder=True)
    faults = setting_faults(config, SETTINGS)
    if config.update_width < 2:
        faults.append("update_width=1 (it needs 2 at least)")
    faults += projection_faults(shadow)
    if faults:
        raise ConfigError(f"shadow-peft cannot hold this shadow: {'; '.join(faults)}")
    sizes = sizes_for(backbone, text, SIZES)
    mirror = peer_mirror(text, {name: sizes[theirs] for name, theirs in SIZES.items()})
    explicit = shadow.embedding is not None or bool(mirror_differences(backbone, mirror))
    place, count = place_of(backbone, nested=True), shadow.boundaries.count
    state = folded_state(shadow)
    tensors = as_peer(shadow_peft_entries(count, state, place), state)
    d, k, dtype = text.hidden_size, config.update_width, shadow.boundaries.injection_downs.dtype
    for name in shadow_peft_dead(count):
        shape = (d,) if ".hidden_norm." in name else (k, d) if name.endswith(".0.weight") else (d, k)
        tensors[name] = torch.zeros(shape, dtype=dtype)
    copied = shadow.embedding is None and explicit  # an explicit backbone cannot share the base's embedding there
    if copied:
        tensors[f"shadow_model.{place.embedding_key}"] = model.base.get_input_embeddings().weight.to(dtype)
    elif shadow.embedding is None and place.embedding_key != "embed_tokens.weight":  # one that is there and not read
        tensors[f"shadow_model.{place.embedding_key}"] = torch.zeros(backbone.vocab_size, backbone.hidden_size)
    heads = {ours: module for ours, module in model.trained_modules().items() if ours in HEADS}
    write_json(
        staging / CONFIG,
        {
            **{theirs: config.to_dict()[ours] for theirs, ours in NAMES.items()},
            **sizes,
            "num_shadow_layers": backbone.num_hidden_layers,
            "modules_to_save": [HEADS[name] for name in heads],
        },
    )
    write_file(staging / ADAPTER, tensors)
    if heads:
        modules = {f"{HEADS[n]}.{key}": t for n, module in heads.items() for key, t in module.state_dict().items()}
        write_file(staging / MODULES, modules)
    lost = lost_settings(config, TRAINING, ("shadow_loss_weight",))
    notes = [f"not stored by shadow-peft, outputs unchanged: {', '.join(lost)}, the base's name"]
    if explicit:
        backbone.to_json_file(staging / BACKBONE_CONFIG, use_diff=False)
        notes.append(
            f"explicit backbone: shadow-peft must be given shadow_model=, a model of {BACKBONE_CONFIG}"
            + ("; the base's embedding is copied into it" if copied else "")
        )
    return notes
