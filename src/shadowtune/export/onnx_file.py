"""A plain Llama, Mistral, Qwen2 or Qwen3 as one ONNX graph with a key-value cache.

The graph is written operator by operator rather than traced: so the embedding and a tied head are one stored matrix,
also in 8 and 4 bits. Its inputs and outputs have the names that optimum gives them.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from shadowtune.errors import UnsupportedArchitectureError
from shadowtune.export.gguf_file import head_width_of
from shadowtune.export.onnx_graph import Graph

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
QUANTIZATIONS = ("f32", "f16", "int8", "int4")
FILE = "model.onnx"
FIRST_LOGITS = 2
"""Value in ``attention_mask``, where others are 0 or 1, of the first new position that gets logits; without it, all
new positions do. A further input would be unknown to other programs, and onnxruntime warns of optional ones."""

_OPSET, _MICROSOFT_OPSET, _IR = 18, 1, 8
_FLOAT, _INT64, _BOOL = 1, 7, 9
_LOWEST = float(np.finfo(np.float32).min)
_EVERYTHING = 2**31 - 1


def write_onnx(model: PreTrainedModel, file: Path, quantization: str) -> None:
    """Write a causal language model.

    Inputs are ``input_ids`` (B, S), ``attention_mask`` (B, past + S) and ``position_ids`` (B, S), int64, and
    ``past_key_values.N.key`` and ``.value`` (B, key-value heads, past, head width); outputs ``logits`` (B, S, V), of
    fewer positions with ``FIRST_LOGITS`` in the mask, and ``present.N.key`` and ``.value``. The caches and logits are
    float32, however the matrices are stored. Names of inputs, outputs and axes are those of optimum, which computes
    the shapes of outputs from the names of their axes.

    Args:
        model: in float32.
        file: to create.
        quantization: one of ``QUANTIZATIONS``. Matrices whose rows are not a multiple of 32 long stay float16 in
            int8 and int4.

    Raises:
        UnsupportedArchitectureError: if the architecture is another one.
    """
    import onnx

    _check(model.config)
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
    if document.ByteSize() >= _EVERYTHING:
        raise UnsupportedArchitectureError("an ONNX file holds at most 2 GB; use --quant int8, or --to safetensors")
    onnx.save(document, str(file))


def _check(config: Any) -> None:
    kind, values = config.model_type, vars(config)
    windows = values.get("sliding_window") and (kind == "mistral" or "sliding_attention" in values["layer_types"])
    rope = config.rope_parameters.get("rope_type", "default") if kind in ARCHITECTURES else "default"
    if (
        kind not in ARCHITECTURES
        or windows
        or config.hidden_act != "silu"
        or rope not in ("default", "linear", "llama3")
    ):
        raise UnsupportedArchitectureError(
            f"ONNX export knows {', '.join(ARCHITECTURES)} with SiLU, full attention and fixed rotations, not this "
            f"{kind!r}; use --to safetensors"
        )


class _Writer:
    """Walks through a model's modules and writes what each computes."""

    def __init__(self, model: PreTrainedModel, graph: Graph) -> None:
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
        kept = graph.node("Slice", state, self.first_kept, graph.constant([_EVERYTHING]), graph.constant([1]))
        kept = self._norm(kept, "model.norm")
        if self.config.tie_word_embeddings:
            logits = graph.linear(kept, "model.embed_tokens", table)
        else:
            logits = self._linear(kept, "lm_head")
        graph.rename(logits, "logits")
        return self._proto()

    def _positions(self) -> None:
        """Write the rotations (B, 1, S, width) of the positions, and what may attend to what: (B, 1, 1, S, T)."""
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
        # Heads that share keys and values stand in an axis of their own, along which these are broadcast.
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
