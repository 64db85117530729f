"""Heads that ask a frozen backbone: a linear one, an attention pool, and efficient probing.

"Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency" (arXiv 2506.10178, equations 4 to 6):
learned queries attend to the tokens as they are, and each pools a part of the values' channels.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from attnctl.errors import ConfigError, UnsupportedModelError

__all__ = ["EfficientProbing", "Probed", "probe"]


class EfficientProbing(nn.Module):
    """Pool tokens [B, N, C] with learned queries: [B, C / d_out].

    queries: how many; each pools C / (d_out queries) channels of the values. d_out: what the channels are divided by.
    Raises: ConfigError for channels that these do not divide.
    """

    def __init__(self, dim: int, queries: int = 32, d_out: int = 1) -> None:
        super().__init__()
        if queries < 1 or d_out < 1 or dim % (queries * d_out):
            raise ConfigError(f"queries={queries} and d_out={d_out} were given; together they must divide dim={dim}.")
        self.queries, self.out_dim = queries, dim // d_out
        self.cls_token = nn.Parameter(torch.randn(1, queries, dim) * 0.02)
        self.v = nn.Linear(dim, dim // d_out, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """Compute what each query attends to: [B, N, C] -> [B, queries, N]."""
        return (self.cls_token @ x.mT * x.shape[-1] ** -0.5).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        values = self.v(x).unflatten(-1, (self.queries, -1)).transpose(1, 2)  # [B, M, N, C / M]
        return (self.weights(x).unsqueeze(2) @ values).flatten(1)


class Probed(nn.Module):
    """A frozen backbone with a head that is trained: images [B, C, H, W] -> logits [B, classes].

    Attributes:
        backbone: Frozen, and in evaluation mode for good.
        pool: What pools its tokens. norm, head: A batch norm without parameters, and the classifier.
    """

    def __init__(self, backbone: nn.Module, pool: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.pool = backbone, pool
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        for p in backbone.parameters():
            p.requires_grad_(False)
        backbone.eval()

    def train(self, mode: bool = True) -> Probed:
        """Set the head's mode; the backbone stays in evaluation."""
        super().train(mode)
        self.backbone.eval()
        return self

    def tokens(self, images: Tensor) -> Tensor:
        """Compute the backbone's tokens [B, N, C]."""
        with torch.no_grad():
            x = self.backbone.forward_features(images)  # type: ignore[operator]
        if x.ndim == 4:
            x = x.flatten(1, 2) if x.shape[-1] == self._channels else x.flatten(2).mT
        return x

    @property
    def _channels(self) -> int:
        return int(self.backbone.num_features)  # type: ignore[arg-type]

    def attention(self, images: Tensor) -> Tensor:
        """Compute what the queries of efficient probing attend to, [B, queries, N].

        Raises: UnsupportedModelError for another head.
        """
        if not isinstance(self.pool, EfficientProbing):
            raise UnsupportedModelError("Only head='ep' has queries to look at.")
        return self.pool.weights(self.tokens(images))

    def forward(self, images: Tensor) -> Tensor:
        """Classify."""
        return self.head(self.norm(self.pool(self.tokens(images))))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def probe(
    model: nn.Module, classes: int, head: str = "ep", *, queries: int = 32, d_out: int = 1, heads: int = 12
) -> Probed:
    """Freeze a timm model and put a head on its tokens that is to be trained.

    head: "ep" for efficient probing, "mha" for an attention pool of `heads` heads, "linear" for the mean token.
    queries, d_out: of efficient probing.

    Raises: ConfigError for another head or numbers that do not divide; UnsupportedModelError for a model that gives no
    tokens.
    """
    dim: Any = getattr(model, "num_features", None)
    if not isinstance(dim, int) or not hasattr(model, "forward_features"):
        raise UnsupportedModelError(f"{type(model).__name__} has no forward_features and num_features, as timm's have.")
    if head == "ep":
        pool: nn.Module = EfficientProbing(dim, queries, d_out)
        dim = dim // d_out
    elif head == "mha":
        if dim % heads:
            raise ConfigError(f"heads={heads} was given; it must divide {dim} channels.")
        attention: Any = AttentionPoolLatent(dim, num_heads=heads)
        attention.mlp = None
        pool = attention
    elif head == "linear":
        pool = _Mean()
    else:
        raise ConfigError(f"head={head!r} was given; expected 'ep', 'mha' or 'linear'.")
    return Probed(model, pool, dim, classes)
