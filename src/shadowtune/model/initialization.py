"""How a new shadow starts: at random, as copies of base blocks, from a pretrained model, or from an earlier shadow.

In every case W_up = 0 (``core/boundary.py``), so the attached model equals the base. The sources are read once: a saved
shadow holds all of its own tensors.
"""

import copy
import logging
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries
from shadowtune.core.kernels.linear_cross_entropy import LogitsTransform
from shadowtune.errors import ConfigError
from shadowtune.model.backbone import (
    PretrainedBackbone,
    blocks_to_copy,
    build_backbone,
    copy_position_embeddings,
    load_pretrained_backbone,
    mirror_config,
    sizes_of,
)
from shadowtune.model.channel_scales import measure_channel_scales, measure_input_sizes
from shadowtune.model.checkpoint import read_tensors
from shadowtune.model.configuration import Initialization, ProjectionStart, ShadowModelConfig
from shadowtune.model.formats.projected import is_projected, read_projected
from shadowtune.model.loading import has_weights, lasting_name, load_tensors, read_config
from shadowtune.model.projection_fit import fit_projection, projection_error
from shadowtune.model.pruning import prune_blocks
from shadowtune.model.shadow import Shadow
from shadowtune.models import resolve

logger = logging.getLogger(__name__)


def start_shadow(base: PreTrainedModel, config: ShadowConfig, dtype: torch.dtype) -> tuple[Shadow, Initialization]:
    """Build the shadow of a base and start it as ``config`` says.

    Args:
        base: the base, whose tensors are only read.
        config: ``backbone``, ``init_layers`` and ``init_from`` say how.
        dtype: of the shadow's parameters.

    Returns:
        The shadow, on the CPU, and what was done.

    Raises:
        ConfigError: if a source does not fit the base or the sizes of the shadow, or cannot be read.
    """
    if config.init_from is not None:
        shadow, start = _from_earlier(base, config, dtype)
    elif config.backbone != "mirror":
        shadow, start = _from_pretrained(base, config, dtype)
    elif config.init_layers is not None:
        shadow, start = _from_base_layers(base, config, dtype)
    else:
        shadow = Shadow(config, base.config, mirror_config(base.config, config))
        copy_position_embeddings(shadow.backbone, base)
        shadow, start = shadow.cast(dtype), Initialization("random")
    if base.device.type != "meta":  # where only shapes are asked for
        _measure(base, shadow.boundaries)
    logger.info("the shadow starts %s", start)
    return shadow, start


@torch.no_grad()
def _measure(base: PreTrainedModel, boundaries: Boundaries) -> None:
    """Fill in what the boundaries know of the base's hidden states."""
    config, first = boundaries.config, 0 if boundaries.config.inject_first else 1
    scales = measure_channel_scales(base)[first:] if config.channel_scaling else None
    if boundaries.input_sizes is not None:
        sizes = measure_input_sizes(base)[first:]
        boundaries.input_sizes.copy_(sizes)
        assert boundaries.channel_scales is not None  # those of this variant make each channel's size 1
        boundaries.channel_scales.copy_((1.0 if scales is None else scales) / sizes[:, None])
    elif scales is not None:
        boundaries.channel_scales = scales.to(boundaries.injection_downs)


@torch.no_grad()
def _from_base_layers(base: PreTrainedModel, config: ShadowConfig, dtype: torch.dtype) -> tuple[Shadow, Initialization]:
    text, architecture = base.config.get_text_config(decoder=True), architecture_of(base.config)
    layers = blocks_to_copy(config.init_layers or (), text)
    originals = [architecture.blocks_of(base)[layer].state_dict() for layer in layers]
    if not all(_is_dense(tensor) for block in originals for tensor in block.values()):
        raise ConfigError(
            f"init_layers {list(layers)} cannot copy blocks of a quantized or offloaded base, whose stored numbers are "
            "not its weights; load the base whole (base_quantization: none), or leave init_layers out"
        )
    mirror = mirror_config(base.config, config)
    blocks, kept = prune_blocks(originals, text, mirror)
    shadow = Shadow(config, base.config, mirror).cast(dtype)
    targets = cast(nn.ModuleList, shadow.backbone.get_submodule(architecture.blocks))
    for layer, target, block in zip(layers, targets, blocks, strict=True):
        if target.state_dict().keys() != block.keys():
            raise ConfigError(
                f"init_layers names block {layer}, which is built otherwise (dense or of experts) than the mirror's; "
                "choose another"
            )
        target.load_state_dict(block)
    decoder = architecture.decoder_of(base).state_dict()
    for name, tensor in shadow.backbone.state_dict().items():  # the final norm, and learned positions
        if not name.startswith(f"{architecture.blocks}."):
            tensor.copy_(decoder[name].index_select(-1, kept.to(decoder[name].device)))
    if not isinstance(shadow.projection, nn.Linear):
        return shadow, Initialization("base_layers", layers=layers)
    selection = torch.eye(text.hidden_size)[kept]
    cast(nn.Linear, shadow.input_projection).weight.copy_(selection)
    shadow.projection.weight.copy_(selection.T)
    return shadow, Initialization("base_layers", layers=layers, projection="selection")


