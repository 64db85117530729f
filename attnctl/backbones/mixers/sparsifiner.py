"""Softmax attention over the keys that a small predictor chooses for each query and head.

"Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers" (arXiv 2303.13755). The
predictor factors the map: a = softmax((P_q q)(P_k k)^T P_n / sqrt(heads)) |P_back|^T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.base import Grid, Mixer, Slot
from attnctl.backbones.modules.attend import attend
from attnctl.errors import ConfigError, require

__all__ = ["SparsifinerMixer"]


class SparsifinerMixer(Mixer, kind="sparsifiner"):
    """Softmax over the keys whose predicted weight is among the largest of their row; prefix tokens see all.

    keep: share of the keys per query; 1 is softmax itself. threshold: keep the keys above a predicted weight instead.
    reduce_tokens, reduce_channels: how many times fewer tokens and channels the predictor has. basis_threshold,
    coef_threshold: entries of the factors that are not above are left out; coef_topk: or all but so many per row.

    The predictor chooses and gets no gradient of the task: it is frozen, and `distil(model, images, loss="weights")`
    teaches it softmax's map. It knows one number of tokens. Real savings need a kernel that skips; this one masks.
    """

    def __init__(
        self, slot: Slot, *, keep: float = 0.25, threshold: float | None = None, reduce_tokens: int = 8,
        reduce_channels: int = 2, basis_threshold: float = 0.0, coef_threshold: float = 0.0,
        coef_topk: int | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(slot, backend=backend)
        n, d = slot.prefix + slot.grid[0] * slot.grid[1], slot.dim // slot.heads
        fewer, narrow = n // reduce_tokens, d // reduce_channels
        require(0 < keep <= 1, ConfigError, f"keep={keep} was given; expected a share above 0, at most 1.")
        require(
            fewer >= 1 and narrow >= 1,
            ConfigError,
            f"reduce_tokens={reduce_tokens}, reduce_channels={reduce_channels} were given; {n} tokens and heads of {d} "
            "channels leave nothing of them.",
        )
        require(
            coef_topk is None or 1 <= coef_topk <= fewer,
            ConfigError,
            f"coef_topk={coef_topk} was given; there are {fewer} coefficients per row.",
        )
        self.tokens, self.budget, self.threshold = n, math.ceil(keep * n), threshold
        self.basis_threshold, self.coef_threshold, self.coef_topk = basis_threshold, coef_threshold, coef_topk
        self.predict_q, self.predict_k = (nn.Linear(d, narrow, device=slot.device, dtype=slot.dtype) for _ in range(2))
        self.reduce, self.expand = (
            nn.Parameter(torch.empty(n, fewer, device=slot.device, dtype=slot.dtype)) for _ in range(2)
        )
        for weight in (self.reduce, self.expand):
            nn.init.xavier_uniform_(weight)
        self.requires_grad_(False)

    def coefficients(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute each query's share of the basis maps: q, k [B, H, N, D] -> [B, H, N - prefix, basis]."""
        logits = self.predict_q(q[:, :, self.prefix :]) @ (self.predict_k(k).transpose(-2, -1) @ self.reduce)
        return (logits.float() * self.heads**-0.5).softmax(-1)

    def approximate(self, q: Tensor, k: Tensor) -> Tensor:
        """Predict the map with what is small left out: q, k [B, H, N, D] -> [B, H, N - prefix, N]."""
        shares, basis = self.coefficients(q, k), self.expand.float().abs().T
        if self.coef_topk is not None:
            best = shares.topk(self.coef_topk, dim=-1)
            shares = torch.zeros_like(shares).scatter(-1, best.indices, best.values)
        shares = shares * (shares > self.coef_threshold)
        return shares @ (basis * (basis > self.basis_threshold))

    def seen(self, q: Tensor, k: Tensor) -> Tensor:
        """Choose the keys of each query: q, k [B, H, N, D] -> bool [B, H, N, N]."""
        predicted = self.approximate(q, k).detach()
        if self.threshold is not None:
            best = predicted == predicted.amax(-1, keepdim=True)  # a row without keys has no softmax
            chosen = (predicted > self.threshold) | best
        else:
            index = predicted.topk(self.budget, dim=-1).indices
            chosen = torch.zeros_like(predicted).scatter(-1, index, 1.0) > 0
        first = chosen.new_ones(*chosen.shape[:2], self.prefix, self.tokens)
        return torch.cat([first, chosen], dim=2)

    def weights_error(self, q: Tensor, k: Tensor, softmax: Tensor) -> Tensor:
        """Compare the predicted map with softmax's [B, H, N, N]: the sum of squares per row."""
        basis = self.expand.float().abs().T
        return (self.coefficients(q, k) @ basis - softmax[:, :, self.prefix :]).square().sum(-1).mean()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens. Raises: ConfigError for another number of tokens than the predictor was built for."""
        if q.shape[2] != self.tokens:
            raise ConfigError(
                f"{q.shape[2]} tokens were given; this predictor is for {self.tokens}. Swap again for the new size."
            )
        every = self.threshold is None and self.budget >= self.tokens
        return attend(q, k, v, None if every else self.seen(q, k), self.scale, 0.0, self.backend)
