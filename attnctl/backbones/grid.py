"""The grid of a token sequence, read where the model still knows it: at the patch embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["GridRecorder", "GridSource", "watch_grid"]

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


class GridSource:
    """Return a grid: the one that a recorder saw last, else that of the patch embedding as it is now, else a fixed one.

    embed: the patch embedding, None for one that has no grid and where the user gave another.
    """

    def __init__(self, fixed: Grid, embed: nn.Module | None = None, recorder: GridRecorder | None = None) -> None:
        self.fixed, self.embed, self.recorder = fixed, embed, recorder

    def __call__(self) -> Grid:
        """Return (height, width) in tokens."""
        if self.recorder is not None and self.recorder.grid is not None:
            return self.recorder.grid
        size: Any = None if self.embed is None else self.embed.grid_size  # set_input_size changes it
        return self.fixed if size is None else (int(size[0]), int(size[1]))


def watch_grid(model: nn.Module) -> tuple[GridRecorder, RemovableHandle]:
    """Attach a recorder to `model.patch_embed`; return it with the handle that takes it off."""
    recorder = GridRecorder()
    return recorder, model.get_submodule("patch_embed").register_forward_hook(recorder)
