"""ONNX files with a key-value cache, for Llama, Mistral, Qwen2 and Qwen3, and their ``genai_config.json``.

The graph is written operator by operator and not traced by an exporter. Reasons, measured in docs/log.md: the embedding
and a tied head are one stored matrix, also in 8 and 4 bits; inputs, outputs and axes have the names that optimum and
onnxruntime-genai expect; and logits can be limited to the last positions of a prompt.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.errors import UnsupportedArchitectureError
from shadowtune.export.gguf_file import head_width_of

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
QUANTIZATIONS = ("f32", "f16", "int8", "int4")
FILE, GENAI_CONFIG = "model.onnx", "genai_config.json"
FIRST_LOGITS = 2
"""Value in ``attention_mask``, besides 0 and 1, that marks the first new position to get logits; without it, all new
positions do. Another input would be unknown to other programs, and onnxruntime warns of optional ones."""
LAST_STATE, DEFERRAL_OUTPUT = "last_hidden_state", "deferral_logits"
"""The value in the graph that the head reads, and the output that ``export.deferral`` adds."""
BLOCK = 32
"""Numbers of a row that share one scale, in 8 and 4 bits."""

_OPSET, _MICROSOFT_OPSET, _IR = 18, 1, 8
_FLOAT, _INT64, _BOOL = 1, 7, 9
_LOWEST = float(np.finfo(np.float32).min)
_MAX_INT = 2**31 - 1


def write_onnx(model: PreTrainedModel, file: Path, quantization: str) -> None:
    """Write a causal language model.

    Inputs: ``input_ids`` (B, S), ``attention_mask`` (B, past + S) and ``position_ids`` (B, S), int64;
    ``past_key_values.N.key`` and ``.value`` (B, key-value heads, past, head width). Outputs: ``logits`` (B, S, V), or
    fewer positions with ``FIRST_LOGITS`` in the mask; ``present.N.key`` and ``.value``. Caches and logits are float32,
    however the matrices are stored. Names of inputs, outputs and axes are those of optimum, which computes the shapes
    of outputs from the names of their axes.

    Args:
        model: in float32.
        file: to create.
        quantization: one of ``QUANTIZATIONS``. Matrices whose rows are not a multiple of 32 long stay float16 in
            int8 and int4.

    Raises:
        UnsupportedArchitectureError: for any other architecture, and for files above 2 GB.
    """
    import onnx

    _check_architecture(model.config)
    graph = _Writer(model, Graph(quantization)).write()
    document = onnx.helper.make_model(
        graph,
        ir_version=_IR,
        opset_imports=[
            onnx.helper.make_opsetid("", _OPSET),
            onnx.helper.make_opsetid("com.microsoft", _MICROSOFT_OPSET),
        ],
        producer_name="shadowtune",
    )
    if document.ByteSize() >= _MAX_INT:
        raise UnsupportedArchitectureError("an ONNX file holds at most 2 GB; use --quant int8, or --to safetensors")
    onnx.save(document, str(file))


def _check_architecture(config: Any) -> None:
    kind, supported = config.model_type, config.model_type in ARCHITECTURES
    if supported:
        window = kind != "llama" and config.sliding_window
        windows = window and (kind == "mistral" or "sliding_attention" in config.layer_types)
        rope = config.rope_parameters.get("rope_type", "default")
        supported = not windows and config.hidden_act == "silu" and rope in ("default", "linear", "llama3")
    if not supported:
        raise UnsupportedArchitectureError(
            f"ONNX export supports {', '.join(ARCHITECTURES)} with SiLU, full attention and fixed rotations, not this "
            f"{kind!r}; use --to safetensors"
        )


class _Writer:
    """Writes the operators of a model's modules into a graph."""

    def __init__(self, model: PreTrainedModel, graph: "Graph") -> None:
        self.model, self.config, self.graph = model, model.config, graph
        self.width = head_width_of(model.config)
        self.shared = self.config.num_key_value_heads
        self.groups = self.config.num_attention_heads // self.shared

    def write(self) -> Any:
        """Write the whole model and return an ``onnx.GraphProto``."""
        graph, model = self.graph, self.model
        table = cast(nn.Embedding, model.get_input_embeddings()).weight.detach().float().numpy()
        state = graph.rows_of("input_ids", "model.embed_tokens", table)
        self._positions()
        for index in range(self.config.num_hidden_layers):
            state = self._block(state, index, model.get_submodule(f"model.layers.{index}"))
        kept = graph.node("Slice", state, self.first_kept, graph.constant([_MAX_INT]), graph.constant([1]))
        kept = self._norm(kept, "model.norm")
        graph.rename(kept, LAST_STATE)
        if self.config.tie_word_embeddings:
            logits = graph.linear(kept, "model.embed_tokens", table)
        else:
            logits = self._linear(kept, "lm_head")
        graph.rename(logits, "logits")
        return self._proto()

    def _positions(self) -> None:
        """Write the rotations (B, 1, S, width) of the positions, and the attention mask (B, 1, 1, S, T)."""
        graph, rotary = self.graph, self.model.get_submodule("model.rotary_emb")
        frequencies = graph.weight("rotary.frequencies", rotary.get_buffer("inv_freq").float().numpy())
        numbers = graph.node("Cast", graph.node("Unsqueeze", "position_ids", graph.constant([1, 3])), to=_FLOAT)
        half = graph.node("Mul", numbers, frequencies)
        angles = graph.node("Concat", half, half, axis=-1)
        self.cosines, self.sines = graph.node("Cos", angles), graph.node("Sin", angles)

        zero, one = graph.constant(0), graph.constant(1)
        total = graph.node("Gather", graph.node("Shape", "attention_mask"), one)
        fresh = graph.node("Gather", graph.node("Shape", "input_ids"), one)
        keys = graph.node("Range", zero, total, one)
        queries = graph.node("Range", graph.node("Sub", total, fresh), total, one)
        before = graph.node("LessOrEqual", keys, graph.node("Unsqueeze", queries, graph.constant([1])))
        real = graph.node("Cast", graph.node("Unsqueeze", "attention_mask", graph.constant([1, 2, 3])), to=_BOOL)
        self.hidden = graph.node("Not", graph.node("And", before, real))

        mask = graph.node("ReduceMax", "attention_mask", graph.constant([0]), keepdims=0)
        marked = graph.node("Cast", graph.node("Greater", mask, one), to=_FLOAT)
        first = graph.node("Sub", graph.node("ArgMax", marked, axis=0, keepdims=1), graph.node("Sub", total, fresh))
        self.first_kept = graph.node("Max", first, graph.constant([0]))

    def _block(self, state: str, index: int, block: nn.Module) -> str:
        graph, name = self.graph, f"model.layers.{index}"
        mixed = self._attention(self._norm(state, f"{name}.input_layernorm"), index, block.get_submodule("self_attn"))
        state = graph.node("Add", state, mixed)
        normed = self._norm(state, f"{name}.post_attention_layernorm")
        gate = self._linear(normed, f"{name}.mlp.gate_proj")
        gate = graph.node("Mul", gate, graph.node("Sigmoid", gate))
        inner = graph.node("Mul", gate, self._linear(normed, f"{name}.mlp.up_proj"))
        return str(graph.node("Add", state, self._linear(inner, f"{name}.mlp.down_proj")))

    def _attention(self, value: str, index: int, attention: nn.Module) -> str:
        graph, name = self.graph, f"model.layers.{index}.self_attn"
        query = self._rotated(self._heads(value, name, "q", self.shared * self.groups, attention))
        fresh = {"key": self._rotated(self._heads(value, name, "k", self.shared, attention))}
        fresh["value"] = self._heads(value, name, "v", self.shared, attention)
        present = {}
        for part, heads in fresh.items():
            joined = graph.node("Concat", f"past_key_values.{index}.{part}", heads, axis=2)
            graph.rename(joined, f"present.{index}.{part}")
            present[part] = graph.node("Unsqueeze", joined, graph.constant([2]))  # (B, shared, 1, T, width)
        # Query heads that share keys and values have an axis of their own, along which these are broadcast.
        query = self._resized(query, [0, self.shared, self.groups, -1, self.width])
        query = graph.node("Mul", query, graph.constant(self.width**-0.5, np.float32))
        scores = graph.node("MatMul", query, graph.node("Transpose", present["key"], perm=[0, 1, 2, 4, 3]))
        scores = graph.node("Where", self.hidden, graph.constant(_LOWEST, np.float32), scores)
        mixed = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), present["value"])
        joined = self._resized(mixed, [0, self.shared * self.groups, -1, self.width])
        joined = graph.node("Transpose", joined, perm=[0, 2, 1, 3])
        return self._linear(self._resized(joined, [0, 0, -1]), f"{name}.o_proj")

    def _heads(self, value: str, name: str, letter: str, heads: int, attention: nn.Module) -> str:
        """Project and split into (B, heads, S, width); Qwen3 normalizes each head of queries and keys."""
        split = self._resized(self._linear(value, f"{name}.{letter}_proj"), [0, 0, heads, self.width])
        if f"{letter}_norm" in dict(attention.named_children()):
            split = self._norm(split, f"{name}.{letter}_norm")
        return str(self.graph.node("Transpose", split, perm=[0, 2, 1, 3]))

    def _rotated(self, heads: str) -> str:
        graph = self.graph
        first, second = graph.node("Split", heads, outputs=2, axis=-1, num_outputs=2)
        turned = graph.node("Concat", graph.node("Neg", second), first, axis=-1)
        return str(graph.node("Add", graph.node("Mul", heads, self.cosines), graph.node("Mul", turned, self.sines)))

    def _norm(self, value: str, name: str) -> str:
        graph = self.graph
        weight = self.model.get_parameter(f"{name}.weight").detach().float().numpy()
        squares = graph.node("Mul", value, value)
        mean = graph.node("ReduceMean", squares, graph.constant([-1]), keepdims=1)
        root = graph.node("Sqrt", graph.node("Add", mean, graph.constant(self.config.rms_norm_eps, np.float32)))
        return str(graph.node("Mul", graph.node("Div", value, root), graph.weight(name, weight)))

    def _linear(self, value: str, name: str) -> str:
        module = self.model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        bias = None if module.bias is None else module.bias.detach().float().numpy()
        return self.graph.linear(value, name, module.weight.detach().float().numpy(), bias)

    def _resized(self, value: str, shape: list[int]) -> str:
        return str(self.graph.node("Reshape", value, self.graph.constant(shape)))

    def _proto(self) -> Any:
        from onnx import helper, numpy_helper

        describe = helper.make_tensor_value_info
        batch, fresh, past = "batch_size", "sequence_length", "past_sequence_length"
        both = f"{past} + {fresh}"
        inputs = [
            describe("input_ids", _INT64, [batch, fresh]),
            describe("attention_mask", _INT64, [batch, both]),
            describe("position_ids", _INT64, [batch, fresh]),
        ]
        outputs = [describe("logits", _FLOAT, [batch, fresh, self.config.vocab_size])]
        for index in range(self.config.num_hidden_layers):
            for part in ("key", "value"):
                before, after = ([batch, self.shared, length, self.width] for length in (past, both))
                inputs.append(describe(f"past_key_values.{index}.{part}", _FLOAT, before))
                outputs.append(describe(f"present.{index}.{part}", _FLOAT, after))
        stored = [numpy_helper.from_array(array, name) for name, array in self.graph.constants.items()]
        return helper.make_graph(self.graph.nodes, "model", inputs, outputs, stored)


