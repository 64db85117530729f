"""The grid of a token sequence, read where the model still knows it: at the patch embedding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["GridRecorder", "watch_grid"]


class GridRecorder:
    """Keep the (height, width) in tokens of the images that the patch embedding saw last.

    A copy of the model copies the recorder along, so copies do not share it.
    """

    def __init__(self) -> None:
        self.grid: tuple[int, int] | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Record the grid of an output [B, h, w, C] (timm with dynamic_img_size); leave token sequences alone."""
        self.grid = (output.shape[1], output.shape[2]) if output.ndim == 4 else None


def watch_grid(model: nn.Module) -> tuple[GridRecorder, RemovableHandle]:
    """Attach a recorder to `model.patch_embed`; return it with the handle that takes it off."""
    recorder = GridRecorder()
    return recorder, model.get_submodule("patch_embed").register_forward_hook(recorder)
