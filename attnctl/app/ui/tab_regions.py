"""The tab "Regions": a prompt of its own for up to four boxes, drawn or typed, beside the picture without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from attnctl.app.commands.common import UsageError
from attnctl.app.ui import actions
from attnctl.app.ui.inputs import Fields, accounts, afterwards, ask, picture, said, table, ticks
from attnctl.app.ui.models import Models
from attnctl.pipelines.models import SHIPPED
from attnctl.processors import Regions

__all__ = ["COLOURS", "drawn_boxes", "regions_of", "regions_tab", "typed_box"]

COLOURS = {"red": (220, 38, 38), "green": (22, 163, 74), "blue": (37, 99, 235), "yellow": (234, 179, 8)}
_NEAR = 60.0  # a stroke's soft rim is of no region's colour
_CANVAS = 400
_FORM = "left, top, right, bottom, from 0 to 1"
_SHAPES = ("a red circle and a blue square on gray", ("a red circle", "a blue square"))
_ELSEWHERE = ("a garden in the morning", ("a gray cat", "a brown dog"))
_HALVES = ("0, 0, 0.5, 1", "0.5, 0, 1, 1")


def drawn_boxes(drawing: Any) -> tuple[str | None, ...]:
    """Find the box that the strokes of each colour span, as text; None for a colour that was not used.

    Args:
        drawing: Pixels [height, width, 3 or 4] in uint8, or None.
    """
    if drawing is None or getattr(drawing, "ndim", 0) != 3 or min(drawing.shape[:2]) < 2:
        return (None,) * len(COLOURS)
    pixels = np.asarray(drawing)[:, :, :3].astype(np.float32)
    inked = np.asarray(drawing)[:, :, 3] > 127 if drawing.shape[2] == 4 else np.ones(drawing.shape[:2], bool)
    boxes: list[str | None] = []
    for colour in COLOURS.values():
        rows, columns = np.nonzero(inked & (np.linalg.norm(pixels - colour, axis=2) < _NEAR))
        if not len(rows):
            boxes.append(None)
            continue
        height, width = drawing.shape[:2]
        sides = columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height
        boxes.append(", ".join(f"{side:.2f}".rstrip("0").rstrip(".") for side in sides))
    return tuple(boxes)


def typed_box(text: str, region: int) -> tuple[float, ...]:
    """Read a box.

    Raises:
        UsageError: It is none.
    """
    parts = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    try:
        sides = tuple(float(part) for part in parts)
    except ValueError:
        sides = ()
    if len(sides) != 4:
        raise UsageError(f"Region {region}: {text!r:.60} is no box: draw one, or type {_FORM}, such as 0, 0, 0.5, 1.")
    return sides


def regions_of(prompts: Sequence[str | None], boxes: Sequence[str | None], base: float, stop: float) -> Regions:
    """Make the control of regions that have a prompt.

    Raises:
        UsageError: None has, or one has no box.
        ConfigError: A box lies outside of the picture, or is empty.
    """
    named = [(i, p.strip(), (b or "").strip()) for i, (p, b) in enumerate(zip(prompts, boxes, strict=True), 1) if p]
    named = [region for region in named if region[1]]
    if not named:
        raise UsageError("No region has a prompt: say what to show in one region at least.")
    for i, prompt, box in named:
        if not box:
            raise UsageError(f"Region {i} ({prompt}) has no box: draw over its place in its colour, or type {_FORM}.")
    areas = tuple(typed_box(box, i) for i, _, box in named)
    return Regions(prompts=tuple(prompt for _, prompt, _ in named), areas=areas, base=float(base), stop=float(stop))


def regions_tab(models: Models, folder: Path) -> None:
    """Lay out the tab."""
    whole, parts = _SHAPES if models.images[0].startswith(SHIPPED) else _ELSEWHERE
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            fields = Fields(models.images, whole)
            fields.prompt.label = "Prompt of the whole picture"
            # Above it: a label in the editor lies under its tools on a narrow screen.
            gr.Markdown("Draw each region in its colour: its box is what the strokes span.")
            canvas = gr.ImageEditor(
                label="Regions",
                show_label=False,
                type="numpy",
                image_mode="RGBA",
                canvas_size=(_CANVAS, _CANVAS),
                fixed_canvas=True,
                layers=False,
                sources=(),
                transforms=(),
                brush=gr.Brush(default_size=24, colors=[_hex(c) for c in COLOURS.values()], color_mode="fixed"),
                elem_id="regions-canvas",
            )
            prompts, boxes = [], []
            for i, colour in enumerate(COLOURS):
                with gr.Row():
                    first = i < len(parts)
                    prompts.append(
                        gr.Textbox(parts[i] if first else "", label=f"Region {i + 1}, {colour}", scale=3, min_width=140)
                    )
                    boxes.append(
                        gr.Textbox(
                            _HALVES[i] if first else "", label="Its box", placeholder=_FORM, scale=2, min_width=140
                        )
                    )
            with gr.Row():
                base = gr.Slider(0, 0.9, value=0.2, step=0.05, label="base", info="how much the whole prompt counts")
                stop = gr.Slider(0, 1, value=0.4, step=0.05, label="stop", info="share of the run that regions lead")
            go = gr.Button("Generate", variant="primary", elem_id="regions-go")
        with gr.Column(scale=5, min_width=360):
            with gr.Row():
                plain, controlled = (
                    picture(label, f"regions-{label.lower()}", height=300, pixels=models.given is None)
                    for label in ("Plain", "Controlled")
                )
            marks = gr.Markdown(
                "Press *Generate*: the same noise becomes a picture twice.",
                elem_id="regions-marks",
                elem_classes=["marks"],
            )
            report, command = accounts()
    canvas.change(_follow, canvas, boxes, queue=False, show_progress="hidden", api_visibility="private")
    shown = [plain, controlled, marks, report, command]
    event = go.click(
        _make(models, folder),
        [*fields.all, *prompts, *boxes, base, stop],
        shown,
        api_name="regions",
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[plain, controlled],
    )
    afterwards(event, shown, "regions-plain")


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _follow(drawing: dict[str, Any] | None) -> list[Any]:
    """Bring drawn boxes into the fields; what was typed for other regions stays."""
    boxes = drawn_boxes(None if drawing is None else drawing.get("composite"))
    return [gr.skip() if box is None else box for box in boxes]


def _make(models: Models, folder: Path) -> Callable[..., Any]:
    """Return what the button does."""

    @said
    def regions(
        model: str,
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        prompt_1: str,
        prompt_2: str,
        prompt_3: str,
        prompt_4: str,
        box_1: str,
        box_2: str,
        box_3: str,
        box_4: str,
        base: float,
        stop: float,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Make a picture plain and with regions: paths of both PNGs, the judge's table, the report, the commands."""
        request = ask(model, prompt, seed, steps, guidance)
        parts, boxes = (prompt_1, prompt_2, prompt_3, prompt_4), (box_1, box_2, box_3, box_4)
        control = regions_of(parts, boxes, base, stop)
        done = actions.compare(models, request, [control], ticks(progress, models, request, 2))
        paths = [actions.keep(folder, f"{name} {prompt}", run) for name, run, _ in done.runs]
        return (*paths, table(*actions.image_marks(done, prompt)), done.report, done.commands)

    return regions
