"""Reader and writer of adapter directories of shadow-peft 0.1.

Files: ``shadow_config.json``, ``shadow_adapter.safetensors`` and, where heads were trained,
``shadow_modules.safetensors``. They name neither the base nor, unless the backbone is a mirror of the base, the
backbone's architecture. We write the latter to ``backbone_config.json``, which shadow-peft ignores.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import find_file, read_file
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.formats.third_party import (
    MIRROR_SIZES,
    BackboneKeys,
    Built,
    TensorEntry,
    ThirdPartyAdapter,
    backbone_entries,
    backbone_keys,
    check_base_shape,
    folded_state,
    from_third_party,
    load_backbone_config,
    lost_settings,
    mirror_differences,
    projection_conflicts,
    read_json,
    setting_conflicts,
    shapes_of,
    sizes_for,
    third_party_mirror,
    to_third_party,
    write_file,
    write_json,
)

CONFIG, ADAPTER, MODULES = "shadow_config.json", "shadow_adapter.safetensors", "shadow_modules.safetensors"
BACKBONE_CONFIG = "backbone_config.json"
"""Config of an explicit backbone, written by us."""
HEADS = {"score": "classifier_head", "shadow_score": "shadow_classifier_head"}
"""Names of the classification heads: ours, and those of shadow-peft."""
SETTINGS: dict[str, Any] = {
    "update": True,
    "depth_sharing": "backbone",
    "update_norm": True,
    "update_bias": False,
    "activation": "silu",
    "inject_first": False,
    "injection_start": 0.0,
    "injection_after": None,
    "logit_interpolation": None,
    "variant": "paper",
}
"""The settings that shadow-peft implements."""
TRAINING: dict[str, Any] = {"transform_dropout": True, "dropout_position": "rank"}
"""The dropout settings that it implements; they matter in training alone."""
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
UPDATE = {
    "transform_downs": "update_transforms.{}.0.weight",
    "transform_ups": "update_transforms.{}.3.weight",
    "gate_downs": "update_gates.{}.0.weight",
    "gate_ups": "update_gates.{}.2.weight",
}
"""Our stacks of the update, and the keys of shadow-peft per index."""
NORM = {
    "norm_weight": "shadow_update_model.hidden_norm.weight",
    "norm_bias": "shadow_update_model.hidden_norm.bias",
}
"""Our norm before the update, and the keys of shadow-peft."""


def shadow_peft_entries(
    boundaries: int,
    ours: Iterable[str],
    keys: BackboneKeys = BackboneKeys(),  # noqa: B008
) -> list[TensorEntry]:
    """Return the entries for a ``ShadowPeftModel`` of shadow-peft 0.1.1; ``ours`` are the keys of our shadow."""
    injection, update = "shadow_injection_model", "shadow_update_model"
    entries = [
        TensorEntry(f"{injection}.injection_downs", "boundaries.injection_downs"),
        TensorEntry(f"{injection}.injection_ups", "boundaries.injection_ups"),
    ]
    if boundaries > 1:
        entries += [TensorEntry(theirs, f"boundaries.{name}") for name, theirs in NORM.items()]
    for index in range(boundaries - 1):
        for name, theirs in UPDATE.items():
            entries.append(TensorEntry(f"{update}.{theirs.format(index)}", f"boundaries.{name}", index, True))
    return entries + backbone_entries(ours, "shadow_model.", "shadow_hidden_projection.", keys)


def shadow_peft_unused(boundaries: int) -> set[str]:
    """Return the keys of the update after the last block, which gets no gradient; with one boundary, the norm's too."""
    unused = {f"shadow_update_model.{theirs.format(boundaries - 1)}" for theirs in UPDATE.values()}
    return unused if boundaries > 1 else unused | set(NORM.values())


