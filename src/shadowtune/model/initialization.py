r"""How a new shadow starts: at random, as copies of base blocks, from a pretrained model, or from an earlier shadow.

In every case W_up = 0 (``core/boundary.py``), so the attached model equals the base. The sources are read once: a saved
shadow holds all of its own tensors. Two things are computed from the base here.

**Projection of a pretrained backbone**, by least squares between two heads. A shadow's state s0 = W_proj z feeds the
base's head, so the detached logits are W_head W_proj z; the pretrained model's own are W_small z. They agree for every
z exactly when W_head W_proj = W_small. Hence

    W_proj = argmin ||W_head W_proj - W_small||_F,   solved by   (W_head' W_head) W_proj = W_head' W_small.

It is not the fit between the two input embeddings: the output of a backbone is trained for a head, and only where both
models tie the two is that the same. With V tokens, base width d and backbone width d_s, the products (d, d) and
(d, d_s) are summed over chunks of rows in float64; nothing of size V x d is ever copied.

**Sizes of the base's hidden states**, per channel. A few channels of trained models are huge in every token, whatever
the text (Sun et al., 2024, https://arxiv.org/abs/2402.17762), so random tokens show which. First tokens are left out:
in them some channels are larger still.
"""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.sharding import device_of, gathering_blocks, whole_state, whole_tensor
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
from shadowtune.model.checkpoint import read_tensors
from shadowtune.model.configuration import Initialization, ProjectionStart, ShadowModelConfig
from shadowtune.model.formats.projected import is_projected, read_projected
from shadowtune.model.loading import absolute_name, has_weights, load_tensors, read_config
from shadowtune.model.pruning import prune_blocks
from shadowtune.model.shadow import Shadow
from shadowtune.models import resolve

logger = logging.getLogger(__name__)

SAMPLE_SHAPE = (8, 32)
"""Random tokens (sequences, length) on which hidden states are measured."""
MAX_SCALE = 20.0
"""Largest factor by which a channel that is hardly used is scaled up."""
CHUNK = 4096
"""Rows of the two heads that are held in float64 at once."""
RIDGE = 1e-10
"""Added to the diagonal of a singular W_head' W_head, relative to its mean: about the least-squares solution of least
norm."""
SINGULAR = 1e-13
"""A pivot this small, relative to the largest diagonal entry, counts as zero."""