@dataclass
class Graph:
    """Nodes and constants of an ONNX graph under construction; values are referred to by name."""

    quantization: str
    """Storage of matrices: f32, f16, int8 or int4. Everything is computed in float32."""
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
        """Name an output of the graph."""
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
        """Look up rows of a matrix; one of the same name in ``linear`` is stored once."""
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
        return self.node("Cast", name, to=1)  # computed once, when the file is opened

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


def write_genai_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], directory: Path
) -> None:
    """Write ``genai_config.json``, with which onnxruntime-genai opens a directory with an ONNX file.

    Its keys are those of https://onnxruntime.ai/docs/genai/reference/config.html.

    Args:
        model: that was exported.
        tokenizer: of the model.
        ends: tokens that end an answer.
        directory: with the ONNX file.
    """
    config: Any = model.config
    names = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": FILE,
        "head_size": head_width_of(config),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": names["key"],
            "past_value_names": names["value"],
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": names["key"].replace("past_key_values", "present"),
            "present_value_names": names["value"].replace("past_key_values", "present"),
        },
    }
    pad = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    generation = model.generation_config
    penalty = None if generation is None else generation.repetition_penalty
    written: dict[str, Any] = {
        "model": {
            "type": config.model_type,
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "eos_token_id": list(ends),
            "pad_token_id": pad if pad is not None else next(iter(ends), 0),
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "repetition_penalty": 1.0 if penalty is None else penalty,
            "past_present_share_buffer": False,  # the graph concatenates its caches
        },
    }
    if tokenizer.bos_token_id is not None:
        written["model"]["bos_token_id"] = tokenizer.bos_token_id
    (directory / GENAI_CONFIG).write_text(json.dumps(written, indent=2) + "\n")