def open_shadow_peft(path_or_id: str, **hub: Any) -> ThirdPartyAdapter:
    """Read the files of a shadow-peft adapter.

    Raises:
        CheckpointError: if one is missing or damaged.
    """
    config = read_json(str(find_file(path_or_id, CONFIG, **hub)))
    file = find_file(path_or_id, ADAPTER, **hub)
    if file is None:
        raise CheckpointError(f"{path_or_id} has no {ADAPTER}; a shadow_adapter.pt is not read, for it can run code")
    tensors = read_file(file, checked=False)
    modules_file = find_file(path_or_id, MODULES, **hub)
    modules = {} if modules_file is None else read_file(modules_file, checked=False)
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
    return ThirdPartyAdapter(
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
    backbone = third_party_mirror(text, sizes) if given is None else load_backbone_config(given)
    keys = backbone_keys(backbone, nested=True)
    embedding = f"shadow_model.{keys.embedding_key}"
    own = given is not None and embedding in tensors
    if given is None and (
        "shadow_hidden_projection.weight" in tensors
        or (embedding in tensors and keys.embedding_key == "embed_tokens.weight")
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
    entries = shadow_peft_entries(count, shapes, keys)
    ignored = shadow_peft_unused(count) | ({embedding} if not own else set())
    ours = from_third_party(entries, tensors, shapes, ignored, source)
    result = {f"shadow.{name}": tensor for name, tensor in ours.items()}
    for name, theirs in HEADS.items():
        for key, tensor in modules.items():
            if key.startswith(f"{theirs}."):
                result[f"{name}.{key.removeprefix(f'{theirs}.')}"] = tensor
    return ShadowModelConfig(settings.to_dict(), base, backbone), result


def write_shadow_peft(model: Any, staging: Path) -> list[str]:
    """Write a shadow as an adapter of shadow-peft.

    Args:
        model: a ``ShadowForCausalLM`` or ``ShadowForSequenceClassification``.
        staging: an empty directory.

    Returns:
        Notes: settings that the files do not keep (the outputs are the same), and what loading needs.

    Raises:
        ConfigError: naming every setting that shadow-peft computes otherwise.
    """
    shadow, config = model.shadow, model.config.shadow_config
    base, backbone = model.config.base_config, shadow.backbone.config
    text = base.get_text_config(decoder=True)
    conflicts = setting_conflicts(config, SETTINGS)
    if config.update_width < 2:
        conflicts.append("update_width=1 (it needs 2 at least)")
    conflicts += projection_conflicts(shadow)
    if conflicts:
        raise ConfigError(f"shadow-peft cannot hold this shadow: {'; '.join(conflicts)}")
    sizes = sizes_for(backbone, text, SIZES)
    mirror = third_party_mirror(text, {name: sizes[theirs] for name, theirs in SIZES.items()})
    explicit = shadow.embedding is not None or bool(mirror_differences(backbone, mirror))
    copied = shadow.embedding is None and explicit  # an explicit backbone cannot share the base's embedding there
    write_file(staging / ADAPTER, _tensors(model, copied))
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


def _tensors(model: Any, copied: bool) -> dict[str, Tensor]:
    """Return the tensors of ``shadow_adapter.safetensors``; ``copied`` adds the base's embedding."""
    shadow, config, backbone = model.shadow, model.config.shadow_config, model.shadow.backbone.config
    keys, count, state = backbone_keys(backbone, nested=True), shadow.boundaries.count, folded_state(shadow)
    tensors = to_third_party(shadow_peft_entries(count, state, keys), state)
    downs = state["boundaries.injection_downs"]
    d, k, dtype = downs.shape[1], config.update_width, downs.dtype
    for name in shadow_peft_unused(count):
        shape = (d,) if ".hidden_norm." in name else (k, d) if name.endswith(".0.weight") else (d, k)
        tensors[name] = torch.zeros(shape, dtype=dtype)
    embedding = f"shadow_model.{keys.embedding_key}"
    if copied:
        tensors[embedding] = model.base.get_input_embeddings().weight.to(dtype)
    elif shadow.embedding is None and keys.embedding_key != "embed_tokens.weight":  # present there, but not read
        tensors[embedding] = torch.zeros(backbone.vocab_size, backbone.hidden_size)
    return tensors
