"""Linear attention whose features are learned to give softmax's weights.

"The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" (arXiv 2402.04347, equations 4 to 6).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.errors import ConfigError, require

__all__ = ["HedgehogMixer", "hedgehog_features", "hedgehog_weights"]


def hedgehog_features(x: Tensor, weight: Tensor, form: str = "softmax") -> Tensor:
    """Compute [f(W x), f(-W x)] over features, f softmax or a shifted exponential.

    Shapes: x [B, H, N, D], weight [H, D, F] -> [B, H, N, 2 F], above 0, float32. form: "softmax", or "exp" less the
    largest of each token.
    """
    z = torch.einsum("bhnd,hdf->bhnf", x.float(), weight.float())
    if form == "softmax":
        out = torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)
    else:
        out = torch.cat([(z - z.amax(-1, keepdim=True)).exp(), (z.amin(-1, keepdim=True) - z).exp()], -1)
    return out.clamp(min=1e-12)


def hedgehog_weights(phi_q: Tensor, phi_k: Tensor) -> Tensor:
    """Compute the weights that features stand for, [B, H, N, Nk]: rows of phi_q phi_k^T divided by their sum."""
    weights = phi_q @ phi_k.mT
    return weights / (weights.sum(-1, keepdim=True) + 1e-12)


class HedgehogMixer(Mixer, kind="hedgehog"):
    """Hedgehog's linear attention; its features start at the identity, far from softmax: call `distil` after the swap.

    form: "softmax" or "exp".
    """

    def __init__(self, slot: Slot, *, form: str = "softmax", backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        require(form in ("softmax", "exp"), ConfigError, f"form={form!r} was given; expected 'softmax' or 'exp'.")
        self.form = form
        d = slot.dim // slot.heads
        start = torch.eye(d, device=slot.device, dtype=slot.dtype).expand(slot.heads, d, d)
        self.q_features, self.k_features = nn.Parameter(start.clone()), nn.Parameter(start.clone())

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of queries and keys, each with the root of the host's scale, [B, H, N, 2 D]."""
        factor = self.scale**0.5 * q.shape[-1] ** 0.25  # 1 for a scale of D ** -0.5
        return (
            hedgehog_features(q * factor, self.q_features, self.form),
            hedgehog_features(k * factor, self.k_features, self.form),
        )

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute the attention weights [B, H, N, Nk], which `distil` compares with softmax's."""
        return hedgehog_weights(*self.features(q, k))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens; no N x N weights exist."""
        phi_q, phi_k = self.features(q, k)
        summed = phi_q @ (phi_k.mT @ v.float())
        return (summed / (phi_q @ phi_k.sum(2)[..., None] + 1e-12)).to(v.dtype)
