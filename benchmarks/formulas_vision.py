"""The attention of vision backbones written out in float64: further rows of fidelity.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from formulas import GRID, N_IMAGE, Both, draw, qkv, row
from torch import Tensor

from attnctl import kernels
from attnctl.backbones import AgentAttention2d, BiLevelRoutingAttention, MultiAxisAttention
from attnctl.backbones.mixers import linear as linear_mixers
from attnctl.backbones.mixers.softmax import sigmoid_attention
from attnctl.kernels.neighborhood.axes import axes_of, neighborhood_mask


@row("bi-level routing", "softmax over the tokens of routed windows")
@torch.no_grad()
def routing() -> Both:
    torch.manual_seed(0)
    module, x = BiLevelRoutingAttention(64, 4, 4, topk=3, scale="head", side_dwconv=0), draw(1, *GRID, 64)
    got, _, index = module.routed(x)
    rows = torch.arange(N_IMAGE)
    window = rows // 16 // 4 * 4 + rows % 16 // 4
    allowed = torch.zeros(16, 16, dtype=torch.bool).scatter_(1, index[0], True)[window][:, window]
    double = module.double()
    q, k, v = double.qkv(x.double()).flatten(1, 2).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT / 4).masked_fill(~allowed, -math.inf)
    return got, double.wo((logits.softmax(-1) @ v).transpose(1, 2).reshape(1, *GRID, 64))


@row("agents in vision transformers", "softmax(s q A^T + B2) softmax(s A k^T + B1) v + dwc(v)")
@torch.no_grad()
def agents_2d() -> Both:
    torch.manual_seed(0)
    module, x = AgentAttention2d(64, 4, GRID, 9), draw(1, *GRID, 64)
    got = module(x)
    m = module.double()
    q, k, v = m.qkv(x.double()).flatten(1, 2).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    pooled = F.adaptive_avg_pool2d(q.mT.reshape(1, 64, *GRID), 3).reshape(1, 4, 16, 9).mT

    def up(bias: Tensor) -> Tensor:
        return F.interpolate(bias, GRID, mode="bilinear", align_corners=False).flatten(2)[None]

    b1 = up(m.an_bias) + (m.ah_bias + m.aw_bias).flatten(3)
    b2 = up(m.na_bias).mT + (m.ha_bias + m.wa_bias).flatten(2, 3)
    gathered = (pooled @ k.mT / 4 + b1).softmax(-1) @ v
    out = ((q @ pooled.mT / 4 + b2).softmax(-1) @ gathered).transpose(1, 2).reshape(1, *GRID, 64)
    side = m.dwc(v.transpose(1, 2).reshape(1, *GRID, 64).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return got, m.proj(out + side)


@row("multi-axis attention", "softmax within blocks, and along a dilated grid")
@torch.no_grad()
def multi_axis() -> Both:
    torch.manual_seed(0)
    module, x = MultiAxisAttention(64, 4, 4, 4), draw(1, *GRID, 64)
    got = module(x)
    m, at = module.double(), torch.cartesian_prod(torch.arange(16), torch.arange(16))
    block = (at[:, None] // 4 == at // 4).all(-1)
    grid = (at[:, None] % 4 == at % 4).all(-1)
    q, k, v = m.qkv(x.double()).flatten(1, 2).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
    allowed = torch.stack([block, block, grid, grid])
    weights = (q @ k.mT / 4).masked_fill(~allowed, -math.inf).softmax(-1)
    return got, m.proj((weights @ v).transpose(1, 2).reshape(1, *GRID, 64))


@row("neighbourhood", "softmax over 7 x 7 tokens")
def neighbourhood() -> Both:
    q, k, v = qkv(N_IMAGE)
    at = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    low = (at - 3).clamp(0, 16 - 7)
    seen = ((at[None] >= low[:, None]) & (at[None] < low[:, None] + 7)).all(-1)
    logits = q.double() @ k.double().mT * 32**-0.5
    got = kernels.attention(q, k, v, mask=neighborhood_mask(axes_of(GRID, 7))[None, None])
    return got, logits.masked_fill(~seen, -math.inf).softmax(-1) @ v.double()


def linear(name: str) -> Callable[[], Both]:
    """Compare a linear form with its weights written out."""

    def both() -> Both:
        (q, k, v), s = qkv(N_IMAGE), 32**-0.5
        n, (x, y) = N_IMAGE, (q.double(), k.double())
        if name == "inline":
            weights = x @ y.mT * s / n + (1 - s * x @ y.mean(2, keepdim=True).mT) / n
        else:
            x, y = F.elu(x) + 1, F.elu(y) + 1
            if name == "mala":
                z = s * x @ y.mean(2, keepdim=True).mT
                weights = (1 + 1 / (z + 1e-6)) * (x @ y.mT) * s / n - z / n
            else:
                alpha = (s * x.mean(2, keepdim=True) @ y.mT).softmax(-1) * n
                weights = x @ (y * alpha.mT).mT
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-6 * n)
        return getattr(linear_mixers, name)(q, k, v, s), weights @ v.double()

    return both


row("InLine", "s q k^T / n + (1 - s q mean(k)^T) / n")(linear("inline"))
row("MALA", "(1 + 1 / z) s q k^T / n - z / n")(linear("mala"))
row("RALA", "q k_r^T, rows made to sum to one")(linear("rala"))


@row("sigmoid", "sigmoid(s q k^T - log n) v")
def sigmoid() -> Both:
    q, k, v = qkv(N_IMAGE)
    bias = torch.full((4,), -math.log(N_IMAGE))
    want = (q.double() @ k.double().mT * 32**-0.5 - math.log(N_IMAGE)).sigmoid() @ v.double()
    return sigmoid_attention(q, k, v, 32**-0.5, bias), want
