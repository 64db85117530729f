"""The grid of a token sequence, read where the model still knows it: at the patch embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["FrameRecorder", "GridRecorder", "GridSource", "ImageRecorder", "grid_of_shape", "watch_grid"]

Grid = tuple[int, int]


class GridRecorder:
    """Keep the (height, width) in tokens of the images that the patch embedding saw last.

    A copy of the model copies the recorder along, so copies do not share it.
    """

    def __init__(self) -> None:
        self.grid: Grid | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record the grid of an output [B, h, w, C] (timm with dynamic_img_size) or of a pair of tokens and their grid.

        Other token sequences leave no grid.
        """
        self.grid = None
        if isinstance(output, tuple) and isinstance(output[1], (tuple, list)):
            self.grid = (int(output[1][0]), int(output[1][1]))
        elif torch.is_tensor(output) and output.ndim == 4:
            self.grid = (output.shape[1], output.shape[2])


class ImageRecorder:
    """Keep the (height, width) in pixels of the images that a model was given last; a hook before its forward."""

    def __init__(self) -> None:
        self.size: Grid | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Record the size of images [B, C, H, W]; leave anything else alone."""
        images = torch.is_tensor(args[0]) and args[0].ndim == 4 if args else False
        self.size = (args[0].shape[2], args[0].shape[3]) if images else None

    def grid(self, tokens: int) -> Grid | None:
        """Return the grid of that many tokens on the images, None where square patches do not give it."""
        return None if self.size is None else grid_of_shape(self.size, tokens)


class FrameRecorder:
    """Keep the grid that a module around an attention shows: `grid` computes it from what a hook is given."""

    def __init__(self, grid: Callable[[Any], Grid]) -> None:
        self.compute = grid
        self.grid: Grid | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        """Record the grid shown by an output, or by the arguments of a hook before the forward."""
        self.grid = self.compute(args if output is None else output)


def grid_of_shape(size: Grid, tokens: int) -> Grid | None:
    """Return the grid of square patches that cuts an image of (height, width) into that many tokens, or None."""
    patch = (size[0] * size[1] / max(tokens, 1)) ** 0.5
    grid = round(size[0] / patch), round(size[1] / patch)
    return grid if grid[0] * grid[1] == tokens else None


class GridSource:
    """Return a grid: what a recorder saw last, else that of the patch embedding as it is now, else a fixed one.

    Where nothing else tells, the shape of the images does.

    embed: the patch embedding, None for one that has no grid and where the user gave another. images: a recorder of
    image sizes.
    """

    def __init__(
        self,
        fixed: Grid,
        embed: nn.Module | None = None,
        recorder: GridRecorder | FrameRecorder | None = None,
        images: ImageRecorder | None = None,
    ) -> None:
        self.fixed, self.embed, self.recorder, self.images = fixed, embed, recorder, images

    def __call__(self, tokens: int | None = None) -> Grid:
        """Return (height, width) in tokens. tokens: how many there are, where a sequence is at hand."""
        if self.recorder is not None and self.recorder.grid is not None:
            return self.recorder.grid
        if self.images is not None and tokens is not None and (grid := self.images.grid(tokens)) is not None:
            return grid
        size: Any = None if self.embed is None else self.embed.grid_size  # set_input_size changes it
        return self.fixed if size is None else (int(size[0]), int(size[1]))


def watch_grid(model: nn.Module) -> tuple[GridRecorder, RemovableHandle]:
    """Attach a recorder to `model.patch_embed`; return it with the handle that takes it off."""
    recorder = GridRecorder()
    return recorder, model.get_submodule("patch_embed").register_forward_hook(recorder)
