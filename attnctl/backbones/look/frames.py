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
from timm.models.davit import SpatialBlock
from timm.models.efficientvit_msra import LocalWindowAttention
from timm.models.gcvit import GlobalContextVitBlock
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import MultiScaleBlock
from timm.models.metaformer import MetaFormerStage
from timm.models.mobilevit import MobileVitBlock
from timm.models.nest import NestLevel
from timm.models.nextvit import NextTransformerBlock
from timm.models.pit import PoolingVisionTransformer
from timm.models.pit import Transformer as PitStage
from timm.models.tiny_vit import TinyVitBlock
from timm.models.tnt import Block as TNTBlock
from timm.models.vision_transformer_sam import Block as SamBlock
from timm.models.volo import VOLO, ClassAttention
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
        queries: Returns the grid of the queries and their numbers in it, [parts, queries], where they were pooled.
    """

    module: nn.Module
    shown: str
    grid: Callable[[Any], Grid]
    places: Callable[[int, int], Tensor] | None = None
    queries: Callable[[int, int], tuple[Grid, Tensor]] | None = None


def frame_of(attention: nn.Module, around: list[nn.Module]) -> Frame | None:
    """Return the frame of an attention inside these modules, the innermost first."""
    for module in around:
        for kind, build in _FRAMES.items():
            if isinstance(module, kind):
                return build(module, attention)
    return None


def prefix_of(owner: nn.Module) -> int:
    """Count the class and register tokens of a model, as it says itself or as its kind has them."""
    if isinstance(owner, PoolingVisionTransformer):
        return int(owner.cls_token.shape[1])
    return int(getattr(owner, "num_prefix_tokens", 1 if isinstance(owner, CrossVit) else 0))


def class_tokens(owner: nn.Module) -> int:
    """Return 1 for a model whose first token is a class token, else 0."""
    return int(any(name.startswith("cls_token") for name, _ in owner.named_parameters(recurse=False)))


def windows(h: int, w: int, size: Grid) -> Tensor:
    """Number the places of a map in windows, padded at the bottom and right: [windows, tokens], -1 for padding."""
    numbers = nn.functional.pad(torch.arange(1, h * w + 1).reshape(h, w), [0, -w % size[1], 0, -h % size[0]]) - 1
    rows, columns = numbers.shape[0] // size[0], numbers.shape[1] // size[1]
    return numbers.reshape(rows, size[0], columns, size[1]).transpose(1, 2).reshape(rows * columns, -1)


def _patches(block: Any, _: nn.Module) -> Frame:
    """Frame a MobileViT block: tokens at one place of every patch attend to each other, each place an image."""
    ph, pw = block.patch_size

    def grid(output: Tensor) -> Grid:
        h, w = output.shape[-2:]
        return math.ceil(h / ph) * ph, math.ceil(w / pw) * pw

    def places(h: int, w: int) -> Tensor:
        return torch.arange(h * w).reshape(h // ph, ph, w // pw, pw).permute(1, 3, 0, 2).reshape(ph * pw, -1)

    return Frame(block.conv_1x1, "output", grid, places)


def _windowed(size: Callable[[Any], Any], channels_first: bool = False) -> Callable[[Any, nn.Module], Frame | None]:
    """Return how a block is framed that cuts windows, whose (height, width) or side `size` tells; 0 for none."""

    def grid(args: Any) -> Grid:
        x = args[0]
        return (x.shape[2], x.shape[3]) if channels_first else (x.shape[1], x.shape[2])

    def build(block: Any, _: nn.Module) -> Frame | None:
        sides = size(block)
        if not sides:
            return None
        both = (sides, sides) if isinstance(sides, int) else (int(sides[0]), int(sides[1]))
        return Frame(block, "input", grid, lambda h, w: windows(h, w, both))

    return build


def _pooled_windows(block: Any, attention: Any) -> Frame | None:
    """Frame a block of SAM 2, whose queries may be pooled inside windows."""
    frame = _windowed(lambda b: b.window_size if b.is_windowed else 0)(block, attention)
    if frame is None or attention.q_pool is None:
        return frame
    sy, sx = block.q_stride
    size = (block.window_size[0] // sy, block.window_size[1] // sx)

    def queries(h: int, w: int) -> tuple[Grid, Tensor]:
        return (h // sy, w // sx), windows(h // sy, w // sx, size)

    return Frame(frame.module, frame.shown, frame.grid, frame.places, queries)


def _mask_units(model: Any, attention: Any) -> Frame:
    """Frame an attention of Hiera, whose tokens come unrolled so that those pooled together lie apart."""
    index = next(i for i, block in enumerate(model.blocks) if block.attn is attention)
    before = max(0, index - 1)  # blocks hand on what their own queries lie on
    units = attention.use_mask_unit_attn
    count = math.prod(model.reroll.schedule[before][1]) // (attention.q_stride * attention.window_size) if units else 1

    def places(at: int) -> Tensor:
        n = math.prod(model.reroll.schedule[at][1])
        order = model.reroll(torch.arange(n).reshape(1, n, 1), at).flatten().argsort()
        return order.reshape(-1, count).T.reshape(1, -1)

    def grid(at: int) -> Grid:
        h, w = model.reroll.schedule[at][1]
        return int(h), int(w)

    return Frame(
        model.patch_embed, "output", lambda _: grid(before), lambda h, w: places(before),
        lambda h, w: (grid(index), places(index)),
    )  # fmt: skip


def _pixels(block: Any, attention: nn.Module) -> Frame | None:
    """Frame the inner attention of TNT: the pixels of every patch are an image."""
    if attention is not block.attn_in:
        return None

    def grid(args: Any) -> Grid:
        side, small = math.isqrt(args[1].shape[1] - 1), math.isqrt(args[0].shape[1])
        return side * small, side * small

    def places(h: int, w: int) -> Tensor:
        small = math.isqrt(block.proj.in_features // block.norm_in.normalized_shape[0])
        return windows(h, w, (small, small))

    return Frame(block, "input", grid, places)


def _blocks(level: Any, _: nn.Module) -> Frame:
    """Frame a level of NesT: its map is cut into blocks, which lie beside the batch."""

    def places(h: int, w: int) -> Tensor:
        return windows(h, w, (level.block_size, level.block_size)).reshape(1, -1)

    return Frame(level.pool, "output", lambda output: (output.shape[-2], output.shape[-1]), places)


def _last_map(model: Any, attention: nn.Module) -> Frame | None:
    """Frame the class attention of VOLO, which comes behind all maps."""
    if not isinstance(attention, ClassAttention):
        return None
    return Frame(model.network[-1], "output", lambda output: (output.shape[1], output.shape[2]))


def _embedded(block: Any, _: nn.Module) -> Frame:
    """Frame a block of NextViT, which embeds its map before attention."""
    return Frame(block.patch_embed, "output", lambda output: (output.shape[-2], output.shape[-1]))


def _pooled(stage: Any, _: nn.Module) -> Frame:
    """Frame a stage of PiT: its map comes as the first of a pair, pooled where the stage pools."""
    if stage.pool is None:
        return Frame(stage, "input", lambda args: (args[0][0].shape[-2], args[0][0].shape[-1]))
    return Frame(stage.pool, "output", lambda output: (output[0].shape[-2], output[0].shape[-1]))


def _metaformer(stage: Any, _: nn.Module) -> Frame | None:
    """Frame a stage of CAFormer that turns its map into a sequence."""
    if stage.use_nchw:
        return None
    return Frame(stage.downsample, "output", lambda output: (output.shape[-2], output.shape[-1]))


_FRAMES: dict[type[nn.Module], Callable[[Any, nn.Module], Frame | None]] = {
    MetaFormerStage: _metaformer,
    MobileVitBlock: _patches,
    SamBlock: _windowed(lambda block: block.window_size),
    PitStage: _pooled,
    SpatialBlock: _windowed(lambda block: block.window_size, channels_first=True),
    GlobalContextVitBlock: _windowed(lambda block: block.window_size),
    TinyVitBlock: _windowed(lambda block: block.window_size),
    LocalWindowAttention: _windowed(lambda block: block.attn.resolution, channels_first=True),
    MultiScaleBlock: _pooled_windows,
    Hiera: _mask_units,
    NestLevel: _blocks,
    NextTransformerBlock: _embedded,
    TNTBlock: _pixels,
    VOLO: _last_map,
}
