"""The map that tokens lie on, where neither the patch embedding nor the call of an attention shows it.

A frame names the module around an attention whose call shows the map, and, where the places of one image are folded
into the batch, which place each token is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.crossvit import CrossVit
from timm.models.metaformer import MetaFormerStage
from timm.models.mobilevit import MobileVitBlock
from timm.models.pit import PoolingVisionTransformer
from timm.models.pit import Transformer as PitStage
from timm.models.vision_transformer_sam import Block as SamBlock
from timm.models.vision_transformer_sam import window_partition
from torch import Tensor, nn

__all__ = ["Frame", "class_tokens", "frame_of", "prefix_of"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class Frame:
    """Where the map of an attention shows.

    Attributes:
        module: The module that shows it.
        shown: Whether in its "input" (positional arguments) or its "output".
        grid: Computes (height, width) in tokens from what is shown.
        places: Numbers the tokens of one image as attention gets them, [parts, tokens], for a map of (height, width):
            row by row from 0, -1 for padding; the parts are neighbours in the batch. None where nothing is folded.
    """

    module: nn.Module
    shown: str
    grid: Callable[[Any], Grid]
    places: Callable[[int, int], Tensor] | None = None


def frame_of(around: list[nn.Module]) -> Frame | None:
    """Return the frame of an attention inside these modules, the innermost first."""
    for module in around:
        for kind, build in _FRAMES.items():
            if isinstance(module, kind):
                return build(module)
    return None


def prefix_of(owner: nn.Module) -> int:
    """Count the class and register tokens of a model, as it says itself or as its kind has them."""
    if isinstance(owner, PoolingVisionTransformer):
        return int(owner.cls_token.shape[1])
    return int(getattr(owner, "num_prefix_tokens", 1 if isinstance(owner, CrossVit) else 0))


def class_tokens(owner: nn.Module) -> int:
    """Return 1 for a model whose first token is a class token, else 0."""
    return int(getattr(owner, "cls_token", None) is not None or isinstance(owner, CrossVit))


def _patches(block: Any) -> Frame:
    """Frame a MobileViT block: tokens at one place of every patch attend to each other, each place an image."""
    ph, pw = block.patch_size

    def grid(output: Tensor) -> Grid:
        h, w = output.shape[-2:]
        return math.ceil(h / ph) * ph, math.ceil(w / pw) * pw

    def places(h: int, w: int) -> Tensor:
        return torch.arange(h * w).reshape(h // ph, ph, w // pw, pw).permute(1, 3, 0, 2).reshape(ph * pw, -1)

    return Frame(block.conv_1x1, "output", grid, places)


def _sam_windows(block: Any) -> Frame | None:
    """Frame a block of SAM that cuts windows; one without them hands attention the map."""
    if not block.window_size:
        return None

    def places(h: int, w: int) -> Tensor:
        numbers = torch.arange(1, h * w + 1).reshape(1, h, w, 1)
        return window_partition(numbers, block.window_size)[0].flatten(1) - 1

    return Frame(block, "input", lambda args: (args[0].shape[1], args[0].shape[2]), places)


def _pooled(stage: Any) -> Frame:
    """Frame a stage of PiT: its map comes as the first of a pair, pooled where the stage pools."""
    if stage.pool is None:
        return Frame(stage, "input", lambda args: (args[0][0].shape[-2], args[0][0].shape[-1]))
    return Frame(stage.pool, "output", lambda output: (output[0].shape[-2], output[0].shape[-1]))


def _metaformer(stage: Any) -> Frame | None:
    """Frame a stage of CAFormer that turns its map into a sequence."""
    if stage.use_nchw:
        return None
    return Frame(stage.downsample, "output", lambda output: (output.shape[-2], output.shape[-1]))


_FRAMES: dict[type[nn.Module], Callable[[Any], Frame | None]] = {
    MetaFormerStage: _metaformer,
    MobileVitBlock: _patches,
    SamBlock: _sam_windows,
    PitStage: _pooled,
}
