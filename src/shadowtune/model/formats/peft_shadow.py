"""Adapter directories of the Shadow tuner of Hugging Face PEFT: ``adapter_config.json``, ``adapter_model.safetensors``.

A mirror that does not share the base's embeddings has some of its own there, trained; here they stay as they are.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shadowtune.attach.architectures import architecture_of
from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import find_file
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.formats.adapter import (
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
from shadowtune.model.formats.mapping import (
    PEFT_UPDATE,
    Place,
    as_ours,
    as_peer,
    folded_state,
    peft_dead,
    peft_entries,
)

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"CAUSAL_LM": False, "SEQ_CLS": True}
"""PEFT's words for the tasks, and whether they classify."""
HEADS = {"score": "base_model.model.score", "shadow_score": "base_model.shadow_head.default"}
"""Our heads, and what PEFT calls them."""
SETTINGS: dict[str, Any] = {
    "update": True,
    "depth_sharing": "backbone",
    "update_norm": False,
    "update_bias": True,
    "activation": "gelu",
    "inject_first": True,
    "head_mixing": None,
    "variant": "paper",
}
"""How PEFT computes."""
TRAINING: dict[str, Any] = {"transform_dropout": False, "dropout_position": "hidden"}
"""How it drops out in training."""
NAMES = {
    "r": "rank",
    "update_hidden_size": "update_width",
    "shadow_alpha": "alpha",
    "shadow_dropout": "dropout",
    "auxiliary_loss_weight": "shadow_loss_weight",
}
DEFAULTS = {"r": 8, "shadow_alpha": 0.1, "shadow_dropout": 0.2, "auxiliary_loss_weight": 0.05}
SIZES = {
    "num_hidden_layers": "shadow_num_hidden_layers",
    "hidden_size": "shadow_hidden_size",
    "intermediate_size": "shadow_intermediate_size",
    "num_attention_heads": "shadow_num_attention_heads",
}
"""Sizes of a mirror in a config of transformers, and in ``adapter_config.json``."""
BACKBONE, PROJECTION = "base_model.shadow_backbone.default.", "base_model.shadow_projection.default.weight"


def open_peft(path_or_id: str, **hub: Any) -> PeerAdapter:
    """Read the files of a PEFT adapter.

    Raises:
        CheckpointError: if it is no Shadow adapter, or a file is missing or damaged.
        ConfigError: if it is for another task, or trained a module that we cannot hold.
    """
    config = read_json(str(find_file(path_or_id, CONFIG, **hub)))
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "SHADOW":
        raise CheckpointError(f"{path_or_id} is a PEFT adapter of type {kind!r}; only SHADOW can be read as a shadow")
    if task not in TASKS:
        raise ConfigError(f"{path_or_id} has task_type {task!r}; supported are {', '.join(TASKS)}")
    heads = {"score", "classifier"} if TASKS[task] else set()
    foreign = sorted(set(config.get("modules_to_save") or ()) - heads)
    if foreign:
        raise ConfigError(f"{path_or_id}: modules_to_save {', '.join(foreign)} of the base cannot be held by a shadow")
    file = find_file(path_or_id, ADAPTER, **hub)
    if file is None:
        raise CheckpointError(f"{path_or_id} has no {ADAPTER}; an adapter_model.bin is not read, for it can run code")
    tensors = read_file(file)
    score = tensors.get(f"{HEADS['score']}.weight")

    def build(base: PreTrainedConfig, backbone: "str | PreTrainedConfig | None") -> Built:
        return _build(path_or_id, config, tensors, base, backbone)

    return PeerAdapter(
        path_or_id,
        TASKS[task],
        build,
        base=config.get("base_model_name_or_path") or "",
        revision=config.get("revision"),
        num_labels=None if score is None else len(score),
        library="Hugging Face PEFT",
        settings=config,
        tensors=tensors,
    )


def block_paths(base: PreTrainedConfig) -> list[str]:
    """Return the path of each decoder block in a task model."""
    architecture, depth = architecture_of(base), base.get_text_config(decoder=True).num_hidden_layers
    return [f"{architecture.decoder}.{architecture.blocks}.{block}" for block in range(depth)]