@torch.no_grad()
def _from_pretrained(base: PreTrainedModel, config: ShadowConfig, dtype: torch.dtype) -> tuple[Shadow, Initialization]:
    text = base.config.get_text_config(decoder=True)
    place = resolve(config.backbone)
    source = _projected(place, text) if _is_projected(place) else load_pretrained_backbone(place, text.vocab_size)
    shadow = Shadow(config, base.config, source.network.config, source.network, source.embedding).cast(dtype)
    head = _head_of(base)
    if head is not None and not _is_dense(head):
        raise ConfigError(
            f"the projection of the backbone {config.backbone} cannot be fitted to the base's head, which is quantized "
            "or offloaded; load the base whole (base_quantization: none)"
        )
    projection, error = _start_projection(
        shadow.projection, head, architecture_of(base.config).logits_transform(text), source
    )
    name = lasting_name(config.backbone)
    return shadow, Initialization("pretrained", name, projection=projection, projection_error=error)


def _is_projected(place: str) -> bool:
    try:
        return is_projected(place)
    except OSError:
        return False  # there is no such place, and the loader of plain models says so


def _projected(place: str, text: PreTrainedConfig) -> PretrainedBackbone:
    """The network of a projected causal language model, whose projection must lead to the base's width."""
    found = read_projected(place)
    sizes = {"vocab_size": (found.embedding.weight.shape[0], text.vocab_size)}
    sizes["base_hidden_size"] = (found.projection.shape[0], text.hidden_size)
    for name, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise ConfigError(
                f"the backbone {place} has {name} {theirs}, the base {ours}; use the base that it was made for"
            )
    network = build_backbone(found.backbone_config)
    load_tensors({"backbone": network}, {f"backbone.{name}": t for name, t in found.backbone_state.items()}, place)
    return PretrainedBackbone(network, found.embedding, projection=found.projection)


def _start_projection(
    projection: nn.Module, head: Tensor | None, finish: LogitsTransform | None, source: PretrainedBackbone
) -> tuple[ProjectionStart, float | None]:
    """Start the projection of a pretrained backbone; return what it started as, and its error where that is known."""
    weight = None
    how: ProjectionStart = "none"
    if isinstance(projection, nn.Linear):
        weight, how = projection.weight, "random"
        if source.projection is not None:
            weight.copy_(source.projection)
            how = "copied"
        elif head is not None and source.head is not None:
            fit = fit_projection(head, source.head, weight.dtype)
            weight.copy_(fit.weight * (_slope(source.finish) / _slope(finish)))
            return "least_squares", fit.relative_error
    if head is None or source.head is None or how == "random":
        return how, None
    return how, projection_error(head, source.head, weight)


def _from_earlier(base: PreTrainedModel, config: ShadowConfig, dtype: torch.dtype) -> tuple[Shadow, Initialization]:
    directory = str(config.init_from)
    try:
        model_type = PreTrainedConfig.get_config_dict(directory)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read config.json of init_from {directory}: {str(error).splitlines()[0]}; give the directory of a "
            "saved shadow, such as RUN/model"
        ) from None
    if model_type == ShadowModelConfig.model_type:
        shadow = _from_adapter(base, config, directory, dtype)
    else:
        shadow = _from_detached(base, config, directory).cast(dtype)
    projected = isinstance(shadow.projection, nn.Linear)
    return shadow, Initialization("detached", lasting_name(directory), projection="copied" if projected else "none")


