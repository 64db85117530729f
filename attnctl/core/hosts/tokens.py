"""Which tokens of an attention are the image's and which the text's, and how the image's lie."""

from __future__ import annotations

from typing import Any

import torch

from attnctl.core.hosts.families import Family
from attnctl.core.hosts.listing import stage_grid
from attnctl.core.sites import Grid

__all__ = ["grid_of", "split_tokens"]


def split_tokens(
    kind: str, family: Family | None, image_tokens: int | None, n: int, hidden: Any, encoder: Any
) -> tuple[slice | None, slice | None]:
    """Return the image's and the text's part of a joint sequence of n tokens; None where there is none to tell.

    Args:
        kind: The site's kind of attention.
        family: The denoiser's family.
        image_tokens: Image tokens in a packed sequence, if they are known.
        n: Query tokens of the call.
        hidden: What the processor was called with.
        encoder: The text that it was called with, or None in a packed sequence.
    """
    if kind != "joint" or family is None or family.text is None:
        return None, None
    # Double-stream blocks bring both parts; single-stream ones bring the packed sequence.
    image = _count(hidden) if _count(encoder) is not None else image_tokens
    if image is None or _count(hidden) is None or not 0 < image <= n:
        return None, None
    if family.text == "first":
        return slice(n - image, n), slice(0, n - image)
    return slice(0, image), slice(image, n)


def _count(value: Any) -> int | None:
    return int(value.shape[1]) if isinstance(value, torch.Tensor) and value.ndim == 3 else None


def grid_of(state: Any, site: str, n: int) -> Grid | None:
    """Return frames, rows and columns of the n image tokens that one call attends over, or None if unknown.

    A UNet's site has the grid of its stage alone: as many tokens as another stage has may be merged ones.

    Args:
        state: The denoiser call.
        site: Name of the site.
        n: Image tokens of the attention call.
    """
    grid, family = state.grid, state.family
    if grid is None or family is None:
        return None
    if family.unet:
        level = stage_grid(state.denoiser, site, grid, n)
        return None if level is None else (1, *level[1:])  # UNets fold frames into the batch
    frames, h, w = grid
    return next((g for g in ((frames, h, w), (1, h, w)) if g[0] * h * w == n), None)
