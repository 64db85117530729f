"""How much each token takes of each head in a mixture of heads.

"MoH: Multi-Head Attention as Mixture-of-Head Attention" (arXiv 2410.11842, equations 4 to 8).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import Final

__all__ = ["HeadGates", "load_balance"]


class HeadGates(nn.Module):
    """Weights of heads per token: [B, N, C] -> [B, N, H] in float32, shared heads first.

    shared: heads that every token takes. topk: routed heads that a token takes; 0 where every head is shared. noise:
    standard deviation of noise on the router's logits in training. `balance` holds the load-balance loss of the last
    training step.
    """

    balance: Tensor | None
    shared: Final[int]
    routed: Final[int]

    def __init__(self, width: int, heads: int, shared: int, topk: int, noise: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.shared, self.topk, self.noise = shared, topk, noise
        self.routed = heads - shared
        several = shared > 1 or not self.routed  # the weight of a single shared head is 1
        self.route = nn.Linear(width, self.routed, bias=False, **dd) if self.routed else nn.Identity()
        self.share = nn.Linear(width, shared, bias=False, **dd) if several else nn.Identity()
        self.split = nn.Linear(width, 2, bias=False, **dd) if shared and self.routed else nn.Identity()
        self.balance = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the weights."""
        self.balance = None  # a kept graph would stop copies of the model
        if self.routed == 0:
            return self.share(x).float().softmax(dim=-1) * self.shared
        logits = self.route(x).float()
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        gates = logits.softmax(dim=-1)
        mask = torch.zeros_like(gates).scatter(-1, torch.topk(gates, self.topk, dim=-1)[1], 1.0)
        if self.training:
            self.balance = (gates.mean(dim=[0, 1]) * mask.mean(dim=[0, 1])).mean() * self.routed**2
        chosen = gates * mask
        out = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1.1920929e-07) * self.topk  # float32's eps
        if self.shared > 0:
            split = 2 * self.split(x).float().softmax(dim=-1)
            first = torch.ones_like(split[..., :1])
            if self.shared > 1:
                first = self.share(x).float().softmax(dim=-1) * self.shared
            out = torch.cat([first * split[..., :1], out * split[..., 1:]], dim=-1)
        return out


def load_balance(model: nn.Module) -> Tensor:
    """Average the load-balance losses of a model's mixtures of heads in the last training step, 0 where it has none.

    Add 0.01 times this to the loss (arXiv 2410.11842, section 3.3).
    """
    losses = [m.balance for m in model.modules() if isinstance(m, HeadGates) and m.balance is not None]
    return torch.stack(losses).mean() if losses else torch.zeros(())
