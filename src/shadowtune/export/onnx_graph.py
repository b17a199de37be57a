"""Operators of an ONNX graph, written by name; matrices in 32, 16, 8 or 4 bits."""

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

BLOCK = 32
"""Numbers of a row that share one scale, in 8 and 4 bits."""


@dataclass
class Graph:
    """Nodes and constants of a graph under construction; values are known by their names."""

    quantization: str
    """f32, f16, int8 or int4: how matrices are stored. Everything is computed in float32."""
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def node(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add an operator and return the name of its output, or a list of names if there are several."""
        from onnx import helper

        names = [f"{kind}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Return the name of a constant; equal ones are stored once."""
        array = np.asarray(value, dtype=dtype)
        name = f"constant_{array.dtype}_{array.shape}_{sha256(array.tobytes()).hexdigest()[:32]}".replace(" ", "")
        self.constants.setdefault(name, array)
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        """Store a vector in float32 under its own name."""
        self.constants.setdefault(name, array.astype(np.float32))
        return name

    def rename(self, value: str, name: str) -> None:
        """Give a value its public name."""
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def linear(self, value: str, name: str, matrix: np.ndarray, bias: np.ndarray | None = None) -> str:
        """Multiply (..., in) by a matrix (out, in) and add a bias."""
        rows, columns = matrix.shape
        if self._packs(matrix):
            packed, scales = self._packed(name, matrix)
            sizes = {"K": columns, "N": rows, "bits": self._bits, "block_size": BLOCK, "accuracy_level": 4}
            product = self.node("MatMulNBits", value, packed, scales, domain="com.microsoft", **sizes)
        else:
            transposed = self.node("Transpose", self._plain(name, matrix), perm=[1, 0])
            product = self.node("MatMul", value, transposed)
        return product if bias is None else self.node("Add", product, self.weight(f"{name}.bias", bias))

    def rows_of(self, indices: str, name: str, matrix: np.ndarray) -> str:
        """Look rows of a matrix up; the stored matrix may be the one that ``linear`` multiplies by, under one name."""
        if not self._packs(matrix):
            return self.node("Gather", self._plain(name, matrix), indices)
        packed, scales = self._packed(name, matrix)
        codes = self.node("Gather", packed, indices)  # (B, S, blocks, bytes)
        if self._bits == 4:  # two codes a byte, the lower half first
            low = self.node("BitwiseAnd", codes, self.constant(15, np.uint8))
            high = self.node("BitShift", codes, self.constant(4, np.uint8), direction="RIGHT")
            axis = self.constant([-1])
            pair = [self.node("Unsqueeze", low, axis), self.node("Unsqueeze", high, axis)]
            halves = self.node("Concat", *pair, axis=-1)
            codes = self.node("Reshape", halves, self.constant([0, 0, 0, BLOCK]))
        middle = self.constant(2 ** (self._bits - 1), np.float32)
        numbers = self.node("Sub", self.node("Cast", codes, to=1), middle)
        scale = self.node("Gather", scales, indices)  # (B, S, blocks)
        scaled = self.node("Mul", numbers, self.node("Unsqueeze", scale, self.constant([-1])))
        return self.node("Reshape", scaled, self.constant([0, 0, matrix.shape[1]]))

    @property
    def _bits(self) -> int:
        return {"int8": 8, "int4": 4}[self.quantization]

    def _packs(self, matrix: np.ndarray) -> bool:
        return self.quantization in ("int8", "int4") and matrix.shape[1] % BLOCK == 0

    def _plain(self, name: str, matrix: np.ndarray) -> str:
        if self.quantization == "f32":
            return self.weight(name, matrix)
        self.constants.setdefault(name, matrix.astype(np.float16))
        return self.node("Cast", name, to=1)  # once, when the file is opened

    def _packed(self, name: str, matrix: np.ndarray) -> tuple[str, str]:
        """Store codes (out, blocks, bytes) as uint8 around 2^(bits-1), and scales (out, blocks) in float32."""
        if f"{name}.codes" not in self.constants:
            codes, scales = quantize(matrix, self._bits)
            self.constants |= {f"{name}.codes": codes, f"{name}.scales": scales}
        return f"{name}.codes", f"{name}.scales"


def quantize(matrix: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix (out, in) to ``bits`` bits, symmetrically, with one scale for each 32 numbers of a row.

    Returns:
        Codes (out, in / 32, 4 * bits), uint8, two a byte for 4 bits; scales (out, in / 32), float32.
    """
    blocks = matrix.astype(np.float32).reshape(matrix.shape[0], -1, BLOCK)
    middle = 2 ** (bits - 1)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)  # of the sign with one code more
    scales = extreme / -middle if bits == 4 else np.abs(extreme) / (middle - 1)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(blocks * inverse) + middle, 0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return np.ascontiguousarray(codes), scales[..., 0].astype(np.float32)
