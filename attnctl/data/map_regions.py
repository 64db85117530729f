"""Word maps as regions of the image: bounding boxes, and masks in COCO's run-length form."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from attnctl.data.maps import WordMaps
from attnctl.errors import ConfigError

__all__ = ["boxes", "from_rle", "regions", "rle"]


def rle(mask: Any) -> dict[str, Any]:
    """Write a mask [h, w] as COCO does: run lengths down the columns, the first run being of zeros (maybe empty).

    Example:
        >>> rle(torch.tensor([[False, True], [False, True]]))
        {'size': [2, 2], 'counts': [2, 2]}
    """
    flat = _mask(mask).T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return {"size": list(_mask(mask).shape), "counts": [0, *counts] if flat[0] else counts}


def from_rle(data: dict[str, Any]) -> Tensor:
    """Read what `rle` wrote: bool [h, w].

    Raises:
        ConfigError: The runs do not fill the size.
    """
    h, w = data["size"]
    counts = list(data["counts"])
    if sum(counts) != h * w or any(c < 0 for c in counts):
        raise ConfigError(f"The runs of a mask cover {sum(counts)} pixels, expected {h} x {w} = {h * w}.")
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return torch.from_numpy(values.reshape(w, h).T.copy())


def boxes(mask: Any) -> list[tuple[int, int, int, int]]:
    """Return (left, top, width, height) of each connected part of a mask [h, w], the largest part first."""
    import cv2

    _, _, stats, _ = cv2.connectedComponentsWithStats(_mask(mask).astype(np.uint8), connectivity=8)
    parts = sorted(stats[1:].tolist(), key=lambda s: -s[4])
    return [(x, y, w, h) for x, y, w, h, _ in parts]


def regions(
    maps: WordMaps,
    index: int = 0,
    *,
    height_width: tuple[int, int] | None = None,
    threshold: float | Literal["otsu"] = "otsu",
) -> list[dict[str, Any]]:
    """Say in plain JSON values where each word of one image is.

    Args:
        maps: What a `Capture` recorded of images.
        index: Which image.
        height_width: Rows and columns of the image in pixels; the largest grid of the maps if None.
        threshold: As for `WordMaps.mask`.

    Returns:
        For each word of its prompt: `word`, `bbox` (left, top, width, height around all of it), `boxes` (of each
        connected part), `area` in pixels, `segmentation` (COCO run lengths) and `peak`, the map's highest probability.

    Raises:
        ConfigError: The image is past the end, or the maps are those of a video.
    """
    if not 0 <= index < maps.images:
        raise ConfigError(f"Image {index} is past the end: there are {maps.images}.")
    entries = []
    for n, word in enumerate(maps.words):
        if not maps.tokens[index][n]:
            continue
        mask = maps.mask(word, threshold, size=height_width)[index]
        parts = boxes(mask)
        left, top = (min((p[i] for p in parts), default=0) for i in (0, 1))
        right, bottom = (max((p[i] + p[i + 2] for p in parts), default=0) for i in (0, 1))
        entries.append(
            {
                "word": word,
                "bbox": [left, top, right - left, bottom - top],
                "boxes": [list(p) for p in parts],
                "area": int(mask.sum()),
                "segmentation": rle(mask),
                "peak": round(float(maps.get_map(word)[index].max()), 6),
            }
        )
    return entries


def _mask(mask: Any) -> np.ndarray:
    array = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if array.ndim != 2 or array.size == 0:
        raise ConfigError(f"A mask is an array [h, w], got shape {array.shape}. Take one frame of a video's.")
    return array.astype(bool)
