"""Seconds of counted operations (``cost.py``): measured on this machine's CPU, or from the rates of a device."""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, LlamaConfig

from shadowtune.config.shadow import ShadowConfig
from shadowtune.model.cost import Operation, TensorShape, training_cost
from shadowtune.model.methods import make_trainable
from shadowtune.model.objective import joint_causal_objective

EFFICIENCY = 0.5
"""Fraction of a device's highest rate of matrix products that a network is assumed to reach."""
BANDWIDTH_EFFICIENCY = 0.8
LARGEST_FLOPS, LARGEST_BYTES = 4e9, 2**28
"""A larger operation is not run; its time follows from the rate of a product or a sum that is run."""
REPEATS = 3
ADAMW_BYTES = 60
"""Bytes that AdamW reads and writes for each float32 parameter, in the passes of torch's single-tensor loop."""
UNTIMED = ("aten._local_scalar_dense", "aten.nonzero")


class Clock(Protocol):
    """Turns operations into seconds."""

    @property
    def source(self) -> str:
        """Description of where the seconds come from."""

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the seconds of all calls of these operations."""
        ...

    def optimizer_seconds(self, parameters: int) -> float:
        """Return the seconds of an AdamW step over so many float32 parameters."""
        ...


@dataclass(frozen=True)
class Roofline:
    """Time from two rates: each operation takes as long as its products or its memory traffic, whichever is longer.

    Williams et al., 2009, https://doi.org/10.1145/1498765.1498785.
    """

    flops: float
    """Floating-point operations of products in a second, in 16 bits."""
    flops_float32: float
    """The same in float32."""
    bandwidth: float
    """Bytes in a second."""
    source: str

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the seconds of all calls of these operations."""
        return sum(each.count * max(self._product(each), each.bytes / self.bandwidth) for each in operations)

    def _product(self, operation: Operation) -> float:
        narrow = any(shape.dtype.itemsize == 2 for shape in shapes_of(operation))
        return operation.flops / (self.flops if narrow else self.flops_float32)

    def optimizer_seconds(self, parameters: int) -> float:
        """Return the seconds of an AdamW step over so many float32 parameters."""
        return parameters * ADAMW_BYTES / self.bandwidth


class MeasuredClock:
    """Time on this machine's CPU: each kind of operation is run on random data, and a tiny step for the overhead.

    The fastest of a few runs counts, so the estimate is that of a machine that does nothing else.
    """

    def __init__(self) -> None:
        self._known: dict[str, float] = {}
        threads = torch.get_num_threads()
        self.source = f"each operation measured on this machine ({threads} thread{'' if threads == 1 else 's'})"

    @torch.no_grad()
    def seconds(self, operations: Iterable[Operation]) -> float:
        """Return the seconds of all calls of these operations, and of the Python code around them."""
        return sum(each.count * (self._measured(each) + self._overhead) for each in operations)

    @torch.no_grad()
    def optimizer_seconds(self, parameters: int) -> float:
        """Return the seconds of an AdamW step over so many float32 parameters."""
        return parameters * self._adamw

    def _measured(self, operation: Operation) -> float:
        if not (operation.flops or operation.bytes) or str(operation.function).startswith(UNTIMED):
            return 0.0
        if operation.flops > LARGEST_FLOPS or operation.bytes > LARGEST_BYTES:
            dtype = next(shape.dtype for shape in shapes_of(operation) if shape.dtype.is_floating_point)
            return max(operation.flops / product_speed(dtype), operation.bytes / sum_speed())
        key = f"{operation.function}{operation.arguments}"
        if key not in self._known:
            args, kwargs = _with_data(operation.arguments)
            self._known[key] = _fastest(functools.partial(operation.function, *args, **kwargs))
        return self._known[key]

    @functools.cached_property
    def _overhead(self) -> float:
        """Seconds that Python and torch take to start an operation, from a training step too small to compute much."""
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
        )

        def tiny() -> Any:
            base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
            return make_trainable(base, "shadow", shadow=ShadowConfig())

        with torch.device("meta"), torch.enable_grad():
            counted = training_cost(tiny(), 1, 8, 1.0, joint_causal_objective)
        model, ids = tiny().train(), torch.zeros((1, 8), dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

        def step() -> None:
            with torch.enable_grad():
                joint_causal_objective(model, inputs, None)["loss"].backward()

        return _fastest(step) / sum(each.count for each in counted.operations)

    @functools.cached_property
    def _adamw(self) -> float:
        parameter = torch.rand(2**20, requires_grad=True)
        parameter.grad = torch.rand(2**20)
        optimizer = torch.optim.AdamW([parameter])
        return _fastest(lambda: optimizer.step()) / parameter.numel()


@functools.cache
def machine_clock() -> MeasuredClock:
    """Return the clock of this process, which measures nothing twice."""
    return MeasuredClock()


@functools.cache
def product_speed(dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Return the floating-point operations a second of a matrix product on the threads of this process."""
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    return float(2 * size**3 / _fastest(lambda: a @ b))


@functools.cache
def sum_speed(size: int = 2**23) -> float:
    """Return the bytes a second of an elementwise sum with a new result."""
    a, b = torch.rand(size), torch.rand(size)
    return 3 * a.nbytes / _fastest(lambda: a + b)


def cpu_seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of a call on an idle machine: CPU time over threads, so other programs do not count."""
    start = time.process_time()
    call()
    return (time.process_time() - start) / torch.get_num_threads()


def _fastest(call: Callable[[], Any]) -> float:
    call()
    return min(cpu_seconds(call) for _ in range(REPEATS))


def shapes_of(operation: Operation) -> list[TensorShape]:
    """Return the tensor arguments of an operation."""
    found: list[TensorShape] = []
    tree_map_only(TensorShape, found.append, operation.arguments)
    return found


def _with_data(arguments: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Put random numbers, zeros (integers) or ones (booleans) in place of shapes, and the CPU in place of meta."""
    on_cpu = tree_map_only(torch.device, lambda _: torch.device("cpu"), arguments)
    made: tuple[Any, dict[str, Any]] = tree_map_only(TensorShape, _tensor, on_cpu)
    return made


def _tensor(shape: TensorShape) -> Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape.size, shape.stride, strict=True) if size)
    if shape.dtype.is_floating_point:
        data = torch.rand(extent).to(shape.dtype)
    else:
        data = torch.full((extent,), int(shape.dtype is torch.bool), dtype=shape.dtype)
    return data.as_strided(shape.size, shape.stride)
