"""Dual cross-attention learning: a timm ViT that looks again from the places that its class token has looked at.

"Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification" (arXiv 2205.02151),
written from its equations as they are remembered, without released code to compare with. A training step has three
branches:

1. self-attention    the ViT as it is
2. global to local   the rollout of all layers tells how much each place reaches the class token; the queries of the
                     highest share of places, and of the class token, attend to all keys in a block of their own
3. pairs             the ViT once more, with shared weights: each image's queries attend to its own keys and to those
                     of another image of the batch, which makes it harder to rely on what only one image shows

Pairs are for training alone. An answer is the mean of the first two branches' logits.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from attnctl.errors import ConfigError, UnsupportedModelError, require

__all__ = ["DualCrossAttention"]


class DualCrossAttention(nn.Module):
    """Classify with a ViT and with a second look from where it looked: images [B, C, H, W] -> logits [B, classes].

    model: A timm VisionTransformer with a class token, whose blocks are timm's own. ratio: Share of the places
    whose queries look again, above 0 to 1; the paper's are 0.1 for fine-grained classes and 0.3 for re-identification.

    Raises: ConfigError for another ratio; UnsupportedModelError for another model.
    """

    model: Any
    block: Any

    def __init__(self, model: Any, ratio: float = 0.1) -> None:
        super().__init__()
        require(0 < ratio <= 1, ConfigError, f"ratio={ratio} was given; expected above 0 to 1.")
        named = type(model).__name__
        if type(model) is not VisionTransformer or model.cls_token is None or model.global_pool != "token":
            raise UnsupportedModelError(
                f"{named}: expected a timm VisionTransformer that classifies by its class token."
            )
        plain = all(type(b) is Block and type(b.attn) is Attention and b.attn.gate is None for b in model.blocks)
        require(plain, UnsupportedModelError, f"{named}: its blocks are not timm's own with softmax attention.")
        self.model, self.ratio = model, ratio
        self.block, self.norm = copy.deepcopy(model.blocks[-1]), copy.deepcopy(model.norm)
        self.head = copy.deepcopy(model.head)
        self.balance = nn.Parameter(torch.zeros(3))  # log variances of the three losses

    def rows(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of the last block [B, N, C], and how much each reaches the class token [B, N]; sum 1."""
        x, seen = self._tokens(images), []
        for block in self.model.blocks:
            seen.append(block.norm1(x))
            x = block(x)
        with torch.inference_mode(False), torch.enable_grad():
            row = torch.zeros(x.shape[:2], device=x.device)
            row[:, 0] = 1
            for block, tokens in zip(reversed(self.model.blocks), reversed(seen), strict=True):
                q, k, _ = _heads(block.attn, tokens.detach().clone())
                row = 0.5 * row + 0.5 * _passed_on(q.detach(), k.detach(), row)
        return x, row.detach()

    def forward(self, images: Tensor) -> Tensor:
        """Classify by the first two branches."""
        own, again = self._answers(images)
        return (own + again) / 2

    def loss(self, images: Tensor, targets: Tensor, partners: Tensor | None = None) -> Tensor:
        """Sum the cross-entropies of the three branches, each by its learned uncertainty.

        partners: For each image the place of its partner in the batch [B]; a rotation by one if None.
        """
        own, again = self._answers(images)
        partners = torch.arange(len(images), device=images.device).roll(1) if partners is None else partners
        answers = (own, again, self._pairs(images, partners))
        errors = torch.stack([F.cross_entropy(answer, targets) for answer in answers])
        return 0.5 * (errors * (-self.balance).exp() + self.balance).sum()

    def _tokens(self, images: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def _answers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        x, row = self.rows(images)
        prefix = model.num_prefix_tokens
        count = math.ceil(self.ratio * (x.shape[1] - prefix))
        places = row[:, prefix:].topk(count).indices + prefix
        places = torch.cat([places.new_zeros(len(x), 1), places], 1)[..., None].expand(-1, -1, x.shape[-1])
        tokens = self.block.norm1(x)
        chosen = x.gather(1, places)
        again = _through(self.block, chosen, _attend(self.block.attn, tokens.gather(1, places), tokens))
        return model.forward_head(model.norm(x)), self.head(model.head_drop(model.fc_norm(self.norm(again)[:, 0])))

    def _pairs(self, images: Tensor, partners: Tensor) -> Tensor:
        model = self.model
        x = self._tokens(images)
        for block in model.blocks:
            tokens = block.norm1(x)
            x = _through(block, x, _attend(block.attn, tokens, torch.cat([tokens, tokens[partners]], 1)))
        return model.forward_head(model.norm(x))


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens [B, N, C] to q, k and v, [B, H, N, D] each."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.q_norm(q), attn.k_norm(k), v


def _attend(attn: Any, asking: Tensor, seen: Tensor) -> Tensor:
    """Attend from some tokens to others by the weights of one attention."""
    q, (_, k, v) = _heads(attn, asking)[0], _heads(attn, seen)
    dropped = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped).transpose(1, 2).flatten(2)
    return attn.proj_drop(attn.proj(attn.norm(out)))


def _through(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Finish a block behind its attention."""
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _passed_on(q: Tensor, k: Tensor, row: Tensor) -> Tensor:
    """Multiply a row [B, N] by the mean map of the heads, without the map: it is a gradient of the values'."""
    values = torch.zeros_like(q).requires_grad_()
    weights = torch.zeros_like(q)
    weights[..., 0] = row[:, None].to(q.dtype)
    (passed,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, values), values, weights)
    return passed[..., 0].mean(1).to(row.dtype)
