"""Agent-DeiT: DeiT with agent attention in its first blocks ("Agent Attention", arXiv 2312.08874, table 8).

timm's VisionTransformer with another attention module: weights of a DeiT load into it, and what misses is new
(biases and the depthwise branch).
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import Tensor, nn

from attnctl.backbones.grid import watch_grid
from attnctl.backbones.models.config import load_filter, register, size_cfgs
from attnctl.backbones.modules.agent import AgentAttention2d
from attnctl.backbones.modules.blocks import take_state
from attnctl.errors import ConfigError

__all__ = ["AgentVisionTransformer"]

# Agent counts are given four at a time; blocks take them in pairs, and the middle three pairs share the third.
_PAIRS = (0, 1, 2, 2, 2, 3)


class AgentVisionTransformer(VisionTransformer):
    """A vision transformer whose first blocks attend through agents (arXiv 2312.08874).

    Args:
        num_agents: four square numbers, for blocks 0-1, 2-3, 4-9 and 10-11.
        agent_layer: number of blocks with agent attention, from the first; all of them if None.
        backend: a kernel of `attnctl.attention`. Everything else: as timm's VisionTransformer.

    Raises: ConfigError for lists of another length and more agent layers than blocks.
    """

    def __init__(
        self,
        num_agents: tuple[int, ...] = (49, 49, 49, 49),
        agent_layer: int | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        depth = len(self.blocks)
        layers = depth if agent_layer is None else agent_layer
        if len(num_agents) != 4:
            raise ConfigError(f"num_agents={num_agents} was given; expected four counts.")
        if not 0 <= layers <= depth:
            raise ConfigError(f"agent_layer={agent_layer} was given; expected 0 to {depth}, the number of blocks.")
        recorder = watch_grid(self)[0] if kwargs.get("dynamic_img_size") else None
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        for i in range(layers):
            old = self.blocks[i].attn
            attn = AgentAttention2d(
                self.embed_dim, old.num_heads, self.patch_embed.grid_size, num_agents[_PAIRS[min(i // 2, 5)]],
                qkv_bias=old.qkv.bias is not None, prefix=self.num_prefix_tokens, attn_drop=old.attn_drop.p,
                proj_drop=old.proj_drop.p, backend=backend, **dd,
            )  # fmt: skip
            attn.qkv, attn.proj = old.qkv, old.proj  # timm has drawn their weights
            attn.grid_source = recorder
            self.blocks[i].attn = attn

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that should not decay: positions, tokens and attention biases."""
        return set(super().no_weight_decay()) | {n for n, _ in self.named_parameters() if n.endswith("_bias")}

    @torch.jit.ignore
    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Resize position embeddings and axis biases to another image size."""
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for block in self.blocks:
            if isinstance(block.attn, AgentAttention2d):
                block.attn.set_feature_size(tuple(self.patch_embed.grid_size))


def checkpoint_filter_fn(state: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Take the authors' checkpoints, or this model's own, and fit them to the model's image size."""
    return load_filter(vit_filter(take_state(state), model), model, resize=True)


LAYOUTS: dict[str, dict[str, Any]] = {  # parameters in M, multiply-adds of one 224 px image in G
    "agent_deit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},  # 6.0, 1.2
    "agent_deit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},  # 22.6, 4.4
    "agent_deit_base": {  # agents in the first four blocks: 87.2, 17.6
        "embed_dim": 768, "depth": 12, "num_heads": 12, "num_agents": (81, 81, 81, 81), "agent_layer": 4,
    },
    "agent_deit_micro": {
        "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_agents": (9, 9, 9, 9),
    },
}  # fmt: skip
default_cfgs = size_cfgs(
    LAYOUTS, first_conv="patch_embed.proj", classifier="head", fixed_input_size=True, pool_size=None
)
register(__name__, AgentVisionTransformer, LAYOUTS, checkpoint_filter_fn, out_indices=3, feature_cls="getter")
