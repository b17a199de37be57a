"""Identification of a base's weights, so that a shadow is never run beside another model of the same shape.

Two descriptions are saved with a shadow. ``base_fingerprint`` is a hash of 16 letters for people, comparable within one
precision. ``base_signature`` decides: in the precision in which it was made, every bit of every weight counts; in
another one, sums of the weights are compared within the rounding error, since no hash survives being rounded twice
(float32 to float16 to bfloat16 is not float32 to bfloat16).
"""

import base64
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.attach.sharding import whole_tensor

SAMPLES = 16
COLUMNS = 4096
"""Weights are summed in rows of this length, ``ROWS_AT_ONCE`` at a time."""
ROWS_AT_ONCE = 1024
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
ROUNDING = 2.0**-9
"""Largest relative error of rounding to bfloat16, which weights in another precision may have gone through."""
SMALLEST_STEP = 2.0**-25
"""Largest absolute error of a number too small for float16."""
HEAD = "(head)"
"""Name of a language model's head that is not tied to its embedding."""


@torch.no_grad()
def base_fingerprint(base: PreTrainedModel) -> str | None:
    """Hash the name, shape and 16 evenly spaced entries of each weight of the base, without its task head.

    Entries are rounded to bfloat16 first, so a float32 and a bfloat16 copy agree. None for a quantized or offloaded
    base, whose stored numbers are not its weights.
    """
    digest = hashlib.sha256()
    for name, parameter in _weights(base):
        if parameter is None:
            return None
        if name == HEAD:
            continue
        flat = parameter.reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, SAMPLES, device=flat.device, dtype=torch.float64).long()
        entries = flat[index].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}:{tuple(parameter.shape)}:".encode())
        digest.update(entries.numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def base_signature(base: PreTrainedModel) -> dict[str, Any] | None:
    """Describe all weights of a base: its headless model's, and a language model's untied head.

    Returns:
        dtype; "checksum" of every bit, and "head_checksum"; "sums", a float32 per weight in base64, the head's last:
        the sum of its numbers with pseudo-random signs. None for a quantized or offloaded base.
    """
    checksum, head_checksum, sums = hashlib.sha256(), None, []
    for name, parameter in _weights(base):
        if parameter is None or parameter.dtype not in BITS:
            return None
        bits = _bit_sums(parameter)
        if name == HEAD:
            head_checksum = hashlib.sha256(bits).hexdigest()[:16]
        else:
            checksum.update(f"{name}:{tuple(parameter.shape)}:".encode() + bits)
        sums.append(_signed_sum(parameter)[0])
    return {
        "dtype": str(base.dtype).removeprefix("torch."),
        "checksum": checksum.hexdigest()[:16],
        "head_checksum": head_checksum,
        "sums": base64.b64encode(np.array(sums, dtype="<f4").tobytes()).decode(),
    }


@torch.no_grad()
def has_signature(base: PreTrainedModel, signature: Mapping[str, Any]) -> bool:
    """Return whether a base has the weights that a signature describes, whatever precision it was loaded in.

    A head is compared if both have an untied one. A quantized or offloaded base is not refused.
    """
    found = base_signature(base)
    if found is None:
        return True
    if found["dtype"] == signature["dtype"]:
        heads = (found["head_checksum"], signature["head_checksum"])
        return found["checksum"] == signature["checksum"] and (None in heads or heads[0] == heads[1])
    sums = np.frombuffer(base64.b64decode(signature["sums"]), dtype="<f4")
    body = len(list(architecture_of(base.config).decoder_of(base).named_parameters()))
    if body != len(sums) - (signature["head_checksum"] is not None):
        return False
    for expected, (_, parameter) in zip(sums, _weights(base), strict=False):
        assert parameter is not None
        total, square = _signed_sum(parameter)
        allowed = 4 * (ROUNDING * math.sqrt(square) + SMALLEST_STEP * math.sqrt(parameter.numel())) + 1e-5 * abs(total)
        if not abs(total - float(expected)) <= allowed:
            return False
    return True


def _weights(base: PreTrainedModel) -> Iterator[tuple[str, Tensor | None]]:
    """Yield names and weights, the head last; None for a weight that is quantized or not in memory.

    Of weights that several processes share, one at a time is whole.
    """
    if base.config.to_dict().get("quantization_config") is not None:
        yield "", None
        return
    for name, parameter in architecture_of(base.config).decoder_of(base).named_parameters():
        yield name, None if parameter.is_meta else whole_tensor(parameter)
    head: Any = base.get_output_embeddings()
    embedding: Any = base.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        yield HEAD, None if head.weight.is_meta else whole_tensor(head.weight)


def _chunks(parameter: Tensor) -> Iterator[Tensor]:
    """Yield a weight's numbers in rows of ``COLUMNS``, and the remaining ones in a shorter row."""
    flat = parameter.detach().reshape(-1)
    whole = flat.numel() // COLUMNS * COLUMNS
    yield from flat[:whole].view(-1, COLUMNS).split(ROWS_AT_ONCE)
    if whole < flat.numel():
        yield flat[whole:][None]


def _bit_sums(parameter: Tensor) -> bytes:
    """Return hashes of the sums of a weight's bit patterns by row and by column: any changed or moved number shows."""
    kind = BITS[parameter.dtype]
    parts = []
    for chunk in _chunks(parameter):
        bits = chunk.contiguous().view(kind)
        parts += [bits.sum(dim, dtype=torch.int64).cpu().numpy().tobytes() for dim in (0, 1)]
    return b"".join(hashlib.sha256(part).digest() for part in parts)


def _signed_sum(parameter: Tensor) -> tuple[float, float]:
    """Return the sum of a weight's numbers, each with a sign by its index, and the sum of their squares."""
    total = square = 0.0
    for number, chunk in enumerate(_chunks(parameter)):
        wide = chunk.float()
        total += float(_signs(len(wide), number, wide.device) @ (wide @ _signs(wide.shape[1], 0, wide.device)))
        square += float(wide.square().sum())
    return total, square


def _signs(count: int, start: int, device: torch.device) -> Tensor:
    """Return deterministic pseudo-random signs +-1, (count,)."""
    index = torch.arange(1, count + 1, device=device) + start * ROWS_AT_ONCE
    return ((index * 2_654_435_761 >> 15) & 1).float() * 2 - 1
