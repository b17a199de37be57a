"""The file of a deferral head, ``deferral_head.json`` beside a model, ``NAME.deferral_head.json`` beside ``NAME.gguf``.

It has the head's weights, and the SHA-256 of the model's: a head is refused beside other ones, whose states would mean
something else. It is no safetensors file, because programs such as vLLM read every such file of a directory as the
model's.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shadowtune.core.deferral_head import STATISTICS, DeferralHead
from shadowtune.errors import CheckpointError
from shadowtune.model.checkpoint import tensor_checksum
from shadowtune.model.files import writing_into

FILE = "deferral_head.json"
SCHEMA = 2
"""1 had no weights of the token statistics."""
CHUNK = 1 << 22
"""Bytes of a weights file that are hashed at a time."""


@dataclass(frozen=True)
class SavedDeferralHead:
    """A deferral head with what is known about it."""

    head: DeferralHead
    quality: Mapping[str, Any] = field(default_factory=dict)
    """Of the fit, on examples that it did not see: plain values."""


def head_file(model: Path) -> Path:
    """Return the path of the head of a model, a directory or a GGUF file; it need not exist."""
    return model.with_name(f"{model.stem}.{FILE}") if model.is_file() else model / FILE


def weights_digest(model: Path) -> str:
    """Return the SHA-256 of a model's weights, as hexadecimal digits.

    Args:
        model: a GGUF file, or a directory; of the latter all ``*.safetensors`` and ``*.onnx`` files count.

    Raises:
        CheckpointError: if a file cannot be read, or the directory has none.
    """
    if model.is_file():
        return _file_digest(model)
    files = sorted(file for pattern in ("*.safetensors", "*.onnx") for file in model.glob(pattern))
    if not files:
        raise CheckpointError(f"{model} has no weights, to which a deferral head could belong")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def write_deferral_head(saved: SavedDeferralHead, model: Path) -> None:
    """Write a head beside the weights of a model, which must be complete.

    Args:
        saved: the head, of the states of this very model.
        model: a directory, or a GGUF file.

    Raises:
        CheckpointError: if the files cannot be written, or there are no weights.
    """
    head = saved.head
    own = {"weight": head.weight, "bias": head.bias, "statistics_weight": head.statistics_weight}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in own.items()}
    described: dict[str, Any] = {
        "schema": SCHEMA,
        "model_sha256": weights_digest(model),
        "width": head.width,
        "outputs": ["log-odds of another token", "log-odds of a better answer"],
        "reads": "the state that the language model's head reads, of each generated token",
        "statistics": ["log-probability", "margin of the two likeliest", "entropy over its largest value"],
        "quality": dict(saved.quality),
        "sha256": tensor_checksum(tensors),
        **{name: tensor.tolist() for name, tensor in tensors.items()},
    }
    with writing_into(model.parent if model.is_file() else model) as staging:
        (staging / head_file(model).name).write_text(json.dumps(described) + "\n", encoding="utf-8")


def read_deferral_head(model: Path) -> SavedDeferralHead | None:
    """Return the head beside a model, a directory or a GGUF file; None if there is none.

    Raises:
        CheckpointError: if it belongs to other weights, or a file is damaged.
    """
    file = head_file(model)
    if not file.is_file():
        return None
    damaged = f"{file} is damaged; train the deferral head anew, or delete the file to do without it"
    try:
        described: Any = json.loads(file.read_text(encoding="utf-8"))
        expected, width, quality = described["model_sha256"], described["width"], dict(described["quality"])
        names = ("weight", "bias") if described["schema"] == 1 else ("weight", "bias", "statistics_weight")
        tensors = {name: torch.tensor(described[name], dtype=torch.float32) for name in names}
        head = DeferralHead(**tensors)
        intact = tensor_checksum(tensors) == described["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise CheckpointError(damaged) from None
    if expected != weights_digest(model):
        raise CheckpointError(
            f"{file} belongs to other weights than those of {model}; export both anew, or delete the file to do "
            "without a deferral head"
        )
    parts = (head.weight, head.bias, head.statistics_weight)
    shapes = [tuple(part.shape) for part in parts] == [(2, width), (2,), (2, STATISTICS)]
    if not (shapes and intact and all(bool(part.isfinite().all()) for part in parts)):
        raise CheckpointError(damaged)
    return SavedDeferralHead(head, quality)


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest()
