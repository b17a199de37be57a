"""Reader and writer of adapters of the Shadow tuner of Hugging Face PEFT.

Files: ``adapter_config.json`` and ``adapter_model.safetensors``. There, a mirror that does not share the base's
embeddings trains its own; here they are frozen.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shadowtune.attach.architectures import architecture_of
from shadowtune.config.shadow import PEFT_COMPUTES, PEFT_DEFAULTS, PEFT_DROPOUT, PEFT_NAMES, ShadowConfig
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

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"CAUSAL_LM": False, "SEQ_CLS": True}
"""Task types of PEFT, and whether they classify."""
HEADS = {"score": "base_model.model.score", "shadow_score": "base_model.shadow_head.default"}
"""Keys of the classification heads: ours, and those of PEFT."""
SIZES = {
    "num_hidden_layers": "shadow_num_hidden_layers",
    "hidden_size": "shadow_hidden_size",
    "intermediate_size": "shadow_intermediate_size",
    "num_attention_heads": "shadow_num_attention_heads",
}
"""Sizes of a mirror in a config of transformers, and in ``adapter_config.json``."""
NAMES = {theirs: ours for theirs, ours in PEFT_NAMES.items() if theirs not in ("shadow_model", *SIZES.values())}
BACKBONE, PROJECTION = "base_model.shadow_backbone.default.", "base_model.shadow_projection.default.weight"
INJECTION = {"injection_downs": "shadow_down.{}.weight", "injection_ups": "shadow_up.{}.weight"}
UPDATE = {
    "transform_downs": "shadow_update_transform.{}.0.weight",
    "transform_down_biases": "shadow_update_transform.{}.0.bias",
    "transform_ups": "shadow_update_transform.{}.2.weight",
    "transform_up_biases": "shadow_update_transform.{}.2.bias",
    "gate_downs": "shadow_update_gate.{}.0.weight",
    "gate_down_biases": "shadow_update_gate.{}.0.bias",
    "gate_ups": "shadow_update_gate.{}.2.weight",
    "gate_up_biases": "shadow_update_gate.{}.2.bias",
}
"""Our stacks, and PEFT's key of the tensor in each block."""


def peft_entries(
    blocks: Iterable[str],
    ours: Iterable[str],
    adapter: str = "default",
    keys: BackboneKeys = BackboneKeys(),  # noqa: B008
) -> list[TensorEntry]:
    """Return the entries for a ``PeftModel`` of the Shadow tuner.

    Args:
        blocks: paths of the base's blocks.
        ours: keys of our shadow.
        adapter: name of the adapter.
        keys: of the backbone.
    """
    paths, entries = list(blocks), []
    for block, path in enumerate(paths):
        for name, theirs in INJECTION.items():
            key = f"base_model.model.{path}.{theirs.format(adapter)}"
            entries.append(TensorEntry(key, f"boundaries.{name}", block, transposed=True))
        for name, theirs in UPDATE.items() if block < len(paths) - 1 else ():
            key = f"base_model.model.{path}.{theirs.format(adapter)}"
            entries.append(TensorEntry(key, f"boundaries.{name}", block, transposed=not name.endswith("biases")))
    backbone, projection = f"base_model.shadow_backbone.{adapter}.", f"base_model.shadow_projection.{adapter}."
    return entries + backbone_entries(ours, backbone, projection, keys)


def peft_unused(blocks: Iterable[str], adapter: str = "default") -> set[str]:
    """Return the keys of the update after the last block, which gets no gradient."""
    last = list(blocks)[-1]
    return {f"base_model.model.{last}.{theirs.format(adapter)}" for theirs in UPDATE.values()}


