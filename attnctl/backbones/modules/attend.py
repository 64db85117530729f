"""The one place where backbone modules reach the attention kernels, in a form that TorchScript accepts.

Annotations are real objects here and in every file of modules (no deferred evaluation): TorchScript reads them.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from attnctl.errors import UnsupportedModelError, shown
from attnctl.kernels import dispatch

__all__ = ["attend", "ceil_div", "check_model"]


@register_notrace_function
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax(q k^T scale + mask) v with attnctl's kernels.

    Shapes: q [B, H, Nq, D]; k, v [B, H, Nk, D]; mask (boolean or additive) broadcastable to [B, H, Nq, Nk].
    dropout: probability of dropping an attention weight; above 0 the weights are written out. So are they for a masked
    call that is exported: torch.export keeps the strides of a fused kernel's output, which ONNX's decomposition breaks.
    """
    written_out = dropout > 0.0
    if not torch.jit.is_scripting():
        written_out = written_out or (mask is not None and torch.compiler.is_exporting())
    if written_out:
        factor = scale if scale is not None else q.shape[-1] ** -0.5
        logits = (q * factor) @ k.transpose(-2, -1)
        if mask is not None:
            if mask.dtype == torch.bool:
                logits = logits.masked_fill(mask.logical_not(), float("-inf"))
            else:
                logits = logits + mask
        weights = logits.float().softmax(dim=-1).to(v.dtype)
        if dropout > 0.0:
            weights = F.dropout(weights, dropout, True)
        return weights @ v
    if torch.jit.is_scripting():
        # A script cannot call the dispatcher; torch's own kernel computes the same.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return dispatch.attention(q, k, v, mask=mask, scale=scale, backend=backend)


@register_notrace_function
def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return (a + b - 1) // b


def check_model(model: object) -> None:
    """Raise UnsupportedModelError for what is no torch module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{shown(model)} was given; expected a model of timm in the first place, such as timm.create_model(...)."
        )
