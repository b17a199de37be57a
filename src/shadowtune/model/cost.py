"""Memory and operations of a model's step, counted on the meta device: the real code runs on tensors without data.

Every operation that torch dispatches is seen by ``CostCounter``. It adds up the storages that are alive, whose largest
sum is the peak, and groups the operations by function and shapes. So the count follows the model, its boundaries, its
loss and its gradients as they are, whatever the architecture, and a base of 70 billion parameters takes seconds.

What a kernel allocates inside itself, and what an allocator keeps or loses, is not seen.
"""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig

from shadowtune.compatibility import cache_of
from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.errors import ConfigError
from shadowtune.model.objective import Objective, class_objective, joint_class_objective, own_class_objective

META = torch.device("meta")
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Config fields of bases whose operations depend on the data."""
QUANTIZED_BYTES = {"int8": 1.0, "int4": 1.0 + 5 / 32, "nf4": 0.5 + 4 / 64}
"""Bytes of a quantized weight. int8: scales by row are neglected. int4: torchao keeps a byte for each number, and a
float32 scale and a zero point for 32. nf4: bitsandbytes keeps a float32 scale for 64."""


@dataclass(frozen=True)
class TensorShape:
    """A tensor argument without its data."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorShape":
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


@dataclass
class Operation:
    """Calls of one function with the same shapes."""

    function: Any
    """An ``OpOverload`` of torch."""
    arguments: tuple[Any, dict[str, Any]]
    """Positional and keyword arguments, with ``TensorShape`` in place of tensors."""
    flops: float
    """Floating-point operations of the products in one call."""
    bytes: int
    """Bytes that one call reads and writes; 0 for a view."""
    count: int = 0


@dataclass(frozen=True)
class StepCost:
    """Cost of one step, above what was in memory before it."""

    peak: int
    """Most bytes alive at once."""
    activations: int
    """Bytes alive after the forward pass of training, for the backward pass; 0 of inference."""
    left: int
    """Bytes alive after the step: gradients, or the key-value cache."""
    operations: list[Operation] = field(repr=False)

    @property
    def flops(self) -> float:
        """Floating-point operations of all products."""
        return sum(operation.flops * operation.count for operation in self.operations)


