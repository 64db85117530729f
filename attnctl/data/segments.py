"""What expressions name in pictures: masks, boxes and points, as COCO writes them, and drawn over the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from attnctl.data.map_points import Point
from attnctl.data.map_regions import rle
from attnctl.data.pictures import grid, overlay

__all__ = ["Referred", "coco", "mask_picture", "segments_sheet"]

_MOST_FRAMES = 6
_TILE = 192


@dataclass(frozen=True, kw_only=True, eq=False)
class Referred:
    """Where an expression is, in each picture.

    Attributes:
        expression: What was asked for.
        heat: The map of each picture on the grid of tokens, [F, h, w].
        masks: What it covers, on the picture's pixels, bool [F, H, W].
        boxes: (left, top, width, height) around the mask of each picture, in pixels; None where it is empty.
        positive: Points (x, y) inside, per picture, the highest first.
        negative: Points outside, per picture.
    """

    expression: str
    heat: Tensor
    masks: Tensor
    boxes: tuple[tuple[int, int, int, int] | None, ...]
    positive: tuple[tuple[Point, ...], ...]
    negative: tuple[tuple[Point, ...], ...]


def coco(found: Sequence[Referred], names: Sequence[str]) -> dict[str, Any]:
    """Write segments as COCO does: images, one category per expression, one annotation per picture and expression.

    Points stand under `point_coords` and `point_labels` (1 inside, 0 outside), the names that SAM's predictor takes.
    An expression that is nowhere in a picture has no annotation there.

    Args:
        found: What `refer` returned.
        names: The file name of each picture.
    """
    h, w = found[0].masks.shape[1:]
    annotations: list[dict[str, Any]] = []
    for number, one in enumerate(found, 1):
        for frame, box in enumerate(one.boxes):
            if box is None:
                continue
            inside, outside = one.positive[frame], one.negative[frame]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": frame + 1,
                    "category_id": number,
                    "bbox": list(box),
                    "area": int(one.masks[frame].sum()),
                    "segmentation": rle(one.masks[frame]),
                    "iscrowd": 0,
                    "point_coords": [list(p) for p in (*inside, *outside)],
                    "point_labels": [1] * len(inside) + [0] * len(outside),
                }
            )
    return {
        "images": [{"id": i, "file_name": n, "height": int(h), "width": int(w)} for i, n in enumerate(names, 1)],
        "categories": [{"id": i, "name": one.expression} for i, one in enumerate(found, 1)],
        "annotations": annotations,
    }


def mask_picture(mask: Any) -> Image.Image:
    """Draw a mask [h, w]: white inside, black outside."""
    return Image.fromarray(np.asarray(mask, np.uint8) * 255)


def segments_sheet(pictures: Sequence[Image.Image], found: Sequence[Referred]) -> Image.Image:
    """Lay out one row per expression and one column per picture, of up to six: map, outline of the mask, points."""
    shown = [int(i) for i in np.unique(np.linspace(0, len(pictures) - 1, _MOST_FRAMES).round())]
    tiles = [_tile(pictures[i], one, i) for one in found for i in shown]
    return grid(
        tiles,
        len(found),
        len(shown),
        [one.expression for one in found],
        [f"frame {i + 1}" for i in shown] if len(pictures) > 1 else [],
        footer="Bright: where the map is high. White: the mask. Green points lie inside, red ones outside.",
        tile=_TILE,
    )


def _tile(picture: Image.Image, one: Referred, index: int) -> Image.Image:
    import cv2

    tile = overlay(picture.convert("L").convert("RGB"), one.heat[index], tile=_TILE)
    x_scale, y_scale = tile.width / picture.width, tile.height / picture.height
    large = cv2.resize(np.asarray(one.masks[index], np.uint8), tile.size, interpolation=cv2.INTER_NEAREST)
    lines, _ = cv2.findContours(large, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    drawn = cv2.drawContours(np.array(tile), lines, -1, (255, 255, 255), 2)
    tile = Image.fromarray(drawn)
    pen = ImageDraw.Draw(tile)
    for points, color in ((one.positive[index], (60, 230, 90)), (one.negative[index], (240, 60, 60))):
        for x, y in points:
            cx, cy = (x + 0.5) * x_scale, (y + 0.5) * y_scale
            pen.ellipse((cx - 5, cy - 5, cx + 5, cy + 5), fill=color, outline=(0, 0, 0))
    return tile
