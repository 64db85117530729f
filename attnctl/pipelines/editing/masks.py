"""A mask of what may change, brought to the frames that an edit sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.data.clips import Clip, fit
from attnctl.errors import ConfigError

__all__ = ["check_covers", "check_mask", "region_of"]


def check_mask(mask: np.ndarray | None, clip: Clip, chosen: range) -> None:
    """Refuse a mask that does not lie on the frames.

    Raises:
        ConfigError: It has another size, or another number of frames.
    """
    if mask is None:
        return
    if mask.ndim == 3 and len(mask) != len(chosen):
        raise ConfigError(
            f"The mask has {len(mask)} frames, and {len(chosen)} are edited: give one mask, or one per frame."
        )
    given, frame = mask.shape[-2:], clip.read([chosen[0]]).shape[1:3]
    if given != frame:
        raise ConfigError(
            f"The mask is {given[1]}x{given[0]}, the frames are {frame[1]}x{frame[0]}: give a mask of the frames' size."
        )
    if not mask.any():
        raise ConfigError("The mask is black: nothing may change. White marks what may.")


def check_covers(regions: Iterable[Tensor | None], cells: Sequence[int]) -> None:
    """Refuse a mask of which no cell of the model is white by half or more: nothing would change.

    Args:
        regions: What `region_of` returns for each window.
        cells: Rows and columns of the model's cells, or frames, rows and columns.

    Raises:
        ConfigError: There is no such cell.
    """
    height = width = 0
    for region in regions:
        if region is None:
            return
        height, width = region.shape[-2:]
        size = (len(region) if len(cells) == 2 else cells[0], *cells[-2:])
        if bool((F.interpolate(region[None, None].float(), size=size, mode="area") >= 0.5).any()):
            return
    raise ConfigError(
        f"What is white in the mask is smaller than a cell of the model, or is cut off: it sees {width}x{height} "
        f"pixels as {cells[-1]}x{cells[-2]} cells, of which half must be white. Give a larger white part."
    )


def region_of(
    mask: np.ndarray | None, rows: Sequence[int], chosen: range, size: int | tuple[int, int] | None, multiple: int
) -> Tensor | None:
    """Return where some frames of a clip may change, as the model sees them: bool [frames, height, width].

    Args:
        mask: The mask, or None.
        rows: The frames, counted in the clip.
        chosen: The frames that are edited, of which a mask of several frames has one each.
        size: What frames are brought to.
        multiple: What both sides become multiples of.
    """
    if mask is None:
        return None
    parts = mask[None].repeat(len(rows), 0) if mask.ndim == 2 else mask[[chosen.index(r) for r in rows]]
    pictures = np.repeat(parts[..., None].astype(np.uint8) * 255, 3, -1)
    return torch.from_numpy(np.ascontiguousarray(fit(pictures, size, multiple)[..., 0] > 127))
