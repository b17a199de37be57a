"""What reading and writing another library's adapter share: files, the mirror that both peers build, and the result."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from shadowtune.attach.architectures import ARCHITECTURES, architecture_of
from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import save_readable
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.formats.mapping import Place
from shadowtune.model.malformed import check_numbers, one_line
from shadowtune.model.shadow import Shadow

PROJECTED = ("causal_lm_with_hidden_projection", "shadow_proj_causal_lm")
"""``model_type`` of a projected causal language model, now and formerly."""
BACKBONE_CONFIG = "backbone_config.json"
"""Config of an explicit backbone, which shadow-peft does not store and does not mind."""
MIRROR_SIZES = {
    "num_hidden_layers": "num_shadow_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
"""Sizes of a mirrored backbone in a config of transformers, and in ``ShadowConfig``."""
_NOT_FUNCTIONAL = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache", "transformers_version", "vocab_size"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "max_window_layers", "num_labels"),
    *("id2label", "label2id", "problem_type", "quantization_config", "attn_implementation", "output_attentions"),
}

Built = tuple[ShadowModelConfig, dict[str, Tensor]]
"""Our config, and our tensors by their names in our file."""


@dataclass(frozen=True)
class PeerAdapter:
    """Another library's adapter directory, read but not yet placed beside its base."""

    source: str
    """The directory."""
    classifies: bool
    """Whether it is a sequence classifier."""
    build: Callable[[PreTrainedConfig, "str | PreTrainedConfig | None"], Built]
    """From the base's config, and the backbone's if the user gave it, to what we load."""
    base: str = ""
    """The base that it names, if it does."""
    revision: str | None = None
    """The base's revision."""
    num_labels: int | None = None
    """Classes of its heads, if it holds them."""
    library: str = ""
    """Who wrote it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """As its config file words them."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """As its adapter file names them."""


def read_json(file: str) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError if it is damaged."""
    try:
        values = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {one_line(error)}") from None
    check_numbers(values, f"{file} is damaged")
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is damaged: it must hold a JSON object, not {type(values).__name__}")
    return values


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def read_file(file: str) -> dict[str, Tensor]:
    """Read a safetensors file of another library; raises CheckpointError if it is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from None


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file for another library."""
    save_readable({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def load_backbone_config(source: "str | PreTrainedConfig") -> PreTrainedConfig:
    """Return the config of a backbone: itself, of a model's directory or id, or of a projected model's inside.

    Raises:
        ConfigError: if it cannot be read.
    """
    if isinstance(source, PreTrainedConfig):
        return copy.deepcopy(source.get_text_config(decoder=True))
    try:
        values = PreTrainedConfig.get_config_dict(source)[0]
        inner = dict(values["shadow_model_config"] if values.get("model_type") in PROJECTED else values)
        return AutoConfig.for_model(inner.pop("model_type"), **inner).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"cannot read the config of the backbone {source}: {reason}; pass backbone=, the directory, id or config "
            "of a model of its architecture"
        ) from None


def peer_mirror(text: PreTrainedConfig, sizes: Mapping[str, int | None]) -> PreTrainedConfig:
    """Return the config of the backbone that both peers build for a base: the base's own with other sizes.

    Unlike ours it keeps the kinds of the base's first blocks, and all its experts.

    Args:
        text: the base's text config.
        sizes: by their names in a config of transformers; None leaves the base's.
    """
    mirror = copy.deepcopy(text)
    vars(mirror).pop("quantization_config", None)
    mirror.name_or_path = ""
    for name, value in sizes.items():
        if value is not None:
            setattr(mirror, ARCHITECTURES[text.model_type].names.get(name, name), value)
    depth = mirror.num_hidden_layers
    for name in ("layer_types", "no_rope_layers"):
        kinds = vars(mirror).get(name)
        if kinds:
            setattr(mirror, name, [*kinds, *[kinds[-1]] * depth][:depth])
    mirror._attn_implementation = text._attn_implementation
    return mirror


def mirror_differences(backbone: PreTrainedConfig, mirror: PreTrainedConfig) -> list[str]:
    """Name the values by which a backbone's outputs differ from those of the mirror that a peer builds."""
    ours, theirs = backbone.to_dict(), mirror.to_dict()
    names = sorted((ours.keys() | theirs.keys()) - _NOT_FUNCTIONAL)
    return [f"{n} {ours.get(n)!r} (not {theirs.get(n)!r})" for n in names if ours.get(n) != theirs.get(n)]


def sizes_for(backbone: PreTrainedConfig, text: PreTrainedConfig, names: Mapping[str, str]) -> dict[str, int | None]:
    """Return the sizes of a backbone that differ from the base's, by the peer's words for them (``names``)."""
    own = ARCHITECTURES[text.model_type].names
    sizes: dict[str, int | None] = {}
    for name, theirs in names.items():
        value, base = (config.to_dict().get(_written(config, own.get(name, name))) for config in (backbone, text))
        sizes[theirs] = value if value != base else None
    return sizes


def _written(config: PreTrainedConfig, name: str) -> str:
    return config.attribute_map.get(name, name)


def place_of(backbone: PreTrainedConfig, nested: bool) -> Place:
    """Return where a peer's backbone keeps things; ``nested`` if it is the whole headless model of ``AutoModel``."""
    architecture = architecture_of(backbone)
    with torch.device("meta"):
        decoder = architecture.decoder_of(AutoModelForCausalLM.from_config(backbone, trust_remote_code=False))
    embedding = decoder.get_input_embeddings()
    name = next(name for name, module in decoder.named_modules() if module is embedding)
    inside = architecture.decoder.partition(".")[2]
    return Place(f"{inside}." if nested and inside else "", name)


def shapes_of(settings: ShadowConfig, base: PreTrainedConfig, backbone: PreTrainedConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a shadow, without making one."""
    with torch.device("meta"):
        shadow = Shadow(settings, base, backbone)
    return {name: tensor.shape for name, tensor in shadow.state_dict().items()}


def check_base_shape(source: str, found: tuple[int, int], text: PreTrainedConfig) -> None:
    """Raise CheckpointError unless (width, blocks) of an adapter's base are this base's."""
    have = (text.hidden_size, text.num_hidden_layers)
    if found != have:
        name = text.name_or_path or text.model_type
        raise CheckpointError(
            f"wrong base: {source} was made for a base of width {found[0]} and {found[1]} blocks, but {name} has width "
            f"{have[0]} and {have[1]} blocks"
        )


def setting_faults(settings: ShadowConfig, needed: Mapping[str, Any]) -> list[str]:
    """Name the settings that a peer computes otherwise, each with its value and the peer's."""
    values = settings.to_dict()
    return [f"{name}={values[name]!r} (it has {value!r})" for name, value in needed.items() if values[name] != value]


def projection_faults(shadow: Shadow) -> list[str]:
    """Name the narrow mirror, which neither peer can feed with the base's embeddings."""
    if not isinstance(shadow.input_projection, nn.Linear):
        return []
    width = shadow.backbone.config.hidden_size
    return [f"hidden_size={width} of a mirror (it has no projection of the base's embeddings)"]


def lost_settings(settings: ShadowConfig, fixed: Mapping[str, Any], absent: tuple[str, ...] = ()) -> list[str]:
    """Name the settings that matter to further training alone and that a peer does not keep.

    Args:
        settings: ours.
        fixed: what the peer always does.
        absent: what its files have no place for.
    """
    values = settings.to_dict()
    names = [name for name, value in fixed.items() if values[name] != value]
    names += [name for name in absent if values[name] is not None]
    return [f"{name}={values[name]!r}" for name in names]
