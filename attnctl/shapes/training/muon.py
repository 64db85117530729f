"""Muon: momentum whose matrices are made orthogonal, for all weights of two and more dimensions; Adam for the rest.

K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the update scaled to Adam's
typical size (0.2 sqrt(max(rows, columns)); Liu et al., arXiv 2502.16982), so that one learning rate serves both kinds.
On two cores every step is dear, and this takes far fewer of them than Adam does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalise"]


_ITERATIONS = 5
_MOMENTUM = 0.95  # of Muon
_BETAS = (0.9, 0.99)  # of Adam


def orthogonalise(m: Tensor) -> Tensor:
    """Bring the singular values of matrices [n, rows, columns] near one by a Newton-Schulz iteration."""
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(_ITERATIONS):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    x = x.float()
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Update matrices (and convolutions as [out, in * k * k]) by Muon, and vectors and `plain` parameters by Adam."""

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        plain: Iterable[Tensor] = (),
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        params = list(params)
        apart = {id(p) for p in plain} | {id(p) for p in params if p.ndim < 2}
        defaults = {"lr": lr, "momentum": _MOMENTUM, "betas": _BETAS, "weight_decay": weight_decay, "matrix": True}
        groups = [
            {"params": [p for p in params if id(p) not in apart], "matrix": True},
            {"params": [p for p in params if id(p) in apart], "matrix": False},
        ]
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step on the gradients that are there."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._matrices if group["matrix"] else self._vectors)(params, group)

    def _matrices(self, params: list[Tensor], group: dict) -> None:
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            buffer, mu = state["momentum"], group["momentum"]
            buffer.lerp_(p.grad, 1 - mu)
            update = p.grad.lerp(buffer, mu).flatten(1)
            alike[(update.shape[0], update.shape[1])].append((p, update))
        for shape, pairs in alike.items():
            size = group["lr"] * 0.2 * max(shape) ** 0.5
            for (p, _), u in zip(pairs, orthogonalise(torch.stack([u for _, u in pairs])), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(u.view_as(p), alpha=size)

    def _vectors(self, params: list[Tensor], group: dict) -> None:
        b1, b2 = group["betas"]
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": torch.zeros(())}
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1 - b1)
            state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
            n = float(state["step"])
            scale = (state["exp_avg_sq"] / (1 - b2**n)).sqrt_().add_(1e-8)
            p.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - b1**n))