def _from_adapter(base: PreTrainedModel, config: ShadowConfig, directory: str, dtype: torch.dtype) -> Shadow:
    """Take over the backbone and projections of a shadow that was saved beside its base's name."""
    source, text = read_config(directory), base.config.get_text_config(decoder=True)
    assert source.base_config is not None and source.backbone_config is not None
    own, backbone = source.shadow_config.backbone, copy.deepcopy(source.backbone_config)
    if (own == "mirror") != (config.backbone == "mirror"):
        raise ConfigError(
            f"init_from {directory}: its backbone is {own!r}, this shadow's {config.backbone!r}; set backbone: {own}"
        )
    found = source.base_config.get_text_config(decoder=True)
    sizes = [("hidden_size", found.hidden_size, text.hidden_size)]
    if own != "mirror":
        sizes.append(("vocab_size", found.vocab_size, text.vocab_size))
    for name, theirs, ours in sizes:
        if theirs != ours:
            raise ConfigError(
                f"init_from {directory}: its base has {name} {theirs}, this one {ours}; use the same base"
            )
    if own == "mirror":
        _check_sizes(backbone, base, config)
        backbone.vocab_size = text.vocab_size
    if not has_weights(base, source):
        logger.warning("init_from %s was trained beside another base, %s", directory, source.base_name_or_path)
    backbone._attn_implementation = base.config._attn_implementation
    tensors = read_tensors(directory)
    shadow = Shadow(config, base.config, backbone).cast(dtype)
    parts: dict[str, nn.Module] = {
        f"shadow.{name}": module for name, module in shadow.named_children() if name != "boundaries"
    }
    load_tensors(
        parts, {name: t for name, t in tensors.items() if name.startswith(tuple(f"{p}." for p in parts))}, directory
    )
    return shadow


def _from_detached(base: PreTrainedModel, config: ShadowConfig, directory: str) -> Shadow:
    """Take over the network of a plain model that is a detached shadow of this base, without a projection."""
    way_out = f"write backbone: {directory} instead of init_from, which keeps its own embedding and fits a projection"
    if config.backbone != "mirror":
        raise ConfigError(f"init_from {directory} is a plain model, but backbone is {config.backbone!r}; {way_out}")
    text = base.config.get_text_config(decoder=True)
    source = load_pretrained_backbone(directory, text.vocab_size)
    width = source.network.config.hidden_size
    if width != text.hidden_size:
        raise ConfigError(
            f"init_from {directory} is a plain model of hidden_size {width}, the base's is {text.hidden_size}, so its "
            f"projection is folded into its head and embedding; give the shadow's own directory, or {way_out}"
        )
    _check_sizes(source.network.config, base, config)
    if not torch.allclose(
        source.embedding.weight.float(),
        cast(Tensor, base.get_input_embeddings().weight).float().to(source.embedding.weight.device),
        rtol=2**-7,  # of bfloat16
        atol=1e-6,
    ):
        raise ConfigError(f"init_from {directory} has another token embedding than the base; {way_out}")
    return Shadow(config, base.config, source.network.config, source.network)


def _check_sizes(found: PreTrainedConfig, base: PreTrainedModel, config: ShadowConfig) -> None:
    """Refuse an earlier backbone of another architecture or size than the mirror that ``config`` describes."""
    mirror = mirror_config(base.config, config)
    if found.model_type != mirror.model_type:
        raise ConfigError(
            f"init_from {config.init_from}: its backbone is a {found.model_type}, the mirror of this base a "
            f"{mirror.model_type}; use a shadow of the same architecture"
        )
    wanted = sizes_of(mirror)
    for name, value in sizes_of(found).items():
        if value != wanted[name]:
            raise ConfigError(
                f"init_from {config.init_from}: its backbone has {name} {value}, this shadow's mirror {wanted[name]}; "
                f"set shadow.{name}: {value}"
            )


def _head_of(base: PreTrainedModel) -> Tensor | None:
    """The matrix (V, d) that turns states into logits; a classifier has it only where its embedding is tied to it."""
    head = base.get_output_embeddings()
    if head is None and base.config.get_text_config(decoder=True).tie_word_embeddings:
        head = base.get_input_embeddings()
    return None if head is None else cast(Tensor, head.weight).detach()


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers as they are, not quantized and not elsewhere."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta


def _slope(finish: LogitsTransform | None) -> float:
    """What a model multiplies small logits by after its head: 1 unless it scales them (granite)."""
    small = torch.tensor(1e-6, dtype=torch.float64)
    return 1.0 if finish is None else (finish(small) / small).item()