def start_shadow(base: PreTrainedModel, config: ShadowConfig, dtype: torch.dtype) -> tuple[Shadow, Initialization]:
    """Build and initialize the shadow of a base.

    Args:
        base: its tensors are only read.
        config: ``backbone``, ``init_layers`` and ``init_from`` choose the source of the weights.
        dtype: of the shadow's parameters.

    Returns:
        The shadow, on the CPU, and a record of its source.

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
        _measure_scales(base, shadow.boundaries)
    logger.info("the shadow starts %s", start)
    return shadow, start


@torch.no_grad()
def _measure_scales(base: PreTrainedModel, boundaries: Boundaries) -> None:
    config, first = boundaries.config, boundaries.first
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
    originals = [whole_state(architecture.blocks_of(base)[layer]) for layer in layers]
    if not all(_is_dense(tensor) for block in originals for tensor in block.values()):
        raise ConfigError(
            f"init_layers {list(layers)} cannot copy blocks of a quantized or offloaded base, whose stored numbers are "
            "not its weights; load the base whole (base_quantization: none), or start at random: init_layers=None"
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
    decoder = architecture.decoder_of(base).state_dict(keep_vars=True)
    for name, tensor in shadow.backbone.state_dict().items():  # the final norm, and learned positions
        if not name.startswith(f"{architecture.blocks}."):
            original = whole_tensor(decoder[name])
            tensor.copy_(original.index_select(-1, kept.to(original.device)))
    if not isinstance(shadow.projection, nn.Linear):
        return shadow, Initialization("base_layers", layers=layers)
    selection = torch.eye(text.hidden_size)[kept]
    cast(nn.Linear, shadow.input_projection).weight.copy_(selection)
    shadow.projection.weight.copy_(selection.T)
    return shadow, Initialization("base_layers", layers=layers, projection="selection")


@torch.no_grad()
def _from_pretrained(base: PreTrainedModel, config: ShadowConfig, dtype: torch.dtype) -> tuple[Shadow, Initialization]:
    text = base.config.get_text_config(decoder=True)
    path = resolve(config.backbone)
    source = _projected_backbone(path, text) if _is_projected(path) else load_pretrained_backbone(path, text.vocab_size)
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
    name = absolute_name(config.backbone)
    return shadow, Initialization("pretrained", name, projection=projection, projection_error=error)


def _is_projected(path: str) -> bool:
    try:
        return is_projected(path)
    except OSError:
        return False  # nothing is there, which the loader of plain models reports


def _projected_backbone(path: str, text: PreTrainedConfig) -> PretrainedBackbone:
    found = read_projected(path)
    sizes = {"vocab_size": (found.embedding.weight.shape[0], text.vocab_size)}
    sizes["base_hidden_size"] = (found.projection.shape[0], text.hidden_size)
    for name, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise ConfigError(
                f"the backbone {path} has {name} {theirs}, the base {ours}; use the base that it was made for"
            )
    network = build_backbone(found.backbone_config)
    load_tensors({"backbone": network}, {f"backbone.{name}": t for name, t in found.backbone_state.items()}, path)
    return PretrainedBackbone(network, found.embedding, projection=found.projection)


def _start_projection(
    projection: nn.Module, head: Tensor | None, transform: LogitsTransform | None, source: PretrainedBackbone
) -> tuple[ProjectionStart, float | None]:
    """Initialize the projection of a pretrained backbone; return how, and its error where that is known."""
    weight = None
    how: ProjectionStart = "none"
    if isinstance(projection, nn.Linear):
        weight, how = projection.weight, "random"
        if source.projection is not None:
            weight.copy_(source.projection)
            how = "copied"
        elif head is not None and source.head is not None:
            fit = fit_projection(head, source.head, weight.dtype)
            weight.copy_(fit.weight * (_slope(source.logits_transform) / _slope(transform)))
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
    return shadow, Initialization("detached", absolute_name(directory), projection="copied" if projected else "none")


def _from_adapter(base: PreTrainedModel, config: ShadowConfig, directory: str, dtype: torch.dtype) -> Shadow:
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
    """Copy the network of a plain model that is a detached shadow of this base, without a projection."""
    hint = f"write backbone: {directory} instead of init_from, which keeps its own embedding and fits a projection"
    if config.backbone != "mirror":
        raise ConfigError(f"init_from {directory} is a plain model, but backbone is {config.backbone!r}; {hint}")
    text = base.config.get_text_config(decoder=True)
    source = load_pretrained_backbone(directory, text.vocab_size)
    width = source.network.config.hidden_size
    if width != text.hidden_size:
        raise ConfigError(
            f"init_from {directory} is a plain model of hidden_size {width}, the base's is {text.hidden_size}, so its "
            f"projection is folded into its head and embedding; give the shadow's own directory, or {hint}"
        )
    _check_sizes(source.network.config, base, config)
    if not torch.allclose(
        source.embedding.weight.float(),
        whole_tensor(cast(Tensor, base.get_input_embeddings().weight)).float().to(source.embedding.weight.device),
        rtol=2**-7,  # of bfloat16
        atol=1e-6,
    ):
        raise ConfigError(f"init_from {directory} has another token embedding than the base; {hint}")
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
    """Return W_head (V, d); a classifier has one only where its config ties the head to the embedding."""
    head = base.get_output_embeddings()
    if head is None and base.config.get_text_config(decoder=True).tie_word_embeddings:
        head = base.get_input_embeddings()
    return None if head is None else whole_tensor(head.weight).detach()


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers, unlike a quantized or offloaded one."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta


def _slope(transform: LogitsTransform | None) -> float:
    """Return the factor of a logits transform at small logits: 1 unless it scales them (granite)."""
    small = torch.tensor(1e-6, dtype=torch.float64)
    return 1.0 if transform is None else (transform(small) / small).item()


def measure_channel_scales(base: PreTrainedModel) -> Tensor:
    """Return factors c (L, d), float32, that equalize the channels of each block's input and keep its overall size.

    With x the input of a block, c_i is proportional to 1 / rms(x_i), and the mean of (c_i x_i)^2 is that of x_i^2.
    """
    squares = measure_squares(base)
    mean = squares.mean(-1, keepdim=True)
    scales = (mean / squares).sqrt().clamp(max=MAX_SCALE)
    return scales * (mean / (squares * scales**2).mean(-1, keepdim=True)).sqrt()


def measure_input_sizes(base: PreTrainedModel) -> Tensor:
    """Return the root mean square of each block's input (L,), float32."""
    return measure_squares(base).mean(-1).sqrt()