def _build(
    source: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    base: PreTrainedConfig,
    given: "str | PreTrainedConfig | None",
) -> Built:
    text = base.get_text_config(decoder=True)
    _check_blocks(source, config, tensors, base)
    values = {**DEFAULTS, **config}
    values["update_hidden_size"] = values.get("update_hidden_size") or values["r"]
    sizes = {name: values.get(theirs) for name, theirs in SIZES.items()}
    sizes["num_hidden_layers"] = sizes["num_hidden_layers"] or 1
    mirrors = values.get("shadow_model", "mirror") == "mirror"
    backbone = peer_mirror(text, sizes) if mirrors else load_backbone_config(given or values["shadow_model"])
    shared = mirrors and values.get("share_embeddings", True) and backbone.hidden_size == text.hidden_size
    place = place_of(backbone, nested=not mirrors)
    if backbone.hidden_size == text.hidden_size and PROJECTION in tensors:
        raise ConfigError(
            f"{source} has a projection between equal widths ({text.hidden_size}), from a projected shadow_model; a "
            "shadow here has none when widths are equal"
        )
    named = {ours: values[theirs] for theirs, ours in NAMES.items()} | SETTINGS | TRAINING
    if mirrors:
        named |= {ours: sizes.get(name) for name, ours in MIRROR_SIZES.items()}
    else:
        named["backbone"] = values["shadow_model"]
    if mirrors and not shared:
        named["backbone"] = source
    settings = ShadowConfig.from_dict(named | {"num_shadow_layers": backbone.num_hidden_layers})
    shapes = shapes_of(settings, base, backbone)
    blocks = block_paths(base)
    ignored = peft_dead(blocks) | ({f"{BACKBONE}{place.embedding_key}"} if shared else set())
    heads = HEADS if TASKS[config["task_type"]] else {}
    own_heads = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in heads.items()}
    shadow = {name: tensor for name, tensor in tensors.items() if name not in own_heads}
    ours = as_ours(peft_entries(blocks, shapes, place=place), shadow, shapes, ignored, source)
    missing = sorted(own_heads.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{source} has no {', '.join(missing)}: it is damaged")
    result = {f"shadow.{name}": tensor for name, tensor in ours.items()}
    result |= {name: tensors[theirs] for theirs, name in own_heads.items()}
    return ShadowModelConfig(settings.to_dict(), base, backbone), result


def _check_blocks(source: str, config: dict[str, Any], tensors: dict[str, Tensor], base: PreTrainedConfig) -> None:
    """Refuse an adapter of another base, and one that leaves blocks of its base out."""
    text = base.get_text_config(decoder=True)
    downs = {name: tensor for name, tensor in tensors.items() if name.endswith("shadow_down.default.weight")}
    if not downs:
        raise CheckpointError(f"{source} has no shadow_down tensors: it is damaged")
    width = next(iter(downs.values())).shape[-1]
    expected = {f"base_model.model.{path}.shadow_down.default.weight" for path in block_paths(base)}
    chosen = config.get("layers_to_transform") is not None or downs.keys() < expected
    if width == text.hidden_size and chosen:
        raise ConfigError(
            f"{source} adapts {len(downs)} of {len(expected)} blocks (target_modules, layers_to_transform); a shadow "
            "here crosses all"
        )
    check_base_shape(source, (width, len(downs)), text)


def write_peft(model: Any, staging: Path) -> list[str]:
    """Write a shadow as an adapter of PEFT; the update after the last block, which we do not have, is zero.

    Args:
        model: a ``ShadowForCausalLM`` or ``ShadowForSequenceClassification``.
        staging: an empty directory.

    Returns:
        Notes: settings that the files do not keep though the outputs are the same, and what loading needs.

    Raises:
        ConfigError: naming every setting that PEFT computes otherwise.
    """
    shadow, config, base = model.shadow, model.config.shadow_config, model.config.base_config
    text, backbone = base.get_text_config(decoder=True), shadow.backbone.config
    sizes = sizes_for(backbone, text, SIZES)
    sizes["shadow_num_hidden_layers"] = backbone.num_hidden_layers
    differences = mirror_differences(
        backbone, peer_mirror(text, {name: sizes[theirs] for name, theirs in SIZES.items()})
    )
    mirrors = not differences
    narrow = projection_faults(shadow)
    faults = setting_faults(config, SETTINGS) + narrow
    if not narrow and shadow.embedding is None:
        faults += [f"backbone {difference}" for difference in differences]
    if faults:
        raise ConfigError(f"the Shadow tuner of PEFT cannot hold this shadow: {'; '.join(faults)}")
    heads = {ours: module for ours, module in model.trained_modules().items() if ours in HEADS}
    write_json(
        staging / CONFIG,
        {
            **{theirs: config.to_dict()[ours] for theirs, ours in NAMES.items()},
            **(sizes if mirrors else dict.fromkeys(SIZES.values())),
            "peft_type": "SHADOW",
            "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
            "base_model_name_or_path": model.config.base_name_or_path or None,
            "revision": model.config.base_revision,
            "inference_mode": True,
            "init_weights": True,
            "shadow_model": "mirror" if mirrors else config.backbone,
            "share_embeddings": shadow.embedding is None,
            "target_modules": block_paths(base),
            "modules_to_save": ["classifier", "score"] if heads else None,
            **dict.fromkeys(("auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform")),
        },
    )
    place = place_of(backbone, nested=not mirrors)
    write_file(staging / ADAPTER, _tensors(shadow, block_paths(base), place, heads))
    notes = []
    lost = lost_settings(config, TRAINING)
    if lost:
        notes.append(f"not stored by PEFT, outputs unchanged: {', '.join(lost)}")
    if not mirrors:
        notes.append(f"PEFT reads the backbone's architecture from {config.backbone} when it loads")
    return notes


def _tensors(shadow: Any, blocks: list[str], place: Place, heads: dict[str, nn.Module]) -> dict[str, Tensor]:
    """All tensors of ``adapter_model.safetensors``."""
    state, backbone = folded_state(shadow), shadow.backbone.config
    tensors = as_peer(peft_entries(blocks, state, place=place), state)
    downs = state["boundaries.injection_downs"]
    d, k = downs.shape[1], shadow.config.update_width
    shapes = {".0.weight": (k, d), ".0.bias": (k,), ".2.weight": (d, k), ".2.bias": (d,)}
    for theirs in PEFT_UPDATE.values():
        name = theirs.format("default")
        shape = next(shape for end, shape in shapes.items() if name.endswith(end))
        tensors[f"base_model.model.{blocks[-1]}.{name}"] = torch.zeros(shape, dtype=downs.dtype)
    if (
        shadow.embedding is None and place.embedding_key != "embed_tokens.weight"
    ):  # PEFT keeps one that it does not read
        tensors[f"{BACKBONE}{place.embedding_key}"] = torch.zeros(backbone.vocab_size, backbone.hidden_size)
    for name, module in heads.items():
        tensors |= {f"{HEADS[name]}.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors
