"""Shared parts of the readers and writers of third-party adapters: files, tensor names, the mirror that they build.

shadow-peft and the Shadow tuner of PEFT store one module per block and weights as (outputs, inputs); we stack over
boundaries and store (inputs, outputs). Our boundary j > 0 updates the state with the output of a block and keeps its
parameters at index j - 1, so index j of ours is index j of shadow-peft and block j of PEFT. Both libraries have one
more update, after the last block, whose result is never used: it is not read, and written as zeros.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from shadowtune.attach.architectures import ARCHITECTURES, architecture_of
from shadowtune.config.shadow import ShadowConfig
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.backbone import PER_BLOCK, SIZES, without_quantization
from shadowtune.model.checkpoint import CHECKSUM, save_readable, tensor_checksum
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.files import check_numbers, one_line
from shadowtune.model.shadow import Shadow

PROJECTED = ("causal_lm_with_hidden_projection", "shadow_proj_causal_lm")
"""``model_type`` of a projected causal language model, now and formerly."""
MIRROR_SIZES = {"num_hidden_layers": "num_shadow_layers", **{name: name for name in SIZES}}
"""Sizes of a mirrored backbone in a config of transformers, and in ``ShadowConfig``."""
_NOT_FUNCTIONAL = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache", "transformers_version", "vocab_size"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "max_window_layers", "num_labels"),
    *("id2label", "label2id", "problem_type", "quantization_config", "attn_implementation", "output_attentions"),
}

Built = tuple[ShadowModelConfig, dict[str, Tensor]]
"""Our config, and our tensors by their names in our file."""


@dataclass(frozen=True)
class ThirdPartyAdapter:
    """The contents of another library's adapter directory, before its base is known."""

    source: str
    """The directory."""
    classifies: bool
    """Whether it is a sequence classifier."""
    build: Callable[[PreTrainedConfig, "str | PreTrainedConfig | None"], Built]
    """Converts it, given the base's config, and the backbone's if the user passed it."""
    base: str = ""
    """The base that it names, if it does."""
    revision: str | None = None
    """The base's revision."""
    num_labels: int | None = None
    """Classes of its heads, if it has heads."""
    library: str = ""
    """Name of the library that wrote it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Contents of its config file."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Contents of its tensor files."""


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
    """Write a JSON object, indented."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with a checksum in its metadata, which other libraries do not read."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_readable(tensors, file, {CHECKSUM: tensor_checksum(tensors)})


class TensorEntry(NamedTuple):
    """A tensor of the other library and its counterpart in ours; weights and gradients map alike."""

    theirs: str
    """Key in the other library's model."""
    ours: str
    """Key in our ``Shadow``."""
    slot: int | None = None
    """Index in our stack; None for the whole tensor."""
    transposed: bool = False


class BackboneKeys(NamedTuple):
    """Keys of another library's backbone, relative to ours."""

    prefix: str = ""
    """Path from their backbone to ours, with a dot at its end if not empty."""
    embedding: str = "embed_tokens"
    """Path from our backbone to its input embedding."""

    @property
    def embedding_key(self) -> str:
        """Key of the embedding in their backbone."""
        return f"{self.prefix}{self.embedding}.weight"


def backbone_keys(backbone: PreTrainedConfig, nested: bool) -> BackboneKeys:
    """Return the keys of their backbone; ``nested`` if it is the whole headless model of ``AutoModel``."""
    architecture = architecture_of(backbone)
    with torch.device("meta"):
        decoder = architecture.decoder_of(AutoModelForCausalLM.from_config(backbone, trust_remote_code=False))
    embedding = decoder.get_input_embeddings()
    name = next(name for name, module in decoder.named_modules() if module is embedding)
    inside = architecture.decoder.partition(".")[2]
    return BackboneKeys(f"{inside}." if nested and inside else "", name)


def backbone_entries(names: Iterable[str], backbone: str, projection: str, keys: BackboneKeys) -> list[TensorEntry]:
    """Return the entries of backbone, projection and embedding, given the prefixes of the other library.

    Args:
        names: keys of our shadow; others than these three parts are left out.
        backbone: prefix of their backbone.
        projection: prefix of their projection.
        keys: of their backbone.
    """
    entries = []
    for name in names:
        if name.startswith("backbone."):
            entries.append(TensorEntry(f"{backbone}{keys.prefix}{name.removeprefix('backbone.')}", name))
        elif name.startswith("projection."):
            entries.append(TensorEntry(f"{projection}{name.removeprefix('projection.')}", name))
        elif name == "embedding.weight":
            entries.append(TensorEntry(f"{backbone}{keys.embedding_key}", name))
    return entries


def folded_state(shadow: nn.Module) -> dict[str, Tensor]:
    """Return a shadow's tensors by name, with its channel scales multiplied into W_down; other libraries have none."""
    state = dict(shadow.state_dict())
    scales = state.pop("boundaries.channel_scales", None)
    if scales is not None:
        state["boundaries.injection_downs"] = state["boundaries.injection_downs"] * scales[:, :, None]
    return state


