"""Grids, pairs and overlays: where every tile lies, that its pixels are kept, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from attnctl.data.pictures import enlarge, grid, overlay, pair
from attnctl.errors import ConfigError


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def holds(sheet: Image.Image, tile: Image.Image) -> tuple[int, int] | None:
    """Find a tile in a sheet and return its corner."""
    big, small = np.asarray(sheet).astype(np.int64), np.asarray(tile).astype(np.int64)
    h, w = small.shape[:2]
    for y, x in np.argwhere((big[: -h + 1 or None, : -w + 1 or None] == small[0, 0]).all(-1)):
        if (big[y : y + h, x : x + w] == small).all():
            return int(x), int(y)
    return None


def test_enlarging_keeps_every_pixel() -> None:
    small = noise(0)
    big = enlarge(small)
    assert big.size == (192, 192)
    assert (np.asarray(big)[1::3, 1::3] == np.asarray(small)).all()
    assert enlarge(noise(0, (300, 200))).size == (300, 200)
    assert enlarge(noise(0, (5, 5)), 12).size == (15, 15)


def test_a_grid_holds_its_tiles_in_reading_order() -> None:
    images = [noise(i) for i in range(6)]
    sheet = grid(images, 2, 3, ["first row", "second row"], ["one", "two", "three"], title="a title", footer="a footer")
    corners = [holds(sheet, enlarge(image)) for image in images]
    assert None not in corners
    xs, ys = zip(*corners, strict=True)  # type: ignore[misc]
    assert xs[:3] == xs[3:]
    assert xs[0] < xs[1] < xs[2]
    assert len(set(ys[:3])) == 1
    assert ys[0] < ys[3]
    assert xs[0] > 100, "labels need room"


def test_labels_change_the_picture_and_stay_inside() -> None:
    plain = grid([noise(0)] * 2, 1, 2)
    label = "a very long label " * 8 + "x" * 300
    labelled = grid([noise(0)] * 2, 1, 2, [label], [label, ""])
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    right = np.asarray(labelled)[:, -10:]
    assert (right == 255).all(), "no label runs off the sheet"


def test_frames_do_not_touch_the_pixels() -> None:
    images = [noise(i) for i in range(4)]
    framed = grid(images, 2, 2, frames=[(0, 255, 0), None, (255, 0, 0), (0, 0, 255)])
    assert all(holds(framed, enlarge(image)) for image in images)
    colors = {tuple(c) for c in np.asarray(framed).reshape(-1, 3)}
    assert {(0, 255, 0), (255, 0, 0), (0, 0, 255)} <= colors


def test_mixed_sizes_modes_and_empty_cells() -> None:
    images = [noise(0), None, noise(1, (100, 30)).convert("RGBA"), noise(2).convert("L")]
    sheet = grid(images, 2, 2, column_labels=["a", "b"])
    assert holds(sheet, enlarge(noise(0))) is not None
    assert sheet.mode == "RGB"


@pytest.mark.parametrize(
    ("n", "rows", "columns", "row_labels", "column_labels", "message"),
    [
        (3, 2, 2, (), (), "3 images do not fill"),
        (0, 0, 0, (), (), "do not fill"),
        (2, 1, 2, ("a", "b"), (), "Expected 1 row labels, got 2"),
        (2, 1, 2, (), ("a",), "Expected 2 column labels, got 1"),
    ],
)
def test_bad_grids_are_refused(
    n: int, rows: int, columns: int, row_labels: tuple[str, ...], column_labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        grid([noise(i) for i in range(n)], rows, columns, row_labels, column_labels)
    with pytest.raises(ConfigError, match="at least one image"):
        grid([None], 1, 1)


def test_a_pair_is_a_grid_of_two() -> None:
    sheet = pair(noise(0), noise(1), title="what changed")
    (x0, y0), (x1, y1) = holds(sheet, enlarge(noise(0))), holds(sheet, enlarge(noise(1)))  # type: ignore[misc]
    assert x0 < x1
    assert y0 == y1


def test_an_overlay_is_brightest_where_the_map_is() -> None:
    heat = torch.zeros(8, 8)
    heat[2, 5] = 1
    shown = np.asarray(overlay(Image.new("RGB", (64, 64)), heat, alpha=1.0)).astype(int).sum(-1)
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    assert (y // 24, x // 24) == (2, 5)
    image = noise(0)
    assert (np.asarray(overlay(image, heat, alpha=0.0)) == np.asarray(enlarge(image))).all()


def test_overlays_share_a_scale_where_limits_are_given() -> None:
    image = noise(0)
    low = overlay(image, np.full((4, 4), 0.1), limits=(0, 1))
    high = overlay(image, np.full((4, 4), 0.9), limits=(0, 1))
    assert np.asarray(low).astype(int).sum() < np.asarray(high).astype(int).sum()
    overlay(image, np.zeros((4, 4)))  # a flat map has no range


@pytest.mark.parametrize("heat", [np.zeros(4), np.zeros((0, 3)), np.full((2, 2), np.nan), np.zeros((2, 2, 3))])
def test_bad_maps_are_refused(heat: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="heat map"):
        overlay(noise(0), heat)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        overlay(noise(0), np.zeros((2, 2)), alpha=alpha)
