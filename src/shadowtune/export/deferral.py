"""The deferral head of a run beside its detached and exported models."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from shadowtune.errors import CheckpointError
from shadowtune.export.onnx_file import DEFERRAL_OUTPUT, FILE, LAST_STATE
from shadowtune.model.deferral_files import SavedDeferralHead, write_deferral_head


def folded_head(saved: SavedDeferralHead | None, shadow: Any) -> SavedDeferralHead | None:
    """Return the head of a saved shadow for its detached form, whose states are those before the projection.

    Args:
        saved: of the states s0; None gives None.
        shadow: the ``Shadow``.
    """
    if saved is None or not isinstance(shadow.projection, nn.Linear):
        return saved
    return SavedDeferralHead(saved.head.folded(shadow.projection.weight), saved.quality)


def add_deferral_head(saved: SavedDeferralHead, path: Path) -> None:
    """Write a head beside a detached or exported model; an ONNX graph gets it as an output.

    Args:
        saved: of the states of this model.
        path: a directory with safetensors or ONNX, or a GGUF file.

    Raises:
        CheckpointError: if its width is not that of the model, or the files cannot be written.
    """
    config = path / "config.json"
    if config.is_file():
        width = json.loads(config.read_text(encoding="utf-8")).get("hidden_size", saved.head.width)
        if width != saved.head.width:
            raise CheckpointError(f"the deferral head reads states of width {saved.head.width}, {path} has {width}")
    if (path / FILE).is_file():
        _add_output(saved, path / FILE)
    write_deferral_head(saved, path)


def _add_output(saved: SavedDeferralHead, file: Path) -> None:
    """Add ``DEFERRAL_OUTPUT``, W s + c (B, S, 2) at the positions that have logits; the reader adds U x."""
    import onnx
    from onnx import helper, numpy_helper

    document = onnx.load(str(file))
    graph, name = document.graph, DEFERRAL_OUTPUT
    weight, bias = saved.head.weight.T.contiguous().numpy(), saved.head.bias.numpy()
    graph.initializer.extend(
        [numpy_helper.from_array(weight, f"{name}.weight"), numpy_helper.from_array(bias, f"{name}.bias")]
    )
    graph.node.append(helper.make_node("MatMul", [LAST_STATE, f"{name}.weight"], [f"{name}.product"]))
    graph.node.append(helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [name]))
    shape: list[str | int | None] = ["batch_size", "sequence_length", 2]
    graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    onnx.save(document, str(file))