@torch.no_grad()
def measure_squares(base: PreTrainedModel) -> Tensor:
    """Return the mean squares of each channel of each block's input (L, d), float32."""
    architecture = architecture_of(base.config)
    vocabulary = base.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(vocabulary, SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 1:].float().pow(2).mean((0, 1))))
        for block in architecture.blocks_of(base)
    ]
    training = base.training
    try:
        decoder = architecture.decoder_of(base.eval())
        with gathering_blocks(decoder, architecture.blocks_of(base)):
            decoder(input_ids=tokens.to(device_of(base)), use_cache=False)
    finally:
        base.train(training)
        for handle in handles:
            handle.remove()
    return torch.stack([square.to("cpu") for square in seen]).clamp(min=1e-12)


@dataclass(frozen=True)
class ProjectionFit:
    """A fitted projection and its error."""

    weight: Tensor
    """W_proj, (d, d_s)."""
    relative_error: float
    """||W_head W_proj - W_small||_F / ||W_small||_F, with ``weight`` rounded to its dtype. 0 is exact."""
    ridge: float
    """Added to the diagonal: 0 unless the head's columns are linearly dependent."""


@torch.no_grad()
def fit_projection(
    head: Tensor, small_head: Tensor, dtype: torch.dtype = torch.float32, rows: int = CHUNK
) -> ProjectionFit:
    """Fit the projection with which the base's head gives the logits of the small model's head.

    Args:
        head: W_head (V, d), of any floating dtype; the result is on its device.
        small_head: W_small (V, d_s), on any device.
        dtype: of the result.
        rows: chunk size.
    """
    width, small_width = head.shape[1], small_head.shape[1]
    device = _exact_device(head)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, small_width, dtype=torch.float64, device=device)
    for a, b in _chunks(head, small_head, rows):
        gram.addmm_(a.T, a)
        cross.addmm_(a.T, b)
    solution, ridge = _solve(gram, cross)
    weight = solution.to(dtype)
    return ProjectionFit(weight.to(head.device), projection_error(head, small_head, weight, rows), ridge)


@torch.no_grad()
def projection_error(head: Tensor, small_head: Tensor, weight: Tensor | None, rows: int = CHUNK) -> float:
    """Return ||W_head W_proj - W_small||_F / ||W_small||_F, summed over the rows themselves in float64.

    ``weight`` is W_proj (d, d_s), or None for no projection, where d = d_s.
    """
    wrong, whole = 0.0, 0.0
    for a, b in _chunks(head, small_head, rows):
        made = a if weight is None else a @ weight.to(a)
        wrong += (made - b).square().sum().item()
        whole += b.square().sum().item()
    return (wrong / whole) ** 0.5 if whole else float("nan")


def _exact_device(head: Tensor) -> torch.device:
    return torch.device("cpu") if head.device.type == "mps" else head.device  # Apple's GPUs have no float64


def _chunks(head: Tensor, small_head: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    device = _exact_device(head)
    for start in range(0, head.shape[0], rows):
        a, b = (matrix[start : start + rows].to(device, torch.float64) for matrix in (head, small_head))
        yield a, b


def _solve(gram: Tensor, cross: Tensor) -> tuple[Tensor, float]:
    """Solve gram X = cross by a Cholesky factorization; return X and the ridge that was needed."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = gram.diagonal()
    ridge = 0.0
    if failed or factor.diagonal().square().min() <= SINGULAR * diagonal.max():
        ridge = RIDGE * (diagonal.mean().item() or 1.0)
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return torch.cholesky_solve(cross, factor), ridge
