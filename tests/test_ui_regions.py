"""The tab of regions without a browser: drawings become boxes, boxes become regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from attnctl.errors import AttnctlError
from attnctl.processors import Regions

pytest.importorskip("gradio", reason="gradio is not installed")

from attnctl.app.ui.tab_regions import COLOURS, drawn_boxes, regions_of, typed_box

EMPTY = ("",) * 4


def drawing(height: int = 100, width: int = 200, alpha: bool = True) -> np.ndarray:
    """Draw with the first colour in the left quarter, and with the third across the lower half."""
    pixels = np.zeros((height, width, 4), np.uint8) if alpha else np.full((height, width, 3), 255, np.uint8)
    for (rows, columns), colour in (
        ((slice(0, 100), slice(0, 50)), "red"),
        ((slice(50, 100), slice(60, 200)), "blue"),
    ):
        pixels[rows, columns, :3] = COLOURS[colour]
        if alpha:
            pixels[rows, columns, 3] = 255
    return pixels


@pytest.mark.parametrize("alpha", [True, False])
def test_strokes_span_boxes(alpha: bool) -> None:
    assert drawn_boxes(drawing(alpha=alpha)) == ("0, 0, 0.25, 1", None, "0.3, 0.5, 1, 1", None)


def test_a_drawing_of_nothing_spans_no_box() -> None:
    white = np.full((8, 8, 4), 255, np.uint8)
    for nothing in (None, np.zeros((0, 0, 4), np.uint8), np.zeros((8, 8), np.uint8), white, white[:, :, :3]):
        assert drawn_boxes(nothing) == (None,) * 4


def test_soft_rims_belong_to_no_region() -> None:
    pixels = drawing()
    mixed = (np.array(COLOURS["red"]) + COLOURS["green"]) // 2
    pixels[:, 55:58] = [*mixed, 255]
    assert drawn_boxes(pixels) == drawn_boxes(drawing())


def test_boxes_are_typed_with_commas_or_blanks() -> None:
    assert typed_box("(0, 0, 0.5, 1)", 1) == typed_box("0 0 .5 1", 1) == (0.0, 0.0, 0.5, 1.0)


def test_regions_without_a_prompt_are_left_out() -> None:
    made = regions_of(("", "a cat", " ", None), ("0, 0, 1, 1", "0, 0, 0.5, 1", "", None), 0.1, 0.5)
    assert made == Regions(prompts=("a cat",), areas=((0.0, 0.0, 0.5, 1.0),), base=0.1, stop=0.5)


@pytest.mark.parametrize(
    ("prompts", "boxes", "words"),
    [
        (EMPTY, EMPTY, "No region has a prompt"),
        (("a cat", "", "", ""), EMPTY, r"Region 1 \(a cat\) has no box"),
        (("", "a cat", "", ""), ("", "left half", "", ""), "Region 2: 'left half' is no box"),
        (("a cat", "", "", ""), ("0, 0, 1", "", "", ""), "is no box"),
        (("a cat", "", "", ""), ("0, 0, 1.5, 1", "", "", ""), "out of range"),
        (("a cat", "", "", ""), ("0.5, 0, 0.2, 1", "", "", ""), "left before right"),
        (("a cat", "", "", ""), ("nan 0 1 1", "", "", ""), "areas"),
    ],
)
def test_what_is_no_region_is_said(prompts: Sequence[str], boxes: Sequence[str], words: str) -> None:
    with pytest.raises(AttnctlError, match=words):
        regions_of(prompts, boxes, 0.2, 0.4)
