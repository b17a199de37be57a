"""A short, stable name for a base's weights, so that a shadow is never run beside another model of the same shape."""

import hashlib

import torch
from transformers import PreTrainedModel

from shadowtune.attach.architectures import architecture_of

SAMPLES = 16


@torch.no_grad()
def base_fingerprint(base: PreTrainedModel) -> str | None:
    """Hash the name, shape and 16 evenly spaced entries of each weight of the base, its task head left out.

    Entries are rounded to bfloat16 first, so float32, bfloat16 and float16 copies of moderate values agree in practice
    between float32 and bfloat16. A quantized base has no fingerprint (None): its stored numbers are not its weights.
    """
    if base.config.to_dict().get("quantization_config") is not None:
        return None
    digest = hashlib.sha256()
    for name, parameter in architecture_of(base.config).decoder_of(base).named_parameters():
        if parameter.is_meta:
            return None
        flat = parameter.reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, SAMPLES, device=flat.device, dtype=torch.float64).long()
        entries = flat[index].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}:{tuple(parameter.shape)}:".encode())
        digest.update(entries.numpy().tobytes())
    return digest.hexdigest()[:16]
