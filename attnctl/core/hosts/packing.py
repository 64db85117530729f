"""How packed predictions lie on the image: from tokens to rows and columns of latents, and back."""

from __future__ import annotations

from typing import Any

import torch

from attnctl.errors import UnsupportedModelError

__all__ = ["as_image", "as_tokens"]

# How many latents along a side one token of a packed prediction [B, N, C] holds, its channels ordered (channel, row,
# column), by family; the pipelines pack and unpack them, and no model tells.
_PACKED = {"FLUX.1": 2, "FLUX.2": 2, "Chroma": 2, "Qwen-Image": 2, "LTX-Video": 1}


def as_image(pred: torch.Tensor, state: Any, what: str) -> torch.Tensor:
    """Lay a prediction out on the image: the last two axes are rows and columns of latents.

    Args:
        pred: The prediction [B, ..., H, W], or packed tokens [B, N, C].
        state: The denoiser call.
        what: The control, for messages.

    Raises:
        UnsupportedModelError: Nothing tells how its tokens lie.
    """
    grid, family = state.grid, state.family
    if pred.ndim > 3:
        rows, columns = pred.shape[-2:]
        if grid is None or rows * grid[2] == columns * grid[1]:
            return pred
    elif grid is not None and family.name in _PACKED and pred.shape[1] == grid[0] * grid[1] * grid[2]:
        p = _PACKED[family.name]
        x = pred.unflatten(1, grid).unflatten(-1, (-1, p, p))  # [B, F, H, W, C, p, p]
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    raise UnsupportedModelError(
        f"{what} needs to know how predictions {tuple(pred.shape)} lie on the image, which nothing tells for "
        f"{type(state.denoiser).__name__}. Choose a control that does not look at places."
    )


def as_tokens(image: torch.Tensor, shape: torch.Size, state: Any) -> torch.Tensor:
    """Undo `as_image`: return the prediction in the shape that it had."""
    if len(shape) > 3:
        return image
    p = _PACKED[state.family.name]
    x = image.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # [B, F, C, H, p, W, p]
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(shape)