class CostCounter(TorchDispatchMode):
    """Counts the bytes and operations of what runs inside; the peak and the live bytes start at 0.

    Args:
        model: whose parameters and buffers are there already.
        labelled: fraction of the positions that have a label, which decides how many a loss selects.
    """

    def __init__(self, model: nn.Module, labelled: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labelled = labelled
        self.live = self.peak = 0
        self.operations: dict[str, Operation] = {}
        self._there = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._sizes = {storage._cdata: 0 for storage in self._there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is torch.bool or 1  # "is no token padding?", "is this one document?": yes
        if func is torch.ops.aten.nonzero.default:
            out: Any = torch.empty(
                (round(self.labelled * args[0].numel()), args[0].ndim), dtype=torch.long, device=META
            )
        else:
            out = func(*args, **kwargs)
        fresh = sum(self._track(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self._record(func, args, kwargs, out, fresh)
        return out

    def _track(self, tensor: Tensor) -> int:
        """Count a storage that is new; return its bytes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return 0
        size = self._sizes[key] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)
        return size

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any, fresh: int) -> None:
        shapes = tree_map_only(Tensor, TensorShape.of, (args, kwargs))
        key = f"{func}{shapes}"
        if key not in self.operations:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            moved = sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors) + fresh
            works = fresh > 0 or func._schema.is_mutable
            flops = _flops(func, args, kwargs, out)
            self.operations[key] = Operation(func, shapes, flops, moved if works or flops else 0)
        self.operations[key].count += 1


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Context in which attention is one fused operation, as on CPU and GPU; the meta device would keep all scores.

    torch's function is replaced meanwhile: a function mode would not be active in what checkpointing recomputes.
    """
    original = F.scaled_dot_product_attention

    def fused(*args: Any, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any) -> Tensor:
        kwargs.pop("enable_gqa", None)  # the operation takes fewer keys than queries
        attended: Tensor = ATTENTION(*args, dropout_p, is_causal, **kwargs)[0]
        return attended

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    if func.overloadpacket is ATTENTION:  # two products; half of the scores if causal
        (b, h, q, d), k = args[0].shape, args[1].shape[2]
        return 4.0 * b * h * q * k * d * (0.5 if args[4] else 1.0)
    if func.overloadpacket is ATTENTION_BACKWARD:  # five products
        (b, h, q, d), k = args[1].shape, args[2].shape[2]
        return 10.0 * b * h * q * k * d * (0.5 if args[7] else 1.0)
    packet = torch.ops.aten.addmm if func.overloadpacket is torch.ops.aten.addmm_ else func.overloadpacket
    count = flop_registry.get(packet)
    if count is None:
        return 0.0
    return float(count(*args, **{name: value for name, value in kwargs.items() if name != "out"}, out_val=out))


@contextlib.contextmanager
def _counting(model: nn.Module, labelled: float = 1.0) -> Iterator[CostCounter]:
    with META, CostCounter(model, labelled) as counter, _fused_attention():
        yield counter


def check_countable(config: PreTrainedConfig) -> None:
    """Raise ConfigError if the operations of a base depend on its data: those of experts do."""
    fields = vars(config.get_text_config(decoder=True))
    if any((fields.get(name) or 0) > 1 for name in EXPERTS):
        raise ConfigError(f"{config.model_type} routes tokens to experts, whose memory and time depend on the data")


def training_cost(model: nn.Module, rows: int, length: int, labelled: float, objective: Objective) -> StepCost:
    """Count a forward and a backward pass of training over a batch without padding.

    Args:
        model: on the meta device, as it is trained.
        rows: sequences of the batch.
        length: tokens of each.
        labelled: fraction of the tokens that have a label.
        objective: the loss.
    """
    model.train()
    with _counting(model, labelled) as counter:
        batch = _batch(rows, length, objective)
        loss = objective(model, batch, None)
        activations = counter.live
        loss.pop("loss").backward()
        left = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    for parameter in model.parameters():
        parameter.grad = None
    return StepCost(counter.peak, activations, left, list(counter.operations.values()))


@torch.no_grad()
def loss_cost(model: nn.Module, rows: int, length: int, labelled: float, objective: Objective) -> StepCost:
    """Count the forward pass of an evaluation; arguments as in ``training_cost``."""
    model.eval()
    with _counting(model, labelled) as counter:
        objective(model, _batch(rows, length, objective), None)
    return StepCost(counter.peak, 0, 0, list(counter.operations.values()))


def _batch(rows: int, length: int, objective: Objective) -> dict[str, Tensor]:
    ids = torch.zeros((rows, length), dtype=torch.long)
    classes = objective in (class_objective, joint_class_objective, own_class_objective)
    labels = ids.new_zeros(rows) if classes else torch.full_like(ids, IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def prompt_cost(model: nn.Module, rows: int, length: int) -> StepCost:
    """Count the pass of a language model over prompts; what is left is their key-value cache."""
    model.eval()
    with _counting(model) as counter:
        ids = torch.zeros((rows, length), dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = cache_of(model(**inputs, use_cache=True, logits_to_keep=1))
        del inputs
        gc.collect()
        left = counter.live - ids.nbytes
    del cache
    return StepCost(counter.peak, 0, left, list(counter.operations.values()))


def weight_bytes(model: nn.Module, quantization: str = "none") -> int:
    """Return the bytes of all parameters and buffers, with the base's linear layers quantized.

    Args:
        model: on any device.
        quantization: of frozen linear layers, apart from the head.
    """
    tensors: dict[int, int] = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    if quantization != "none":
        for layer in quantized_layers(model):
            tensors[id(layer.weight)] = round(layer.weight.numel() * QUANTIZED_BYTES[quantization])
    return sum(tensors.values())


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that loading with quantization would quantize: the base's, without its head."""
    return [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and not module.weight.requires_grad
        and not name.startswith("shadow.")
        and not name.endswith(("lm_head", "score"))
    ]
