"""A boundary where nobody wants gradients: on few tokens each operation costs more by its call than by its work.

So there are few: rows and states are matrices, spent arrays are written over, scale and sum are part of a product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowtune.core.fused import FusedParameters


def inference_boundary(
    hidden_states: Tensor,
    shadow_states: Tensor,
    parameters: FusedParameters,
    alpha: float,
    transform_mask: Tensor | None = None,
    injection_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross a boundary as ``fused_boundary`` does, with no masks and no gradients."""
    assert transform_mask is None and injection_mask is None
    p, wide = parameters, hidden_states.to(shadow_states.dtype)
    n = F.layer_norm(wide, wide.shape[-1:], p.norm_weight, p.norm_bias)
    t = torch.mm(F.silu(torch.mm(n, p.transform_down), inplace=True), p.transform_up)
    g = torch.mm(F.silu(torch.mm(n, p.gate_down), inplace=True), p.gate_up, out=n).sigmoid_()
    refined = torch.lerp(shadow_states, t, g)
    bottleneck = torch.mm(torch.sub(wide, refined, out=t), p.injection_down)
    crossed = torch.addmm(wide, bottleneck, p.injection_up, alpha=alpha, out=t)
    return crossed.to(hidden_states.dtype), refined
