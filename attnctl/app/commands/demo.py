"""`attnctl demo`: what the methods do to pictures of the shipped models, on one sheet and in one table. Offline."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnctl.app.commands import demo_sheets
from attnctl.app.commands.common import Common, Result, UsageError, importing, say, table
from attnctl.app.panels import PANELS, Recorded
from attnctl.data.files import below
from attnctl.plans.writing import check_free

__all__ = ["Demo"]

FILE = "demo.png"
_PARTS = 100  # of the bar
_FOOTER = (
    "Made now, by small models that come with attnctl; both pictures of a pair begin with the same noise. Green frame: "
    "what was asked; red: not. The pairs are chosen: early ones of each study in which the control mends what the "
    "plain picture lacks. How often it does is the study's figure above them."
)
_NOTES = (
    "Plain and with: percent, as recorded by the study in the last column on pictures that it was not tuned on.\n"
    "Gain: points, with their 95 % interval. n: pictures, clips, nouns or scenes."
)


def _of_all(default: object) -> Any:
    return tyro.conf.arg(metavar="N", help_behavior_hint=f"(default: {default}; with --all)")


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """Show what the methods do: one sheet of pictures, and a table of what studies have recorded."""

    all: bool = False
    """Also compare the methods on many prompts: grids of images, and tables of what the judge finds. Takes minutes."""

    prompts: Annotated[int | None, _of_all(16)] = None
    """How many prompts, two objects each."""

    seeds: Annotated[int | None, _of_all(3)] = None
    """How many images per prompt."""

    steps: Annotated[int | None, _of_all(20)] = None
    """Denoising steps."""

    guidance: Annotated[float | None, _of_all(3.0)] = None
    """Classifier-free guidance scale, the same in every panel."""

    rows: Annotated[int | None, _of_all(5)] = None
    """Rows of the grids."""

    batch: Annotated[int | None, _of_all(32)] = None
    """Images per pipeline call."""

    seed: Annotated[int | None, _of_all(0)] = None
    """Seed of the first image."""

    out: Path = Path("out")
    """Folder for the pictures and their records."""

    force: bool = False
    """Overwrite files that are already there."""

    def run(self, command: str) -> Result:
        """Make the sheet, and with `all` the grids; tabulate."""
        size = self._size()
        names = [FILE.removesuffix(".png"), *(demo_sheets.FILES if self.all else ())]
        check_free([below(self.out, f"{n}{end}") for n in names for end in (".png", ".json")], force=self.force)

        importing()
        began = time.perf_counter()
        path = below(self.out, FILE)
        panels = _make(path, command, self.force)
        done = demo_sheets.make(size, self.out, command, force=self.force) if self.all else []
        seconds = time.perf_counter() - began
        pictures = [str(path), *(p for one in done for p in one["pictures"])]
        say(f"{seconds:.0f} s; pictures in {', '.join(pictures)}")
        data = {"seconds": round(seconds, 1), "picture": str(path), "panels": panels}
        if self.all:
            data |= {"prompts": size.prompts, "steps": size.steps, "guidance": size.guidance, "sheets": done}
        tables = [_table(), *([demo_sheets.text(done)] if done else [])]
        return Result(data, "\n\n".join(tables))

    def _size(self) -> demo_sheets.Size:
        """Read how much `--all` makes, and refuse what belongs to it without it."""
        given = {f.name: getattr(self, f.name) for f in fields(demo_sheets.Size)}
        given = {name: value for name, value in given.items() if value is not None}
        if given and not self.all:
            flags = " and ".join(f"--{name}" for name in given)
            raise UsageError(f"{flags} {'are' if len(given) > 1 else 'is'} for --all: add it, or leave them out.")
        for name, value in given.items():
            least = 0 if name == "seed" else 1
            if name != "guidance" and value < least:
                raise UsageError(f"--{name} is a whole number from {least} on, got {value}.")
        return demo_sheets.Size(**given)


def _make(path: Path, command: str, force: bool) -> list[dict[str, Any]]:
    """Make every panel, and draw the sheet."""
    from attnctl.app.commands.demo_shares import make_all
    from attnctl.data.card_sheets import Card, card_sheet
    from attnctl.data.progress import Progress
    from attnctl.data.record import save_image

    cards: list[Card] = []
    records: list[Any] = []
    entries: list[dict[str, Any]] = []
    whole = sum(panel.seconds for panel in PANELS)
    with Progress(_PARTS, "part", "demo") as bar:
        passed = 0.0  # seconds that the finished steps take on one core, roughly

        def tick(seconds: float) -> None:
            nonlocal passed
            if not passed:
                bar.ready()  # the imports are over
            passed += seconds
            if passed > seconds:
                bar.update(min(_PARTS, round(_PARTS * passed / whole)) - bar.count)

        for panel, made in zip(PANELS, make_all(PANELS, command, tick, bar.describe), strict=True):
            cards.append(Card(panel.title, _measured(panel.recorded), panel.tiles, made.pairs))
            records += made.records
            frames = [[_NAMES.get(frame) for frame in pair.frames] for pair in made.pairs]
            facts = {"title": panel.title, "model": panel.model, "control": panel.control, "frames": frames}
            entries.append(facts | {"recorded": asdict(panel.recorded)})
    save_image(card_sheet(cards, footer=_FOOTER), path, records, force=force)
    return entries


_NAMES = {(30, 150, 70): "as asked", (200, 60, 50): "not as asked", None: None}


def _measured(recorded: Recorded) -> str:
    """Say what a study recorded in one line: "all right: 27.1 to 55.7 %, +28.6 [+22.4, +34.9], n 192"."""
    gain, low, high = recorded.gain
    shares = f"{recorded.plain:g} to {recorded.control:g} %"
    return f"{recorded.mark}: {shares}, {gain:+g} [{low:+g}, {high:+g}], n {recorded.n}"


def _table() -> str:
    rows = []
    for panel in PANELS:
        r = panel.recorded
        gain = f"{r.gain[0]:+.1f} [{r.gain[1]:+.1f}, {r.gain[2]:+.1f}]"
        name = panel.title.partition(":")[0]
        rows.append((name, r.mark, f"{r.plain:.1f} %", f"{r.control:.1f} %", gain, r.n, r.command))
    return table(("panel", "measured", "plain", "with", "gain", "n", "recorded by"), rows) + f"\n\n{_NOTES}"
