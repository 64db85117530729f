"""Mixtures of heads: each token weighs the shared heads and its best routed heads; the others are not computed for it.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842, equations 4 to 8).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.backbones.modules.attend import attend
from attnctl.backbones.modules.head_gates import HeadGates
from attnctl.backbones.modules.head_gates import load_balance as balance
from attnctl.errors import ConfigError, require

__all__ = ["MoHMixer", "balance", "routed_attention"]


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, used: Tensor, scale: float, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Compute softmax attention for the queries that use a head, and zero for the others.

    Shapes: q, k, v [B, H, N, D], used bool [B, N, H], mask additive [1 or B, H, N, N] -> [B, H, N, D]. Each head
    gathers its queries; images of a batch that have fewer are filled up. Keys and values stay whole.
    """
    counts = used.sum(1).amax(0).tolist()  # how many queries of an image use each head, at most
    order = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    heads = []
    for h, count in enumerate(counts):
        out = torch.zeros_like(v[:, h])
        if count == q.shape[2]:
            part = None if mask is None else mask[:, h : h + 1]
            out = attend(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], part, scale, 0.0, backend)[:, 0]
        elif count:
            rows = order[:, :count, h]
            index = rows[..., None].expand(-1, -1, q.shape[-1])
            queries = q[:, h].gather(1, index)[:, None]
            part = None if mask is None else _rows_of(mask[:, h], rows)[:, None]
            mixed = attend(queries, k[:, h : h + 1], v[:, h : h + 1], part, scale, 0.0, backend)[:, 0]
            out = out.scatter(1, rows[..., None].expand(-1, -1, v.shape[-1]), mixed)
        heads.append(out)
    return torch.stack(heads, 1) * used.transpose(1, 2)[..., None]


def _rows_of(mask: Tensor, rows: Tensor) -> Tensor:
    """Take rows of a mask [1 or B, N, N]: [B, rows, N]."""
    mask = mask.expand(len(rows), -1, -1)
    return mask.gather(1, rows[..., None].expand(-1, -1, mask.shape[-1]))


class MoHMixer(Mixer, kind="moh"):
    """A mixture of heads: each token weighs the shared heads and its best routed heads; equal to softmax at first.

    shared: heads that every token uses. topk: routed heads that a token uses, all of the others if None; 0 with every
    head shared weighs the heads without routing. skip: leave out what no token uses (False computes every head and
    weighs it, as the release does). noise: standard deviation of noise on the routers' logits in training, which breaks
    the ties of routers that start at zero.
    The routers start at zero: then every head in use has weight 1, and ties fall to the first heads.
    `balance(model)` is the load-balance loss of the last training step. Compiled and exported graphs compute all heads.
    """

    takes_mask = True

    def __init__(
        self,
        slot: Slot,
        *,
        shared: int = 1,
        topk: int | None = None,
        skip: bool = True,
        noise: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(slot, backend=backend)
        heads = slot.heads
        every = topk == 0
        require(
            shared == heads if every else 0 <= shared < heads,
            ConfigError,
            f"shared={shared} was given; the host has {heads} heads, "
            + ("and topk=0 shares them all." if every else "one must be routed."),
        )
        self.shared, self.routed, self.skip = shared, heads - shared, skip
        self.topk = self.routed if topk is None else topk
        require(
            every or 1 <= self.topk <= self.routed,
            ConfigError,
            f"topk={topk} was given; {heads} heads less {shared} shared leave {self.routed} to route.",
        )
        self.gates = HeadGates(
            slot.width or slot.dim, heads, shared, self.topk, noise, device=slot.device, dtype=slot.dtype
        )
        for weight in self.gates.parameters():
            nn.init.zeros_(weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """Mix tokens, then weigh the heads of each."""
        weights = self.gates(x)
        graph = torch.compiler.is_compiling() or torch.jit.is_tracing() or q.is_meta
        if not self.skip or self.topk == self.routed or graph:
            out = attend(q, k, v, mask, self.scale, 0.0, self.backend)
        else:
            s = self.shared
            used = weights[..., s:] > 0
            parts = (None, None) if mask is None else (mask[:, :s], mask[:, s:])
            routed = routed_attention(q[:, s:], k[:, s:], v[:, s:], used, self.scale, parts[1], self.backend)
            first = (
                attend(q[:, :s], k[:, :s], v[:, :s], parts[0], self.scale, 0.0, self.backend) if s else routed[:, :0]
            )
            out = torch.cat([first, routed], 1)
        return out * weights.transpose(1, 2).unsqueeze(-1).to(out.dtype)