def to_third_party(entries: Iterable[TensorEntry], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors (weights, or gradients) under the other library's keys and in its layout."""
    tensors = {}
    for entry in entries:
        tensor = ours[entry.ours] if entry.slot is None else ours[entry.ours][entry.slot]
        tensors[entry.theirs] = tensor.mT if entry.transposed else tensor
    return tensors


def from_third_party(
    entries: Iterable[TensorEntry],
    theirs: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    ignored: Iterable[str] = (),
    source: str = "the adapter",
) -> dict[str, Tensor]:
    """Return the other library's tensors under our keys and in our layout; the inverse of ``to_third_party``.

    Args:
        entries: pairs of their tensors and ours.
        theirs: their tensors.
        shapes: of our tensors.
        ignored: keys of theirs that may be present and are not read.
        source: the file, for messages.

    Raises:
        CheckpointError: if keys are missing, unexpected or of another shape.
    """
    entries = list(entries)
    expected = {entry.theirs for entry in entries}
    errors = []
    for text, keys in (("has no", expected - theirs.keys()), ("has unexpected", theirs.keys() - expected - {*ignored})):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            errors.append(f"{text} {', '.join(sorted(keys)[:3])}{more}")
    if errors:
        raise CheckpointError(f"{source} {'; '.join(errors)}: it is damaged or made for another architecture")
    ours: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for entry in entries:
        wanted = shapes[entry.ours] if entry.slot is None else shapes[entry.ours][1:]
        tensor = theirs[entry.theirs].mT if entry.transposed else theirs[entry.theirs]
        if tensor.shape != wanted:
            want = tuple(reversed(wanted)) if entry.transposed else tuple(wanted)
            raise CheckpointError(f"{source}: {entry.theirs} has shape {tuple(theirs[entry.theirs].shape)}, not {want}")
        if entry.slot is None:
            ours[entry.ours] = tensor
        else:
            stacks.setdefault(entry.ours, {})[entry.slot] = tensor
    return ours | {name: torch.stack([stack[index] for index in sorted(stack)]) for name, stack in stacks.items()}


def load_backbone_config(source: "str | PreTrainedConfig") -> PreTrainedConfig:
    """Return the config of a backbone: ``source`` itself, that of a model's directory or id, or of a projected model.

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


def third_party_mirror(text: PreTrainedConfig, sizes: Mapping[str, int | None]) -> PreTrainedConfig:
    """Return the config of the backbone that both libraries build for a base: the base's own with other sizes.

    Unlike our mirror it keeps the kinds of the base's first blocks, and all its experts.

    Args:
        text: the base's text config.
        sizes: by their names in a config of transformers; None leaves the base's.
    """
    mirror = without_quantization(copy.deepcopy(text))
    for name, value in sizes.items():
        if value is not None:
            setattr(mirror, ARCHITECTURES[text.model_type].names.get(name, name), value)
    depth = mirror.num_hidden_layers
    for name, kinds in mirror.to_dict().items():
        if name in PER_BLOCK and kinds:
            setattr(mirror, name, [*kinds, *[kinds[-1]] * depth][:depth])
    mirror._attn_implementation = text._attn_implementation
    return mirror


def mirror_differences(backbone: PreTrainedConfig, mirror: PreTrainedConfig) -> list[str]:
    """Name the config values by which a backbone computes something else than the mirror of another library."""
    ours, theirs = backbone.to_dict(), mirror.to_dict()
    names = sorted((ours.keys() | theirs.keys()) - _NOT_FUNCTIONAL)
    return [f"{n} {ours.get(n)!r} (not {theirs.get(n)!r})" for n in names if ours.get(n) != theirs.get(n)]


def sizes_for(backbone: PreTrainedConfig, text: PreTrainedConfig, names: Mapping[str, str]) -> dict[str, int | None]:
    """Return the sizes of a backbone that differ from the base's, else None, by the other library's ``names``."""
    own = ARCHITECTURES[text.model_type].names
    sizes: dict[str, int | None] = {}
    for name, theirs in names.items():
        key = own.get(name, name)
        value, base = (config.to_dict().get(config.attribute_map.get(key, key)) for config in (backbone, text))
        sizes[theirs] = value if value != base else None
    return sizes


def shapes_of(settings: ShadowConfig, base: PreTrainedConfig, backbone: PreTrainedConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a shadow, without allocating one."""
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


def setting_conflicts(settings: ShadowConfig, needed: Mapping[str, Any]) -> list[str]:
    """Name the settings that another library computes otherwise, each with our value and theirs."""
    values = settings.to_dict()
    return [f"{name}={values[name]!r} (it has {value!r})" for name, value in needed.items() if values[name] != value]


def projection_conflicts(shadow: Shadow) -> list[str]:
    """Name the width of a narrow mirror: neither library projects the base's embeddings down to it."""
    if not isinstance(shadow.input_projection, nn.Linear):
        return []
    width = shadow.backbone.config.hidden_size
    return [f"hidden_size={width} of a mirror (it has no projection of the base's embeddings)"]


def lost_settings(settings: ShadowConfig, fixed: Mapping[str, Any], absent: tuple[str, ...] = ()) -> list[str]:
    """Name the settings of further training that another library does not keep.

    Args:
        settings: ours.
        fixed: settings for which the other library has one value.
        absent: settings that its files do not have.
    """
    values = settings.to_dict()
    names = [name for name, value in fixed.items() if values[name] != value]
    names += [name for name in absent if values[name] is not None]
    return [f"{name}={values[name]!r}" for name in names]