def open_peft(path_or_id: str, **hub: Any) -> ThirdPartyAdapter:
    """Read the files of a PEFT adapter.

    Raises:
        CheckpointError: if it is no Shadow adapter, or a file is missing or damaged.
        ConfigError: if it is for another task, or trained a module that a shadow does not have.
    """
    config = read_json(str(find_file(path_or_id, CONFIG, **hub)))
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "SHADOW":
        raise CheckpointError(f"{path_or_id} is a PEFT adapter of type {kind!r}; only SHADOW can be read as a shadow")
    if task not in TASKS:
        raise ConfigError(f"{path_or_id} has task_type {task!r}; supported are {', '.join(TASKS)}")
    heads = {"score", "classifier"} if TASKS[task] else set()
    others = sorted(set(config.get("modules_to_save") or ()) - heads)
    if others:
        raise ConfigError(f"{path_or_id}: modules_to_save {', '.join(others)} of the base cannot be held by a shadow")
    file = find_file(path_or_id, ADAPTER, **hub)
    if file is None:
        raise CheckpointError(f"{path_or_id} has no {ADAPTER}; an adapter_model.bin is not read, for it can run code")
    tensors = read_file(file, checked=False)
    score = tensors.get(f"{HEADS['score']}.weight")

    def build(base: PreTrainedConfig, backbone: "str | PreTrainedConfig | None") -> Built:
        return _build(path_or_id, config, tensors, base, backbone)

    return ThirdPartyAdapter(
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
    """Return the path of each decoder block in a model with a task head."""
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
    values = {**PEFT_DEFAULTS, **config}
    values["update_hidden_size"] = values.get("update_hidden_size") or values["r"]
    sizes = {name: values.get(theirs) for name, theirs in SIZES.items()}
    sizes["num_hidden_layers"] = sizes["num_hidden_layers"] or 1
    mirrors = values.get("shadow_model", "mirror") == "mirror"
    backbone = third_party_mirror(text, sizes) if mirrors else load_backbone_config(given or values["shadow_model"])
    shared = mirrors and values.get("share_embeddings", True) and backbone.hidden_size == text.hidden_size
    keys = backbone_keys(backbone, nested=not mirrors)
    if backbone.hidden_size == text.hidden_size and PROJECTION in tensors:
        raise ConfigError(
            f"{source} has a projection between equal widths ({text.hidden_size}), from a projected shadow_model; a "
            "shadow here has none when widths are equal"
        )
    named = {ours: values[theirs] for theirs, ours in NAMES.items()} | {**PEFT_COMPUTES, **PEFT_DROPOUT}
    if mirrors:
        named |= {ours: sizes.get(name) for name, ours in MIRROR_SIZES.items()}
    else:
        named["backbone"] = values["shadow_model"]
    if mirrors and not shared:
        named["backbone"] = source
    settings = ShadowConfig.from_dict(named | {"num_shadow_layers": backbone.num_hidden_layers})
    shapes = shapes_of(settings, base, backbone)
    blocks = block_paths(base)
    ignored = peft_unused(blocks) | ({f"{BACKBONE}{keys.embedding_key}"} if shared else set())
    heads = HEADS if TASKS[config["task_type"]] else {}
    own_heads = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in heads.items()}
    shadow = {name: tensor for name, tensor in tensors.items() if name not in own_heads}
    ours = from_third_party(peft_entries(blocks, shapes, keys=keys), shadow, shapes, ignored, source)
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
            "here has a boundary at each of them"
        )
    check_base_shape(source, (width, len(downs)), text)


def write_peft(model: Any, staging: Path) -> list[str]:
    """Write a shadow as an adapter of PEFT.

    Args:
        model: a ``ShadowForCausalLM`` or ``ShadowForSequenceClassification``.
        staging: an empty directory.

    Returns:
        Notes: settings that the files do not keep (the outputs are the same), and what loading needs.

    Raises:
        ConfigError: naming every setting that PEFT computes otherwise.
    """
    shadow, config, base = model.shadow, model.config.shadow_config, model.config.base_config
    text, backbone = base.get_text_config(decoder=True), shadow.backbone.config
    sizes = sizes_for(backbone, text, SIZES)
    sizes["shadow_num_hidden_layers"] = backbone.num_hidden_layers
    differences = mirror_differences(
        backbone, third_party_mirror(text, {name: sizes[theirs] for name, theirs in SIZES.items()})
    )
    mirrors = not differences
    narrow = projection_conflicts(shadow)
    conflicts = setting_conflicts(config, PEFT_COMPUTES) + narrow
    if not narrow and shadow.embedding is None:
        conflicts += [f"backbone {difference}" for difference in differences]
    if conflicts:
        raise ConfigError(f"the Shadow tuner of PEFT cannot hold this shadow: {'; '.join(conflicts)}")
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
    keys = backbone_keys(backbone, nested=not mirrors)
    write_file(staging / ADAPTER, _tensors(shadow, block_paths(base), keys, heads))
    notes = []
    lost = lost_settings(config, PEFT_DROPOUT)
    if lost:
        notes.append(f"not stored by PEFT, outputs unchanged: {', '.join(lost)}")
    if not mirrors:
        notes.append(f"PEFT reads the backbone's architecture from {config.backbone} when it loads")
    return notes


def _tensors(shadow: Any, blocks: list[str], keys: BackboneKeys, heads: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return all tensors of ``adapter_model.safetensors``."""
    state, backbone = folded_state(shadow), shadow.backbone.config
    tensors = to_third_party(peft_entries(blocks, state, keys=keys), state)
    downs = state["boundaries.injection_downs"]
    d, k = downs.shape[1], shadow.config.update_width
    shapes = {".0.weight": (k, d), ".0.bias": (k,), ".2.weight": (d, k), ".2.bias": (d,)}
    for theirs in UPDATE.values():
        name = theirs.format("default")
        shape = next(shape for end, shape in shapes.items() if name.endswith(end))
        tensors[f"base_model.model.{blocks[-1]}.{name}"] = torch.zeros(shape, dtype=downs.dtype)
    if shadow.embedding is None and keys.embedding_key != "embed_tokens.weight":  # present there, but not read
        tensors[f"{BACKBONE}{keys.embedding_key}"] = torch.zeros(backbone.vocab_size, backbone.hidden_size)
    for name, module in heads.items():
        tensors |= {f"{HEADS[name]}.{key}": tensor for key, tensor in module.state_dict().items()}
    return tensors
