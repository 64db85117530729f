"""The folder of a reproduction: finished pictures with their records, and what each took.

Pictures of one pipeline call appear together or not at all. A run that was killed leaves whole pictures and their
records, and the next one skips those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnctl.data.clips import open_clip
from attnctl.data.picture_files import read_picture
from attnctl.data.record import Record, RecordError, png_bytes, read, sidecar
from attnctl.pipelines.hunting.log import HuntLog
from attnctl.pipelines.reproduce.prompts import Asked
from attnctl.pipelines.reproduce.recipes import Experiment, Variant
from attnctl.plans.writing import publish, recover

__all__ = ["Piece", "Store"]

_HEADER = "reproduce.json"


@dataclass(frozen=True)
class Piece:
    """One finished picture, video or edit.

    Attributes:
        asked: What was asked for.
        path: Its PNG, or the folder of an edit's frames.
        seconds: What it took; None where a run was killed before it wrote that down.
        gigabytes: Most memory of the accelerator that was in use; None likewise, and on a CPU.
        frames: Frames in the PNG: 1 for a picture.
    """

    asked: Asked
    path: Path
    seconds: float | None
    gigabytes: float | None
    frames: int = 1

    def images(self) -> list[Image.Image]:
        """Read the picture, or the frames of a video or an edit."""
        if self.path.is_dir():
            clip = open_clip(self.path)
            return [Image.fromarray(frame) for frame in clip.read(range(clip.count))]
        image = read_picture(self.path, RecordError)
        if self.frames == 1:
            return [image]
        columns = min(8, self.frames)
        width, height = image.width // columns, image.height // -(-self.frames // columns)
        corners = [((i % columns) * width, (i // columns) * height) for i in range(self.frames)]
        return [image.crop((x, y, x + width, y + height)) for x, y in corners]

    def video(self) -> np.ndarray:
        """Return the frames, uint8 RGB [n, height, width, 3]."""
        return np.stack([np.asarray(image.convert("RGB")) for image in self.images()])


class Store:
    """The folder of one experiment.

    Args:
        root: Folder of all reproductions.
        experiment: The experiment.
        about: What must be the same whenever the folder is used again: the model, seeds, prompts.
        rank: Number of this process.

    """

    def __init__(self, root: Path, experiment: Experiment, about: Mapping[str, Any], rank: int = 0) -> None:
        self.experiment = experiment
        self.folder = self.place(root, experiment)
        self._claim = about, rank
        self.log = HuntLog(None, about)  # in memory, until the folder is claimed

    def claim(self, *, fresh: bool = True) -> None:
        """Make the folder this experiment's own, or see that it is.

        Args:
            fresh: Whether a folder that holds nothing yet is claimed too.

        Raises:
            PlanError: The folder holds pictures of other settings.
        """
        if fresh or (self.folder / _HEADER).exists():
            self.log.close()
            self.log = HuntLog(self.folder, *self._claim, header=_HEADER, noun="reproduction")

    @staticmethod
    def place(root: Path, experiment: Experiment) -> Path:
        """Name the folder of an experiment."""
        return root / f"{experiment.method}{'-toy' if experiment.toy else ''}" / experiment.name

    def path(self, variant: Variant, one: Asked) -> Path:
        """Name the file of a picture, or the folder of an edit's frames."""
        name = f"{one.index:06d}"
        return self._folder(variant) / (name if self.experiment.edits else f"{name}.png")

    def _folder(self, variant: Variant) -> Path:
        return self.folder / re.sub(r"[^a-z0-9.]+", "-", variant.name.lower())

    def has(self, variant: Variant, one: Asked) -> bool:
        """Tell whether a picture is there with its record; what is damaged counts as missing."""
        path = self.path(variant, one)
        if self.experiment.edits:
            return path.is_dir() and path.with_suffix(".json").is_file()
        if not path.is_file():
            return False
        try:
            (record,) = read(sidecar(path))
        except (RecordError, ValueError):
            return False
        return record.prompts[record.shows[0]] == one.prompt and record.seeds[record.shows[0]] == one.seed

    def finished(self, variant: Variant, wanted: Sequence[Asked]) -> int:
        """Count the pictures of a variant that are there; what a killed run left half written goes first."""
        recover(self._folder(variant))
        return sum(self.has(variant, one) for one in wanted)

    def put(self, variant: Variant, unit: Sequence[tuple[Asked, Image.Image, int]], record: Record) -> None:
        """Write the pictures of one pipeline call: (what was asked, picture, its place in the call)."""
        files: dict[Path, bytes] = {}
        for one, image, place in unit:
            mine = replace(record, shows=(place,))
            path = self.path(variant, one)
            files[path] = png_bytes(image, mine)
            files[sidecar(path)] = (json.dumps(mine.to_dict(), indent=2, allow_nan=False) + "\n").encode()
        publish(files, force=True)  # what is there is damaged, or it would have been skipped

    def note(self, variant: Variant, one: Asked, seconds: float, gigabytes: float | None) -> None:
        """Write down what a picture took."""
        marks = [round(seconds, 4), *([] if gigabytes is None else [round(gigabytes, 4)])]
        self.log.add(f"{variant.name}/{one.index}", {"marks": marks})

    def taken(self, variant: Variant, one: Asked) -> tuple[float | None, float | None]:
        """Return the seconds and gigabytes that a picture took, as far as they are known."""
        marks = self.log.records.get(f"{variant.name}/{one.index}", {}).get("marks", [])
        return (marks[0] if marks else None), (marks[1] if len(marks) > 1 else None)

    def seconds(self) -> list[list[float]]:
        """Return for each variant the seconds of its pictures, as far as they are known."""
        records = self.log.records.items()
        return [
            [r["marks"][0] for key, r in records if key.rpartition("/")[0] == variant.name and r["marks"]]
            for variant in self.experiment.variants
        ]

    def pieces(self, variant: Variant, wanted: Sequence[Asked]) -> Iterator[Piece]:
        """Yield the finished pictures of a variant."""
        frames = 1 if self.experiment.edits else int(self.experiment.options.get("num_frames", 1))
        for one in wanted:
            if self.has(variant, one):
                yield Piece(one, self.path(variant, one), *self.taken(variant, one), frames)
