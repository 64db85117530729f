"""`attnctl demo`: the shipped model plain and under control, side by side, with the judge's marks. Offline.

Every panel uses the same prompts, seeds and noise. A new method adds a line to `PANELS`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnctl.commands.common import Common, Result, UsageError, say, table, wilson
from attnctl.outputs import below, check_free

__all__ = ["PANELS", "Demo", "Panel"]

MODEL = "shapes:text2image"
PROMPTS_SEED = 2024  # which two-object prompts are shown; fixed, so that every run asks the same
MARKS = ("present", "bound", "right")
GREEN = (30, 150, 70)


@dataclass(frozen=True)
class Panel:
    """Describe one column of the demo: its label and its controls, in the short form of `--control`."""

    name: str
    controls: tuple[str, ...] = ()


PANELS: tuple[Panel, ...] = (
    Panel("plain"),
    Panel("PAG", ('PAG(scale=2.5, sites="up.0")',)),
    Panel("SoftPAG", ('SoftPAG(scale=2.5, u=0.5, sites="up.0")',)),
)


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """Show every method on the shipped model: a grid of images, and a table of what the judge finds."""

    prompts: int = 16
    """How many prompts, two objects each."""

    seeds: int = 4
    """How many images per prompt."""

    steps: int = 20
    """Denoising steps."""

    guidance: float = 3.0
    """Classifier-free guidance scale, the same in every panel."""

    rows: int = 5
    """Rows of the grid."""

    batch: int = 32
    """Images per pipeline call."""

    seed: int = 0
    """Seed of the first image."""

    out: Path = Path("out")
    """Folder for demo.png and demo.json."""

    force: bool = False
    """Overwrite files that are already there."""

    def run(self, command: str) -> Result:
        """Generate, judge, draw and tabulate."""
        for name, least in (
            ("prompts", 1),
            ("seeds", 1),
            ("steps", 1),
            ("rows", 1),
            ("batch", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is a whole number from {least} on, got {getattr(self, name)}.")
        path, maps_path = below(self.out, "demo.png"), below(self.out, "demo-maps.png")
        check_free([p.with_suffix(end) for p in (path, maps_path) for end in (".png", ".json")], force=self.force)

        from tqdm import tqdm

        from attnctl.commands.models import load
        from attnctl.commands.sampling import Call
        from attnctl.record import save_image
        from attnctl.shapes import pair_prompts
        from attnctl.specs import parse_control

        asked = pair_prompts(PROMPTS_SEED, self.prompts) * self.seeds
        seeds = tuple(range(self.seed, self.seed + len(asked)))
        loaded = load(MODEL)
        say(f"{len(PANELS)} panels of {len(asked)} images, {self.steps} steps each, on {loaded.pipe.device}")
        calls = [
            Call(
                prompts=asked[first : first + self.batch],
                seeds=seeds[first : first + self.batch],
                steps=self.steps,
                guidance=self.guidance,
                command=command,
            )
            for first in range(0, len(asked), self.batch)
        ]
        started = time.perf_counter()
        columns = []
        total = len(PANELS) * len(calls) * self.steps
        with tqdm(total=total, unit="step", disable=None, leave=False) as bar:
            for panel in PANELS:
                bar.set_description(panel.name)
                controls = tuple(parse_control(text) for text in panel.controls)
                asks = [replace(call, controls=controls) for call in calls]
                if not controls:  # the plain images of the grid also show where they attend
                    asks[0] = replace(asks[0], controls=(_capture(asks[0].prompts, self.steps),))
                columns.append(_column(loaded, asks, bar.update))
        seconds = time.perf_counter() - started

        shown = min(self.rows, self.prompts, self.batch)
        save_image(
            _sheet(columns, asked[:shown], seeds[:shown], self),
            path,
            [replace(column["records"][0], shows=tuple(range(shown))) for column in columns],
            force=self.force,
        )
        plain = columns[[panel.controls for panel in PANELS].index(())]
        save_image(
            _maps_sheet(plain, asked[:shown], seeds[:shown]),
            maps_path,
            replace(plain["records"][0], shows=tuple(range(shown))),
            force=self.force,
        )
        panels = [_marks(panel, column) for panel, column in zip(PANELS, columns, strict=True)]
        for panel, row in zip(PANELS, panels, strict=True):
            for control, names in zip(panel.controls, row["sites"], strict=True):
                say(f"{control} acts on {', '.join(names)}")
        say(f"{seconds:.0f} s of computing; pictures in {path} and {maps_path}")
        data = {
            "picture": str(path),
            "maps": str(maps_path),
            "seconds": round(seconds, 1),
            "prompts": self.prompts,
            "images_per_panel": len(asked),
            "steps": self.steps,
            "guidance": self.guidance,
            "panels": panels,
        }
        return Result(data, _text(panels, len(asked), self.prompts))


def _capture(prompts: Sequence[str], steps: int) -> Any:
    """Record the two nouns of each prompt while the image settles, in the stage where nouns find their objects."""
    from attnctl.processors import Capture

    return Capture(words=tuple(map(_nouns, prompts)), sites="up_blocks", start=0.5 if steps > 1 else 0.0)


def _nouns(prompt: str) -> tuple[str, ...]:
    from attnctl.shapes import parse

    shapes = [thing.shape for thing in parse(prompt).things]
    return tuple(f"{s}#{shapes[: i + 1].count(s)}" if shapes.count(s) > 1 else s for i, s in enumerate(shapes))


def _column(loaded: Any, calls: Sequence[Any], step: Any) -> dict[str, Any]:
    """Run all calls of one panel and judge the images."""
    from attnctl.commands.sampling import sample
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


def _sheet(columns: Sequence[dict[str, Any]], prompts: Sequence[str], seeds: Sequence[int], demo: Demo) -> Any:
    from attnctl.imaging import grid

    rows = len(prompts)
    return grid(
        [column["images"][i] for i in range(rows) for column in columns],
        rows,
        len(columns),
        [f"{prompt}\nseed {seed}" for prompt, seed in zip(prompts, seeds, strict=True)],
        ["\n".join(panel.controls) or panel.name for panel in PANELS],
        footer=(
            "Green frame: the judge finds both objects, each in its own colour and shape, and nothing else. "
            f"The first {rows} of {demo.prompts * demo.seeds} images, not chosen; CFG {demo.guidance:g}, "
            f"{demo.steps} steps."
        ),
        frames=[GREEN if column["right"][i] else None for i in range(rows) for column in columns],
    )


def _maps_sheet(plain: dict[str, Any], prompts: Sequence[str], seeds: Sequence[int]) -> Any:
    from attnctl.imaging import grid
    from attnctl.mapviews import overlay_word

    maps = plain["maps"]
    tiles = []
    for i, prompt in enumerate(prompts):
        image = plain["images"][i]
        tiles += [image, *(overlay_word(image, maps, word, i) for word in _nouns(prompt))]
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
        k, n = sum(column[name]), len(column[name])
        low, high = wilson(k, n)
        marks[name] = {"k": k, "n": n, "share": k / n, "low": low, "high": high}
    record = column["records"][0]
    sites = [list(names) for names in record.sites]
    return {"name": panel.name, "controls": list(record.controls), "sites": sites, **marks}


def _text(panels: Sequence[dict[str, Any]], images: int, prompts: int) -> str:
    rows = [(panel["name"], *(_share(panel[name]) for name in MARKS)) for panel in panels]
    head = ("", "both colours there", "both bound", "all right")
    notes = (
        f"{images} images a row, {prompts} prompts, the same seeds in all; k/n and 95 % Wilson interval.\n"
        "bound: each object has its own colour and shape; all right: bound, and nothing else in the picture."
    )
    return f"{table(head, rows)}\n\n{notes}"


def _share(mark: dict[str, Any]) -> str:
    return f"{mark['k']}/{mark['n']} {mark['share']:4.0%} [{mark['low']:.0%}, {mark['high']:.0%}]"
