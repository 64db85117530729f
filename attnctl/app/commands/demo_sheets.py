"""The sheets of `attnctl demo --all`: the shipped models plain and under control, side by side, with the judge's marks.

Every panel of a sheet uses the same prompts, seeds and noise. A method joins a sheet by a preset with a column,
declared in its own file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnctl.app.commands import demo_video
from attnctl.app.commands.common import say, table, tally
from attnctl.app.demo import SHEETS, Panel, Sheet, nouns
from attnctl.data.files import below

__all__ = ["FILES", "Size", "make", "text"]

PROMPTS_SEED = 2024  # which two-object prompts are shown; fixed, so that every run asks the same
MARKS = {"present": "both colours there", "bound": "both bound", "right": "all right"}
GREEN = (30, 150, 70)
FILES = (*(name for sheet in SHEETS for name in (sheet.file, sheet.maps) if name), demo_video.FILE)
_VIDEO_SHARE = 16  # one video for so many images of the first sheet


@dataclass(frozen=True, kw_only=True)
class Size:
    """Say how much is made: prompts of two objects, images for each, and how they are made and shown."""

    prompts: int = 16
    seeds: int = 3
    steps: int = 20
    guidance: float = 3.0
    rows: int = 5
    batch: int = 32
    seed: int = 0


def make(size: Size, out: Path, command: str, *, force: bool) -> list[dict[str, Any]]:
    """Generate, judge and draw every sheet; return what the judge found."""
    from attnctl.shapes import pair_prompts

    prompts = pair_prompts(PROMPTS_SEED, size.prompts) * size.seeds
    done = [
        _sheet(sheet, size, prompts[: max(1, len(prompts) // sheet.share)], out, command, force) for sheet in SHEETS
    ]
    done.append(
        demo_video.make(
            below(out, f"{demo_video.FILE}.png"),
            videos=max(1, len(prompts) // _VIDEO_SHARE),
            rows=min(size.rows, 4),
            steps=size.steps,
            guidance=size.guidance,
            seed=size.seed,
            command=command,
            force=force,
        )
    )
    return done


def text(done: Sequence[dict[str, Any]]) -> str:
    """Put what the judge found into tables."""
    return "\n\n".join(map(_text, done)) + f"\n\n{_NOTES}"


def _sheet(sheet: Sheet, size: Size, prompts: tuple[str, ...], out: Path, command: str, force: bool) -> dict[str, Any]:
    """Make one picture, and a second one of maps where it has one."""
    from attnctl.data.progress import Progress
    from attnctl.data.record import save_image
    from attnctl.pipelines.generate import Call
    from attnctl.pipelines.models import load

    seeds = tuple(range(size.seed, size.seed + len(prompts)))
    loaded = load(sheet.model)
    panels = sheet.panels
    say(f"{sheet.model}: {len(panels)} panels of {len(prompts)} images, {size.steps} steps, on {loaded.pipe.device}")
    calls = [
        Call(
            prompts=prompts[first : first + size.batch],
            seeds=seeds[first : first + size.batch],
            steps=size.steps,
            guidance=size.guidance,
            options=dict(sheet.options),
            command=command,
        )
        for first in range(0, len(prompts), size.batch)
    ]
    started = time.perf_counter()
    columns = []
    with Progress(len(panels) * len(calls) * size.steps, "step", sheet.model) as bar:
        for panel in panels:
            bar.describe(panel.name)
            asks = [replace(call, controls=_controls(panel, call.prompts)) for call in calls]
            if not panel.controls and sheet.maps:  # the plain images of the grid also show where they attend
                asks[0] = replace(asks[0], controls=(_capture(asks[0].prompts, size.steps),))
            columns.append(_column(loaded, asks, bar.update))
    seconds = time.perf_counter() - started

    shown = min(size.rows, size.prompts, size.batch, len(prompts))
    pictures = [below(out, f"{sheet.file}.png")]
    save_image(
        _grid(sheet, columns, prompts[:shown], seeds[:shown], size, len(prompts)),
        pictures[0],
        [replace(column["records"][0], shows=tuple(range(shown))) for column in columns],
        force=force,
    )
    if sheet.maps:
        pictures.append(below(out, f"{sheet.maps}.png"))
        plain = columns[[panel.controls for panel in panels].index(())]
        save_image(
            _maps_sheet(plain, prompts[:shown], seeds[:shown]),
            pictures[1],
            replace(plain["records"][0], shows=tuple(range(shown))),
            force=force,
        )
    marks = [_marks(panel, column) for panel, column in zip(panels, columns, strict=True)]
    for panel, row in zip(panels, marks, strict=True):
        for control, names in zip(panel.controls, row["sites"], strict=True):
            say(f"{control} acts on {', '.join(names)}")
    return {
        "model": sheet.model,
        "pictures": [str(path) for path in pictures],
        "seconds": round(seconds, 1),
        "images_per_panel": len(prompts),
        "panels": marks,
    }


def _controls(panel: Panel, prompts: Sequence[str]) -> tuple[Any, ...]:
    """Make the controls of one column for the prompts of one call."""
    from attnctl.data.specs import parse_control

    return tuple(parse_control(text.replace("NOUNS", repr(tuple(map(nouns, prompts))))) for text in panel.controls)


def _capture(prompts: Sequence[str], steps: int) -> Any:
    """Record the two nouns of each prompt while the image settles, in the stage where nouns find their objects."""
    from attnctl.processors import Capture

    return Capture(words=tuple(map(nouns, prompts)), sites="up_blocks", start=0.5 if steps > 1 else 0.0)


def _column(loaded: Any, calls: Sequence[Any], step: Any) -> dict[str, Any]:
    """Run all calls of one panel and judge the images."""
    from attnctl.pipelines.generate import sample
    from attnctl.shapes import judge

    done = [sample(loaded, call, step) for call in calls]
    images = [image for one in done for image in one.images]
    prompts = [prompt for call in calls for prompt in call.prompts]
    matches = [judge(image).matches(prompt) for image, prompt in zip(images, prompts, strict=True)]
    return {
        "images": images,
        "records": [one.record for one in done],
        "maps": next((maps for one in done for maps in one.maps), None),
        "present": [match.all_present for match in matches],
        "bound": [all(match.bound) for match in matches],
        "right": [match.right for match in matches],
    }


def _grid(
    sheet: Sheet,
    columns: Sequence[dict[str, Any]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: Size,
    images: int,
) -> Any:
    from attnctl.data.pictures import grid

    rows = len(prompts)
    return grid(
        [column["images"][i] for i in range(rows) for column in columns],
        rows,
        len(columns),
        [f"{prompt}\nseed {seed}" for prompt, seed in zip(prompts, seeds, strict=True)],
        ["\n".join(panel.controls) or panel.name for panel in sheet.panels],
        footer=(
            "Green frame: the judge finds both objects, each in its own colour and shape, and nothing else. "
            f"The first {rows} of {images} images of {sheet.model}, not chosen; CFG {size.guidance:g}, "
            f"{size.steps} steps."
        ),
        frames=[GREEN if column["right"][i] else None for i in range(rows) for column in columns],
    )


def _maps_sheet(plain: dict[str, Any], prompts: Sequence[str], seeds: Sequence[int]) -> Any:
    from attnctl.data.map_pictures import overlay_word
    from attnctl.data.pictures import grid

    maps = plain["maps"]
    tiles = []
    for i, prompt in enumerate(prompts):
        image = plain["images"][i]
        tiles += [image, *(overlay_word(image, maps, word, i) for word in nouns(prompt))]
    return grid(
        tiles,
        len(prompts),
        3,
        [f"{prompt}\nseed {seed}" for prompt, seed in zip(prompts, seeds, strict=True)],
        ["plain", "first noun", "second noun"],
        footer=(
            "Where the image attends to the two nouns: cross-attention of the up blocks, second half of the run; "
            "each map from dark (its lowest share of attention) to bright (its highest)."
        ),
    )


def _marks(panel: Panel, column: dict[str, Any]) -> dict[str, Any]:
    """Count each mark of a panel, with its 95 % interval."""
    marks: dict[str, Any] = {}
    for name in MARKS:
        marks[name] = tally(column[name])
    record = column["records"][0]
    sites = [list(names) for names in record.sites]
    return {"name": panel.name, "controls": list(record.controls), "sites": sites, **marks}


_NOTES = (
    "The same prompts and seeds in all rows of a table; k/n and 95 % Wilson interval.\n"
    "bound: each object has its own colour and shape; all right: bound, and nothing else in the picture."
)


def _text(sheet: dict[str, Any]) -> str:
    marks = MARKS if "images_per_panel" in sheet else demo_video.MARKS
    heads, motion = [sheet["model"], *marks.values()], [] if "images_per_panel" in sheet else ["motion, px a frame"]
    rows = [
        (panel["name"], *(_share(panel[name]) for name in marks), *(f"{panel['motion']:.2f}" for _ in motion))
        for panel in sheet["panels"]
    ]
    return table((*heads, *motion), rows)


def _share(mark: dict[str, Any]) -> str:
    return f"{mark['k']}/{mark['n']} {mark['share']:4.0%} [{mark['low']:.0%}, {mark['high']:.0%}]"
