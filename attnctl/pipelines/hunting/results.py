"""What a search found: a head set, the marks of every head as a heat map, and pictures; and sets used together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attnctl.data.pictures import grid
from attnctl.errors import ConfigError
from attnctl.pipelines.hunting.plan import Head, HuntPlan
from attnctl.plans import HeadSet
from attnctl.plans.writing import check_free, publish
from attnctl.processors.pag import SoftPAG

__all__ = ["Hunted", "Round", "compose", "heat_map"]

_CELL = 34  # pixels
_MISSING = (232, 232, 232)


@dataclass(frozen=True)
class Round:
    """Hold one round.

    Attributes:
        chosen: The k best heads, the best first.
        scores: Mean mark of every candidate over the pairs that it has seen; with groups, the mean mark of all pictures
            plus what the candidate adds to it.
        seen: How many pairs that were.
        score: Mean mark of all heads chosen so far, if the plan validates.
    """

    chosen: tuple[Head, ...]
    scores: Mapping[Head, float]
    seen: Mapping[Head, int]
    score: float | None

    def validated(self, score: float) -> Round:
        """Return the round with the mark of the set."""
        return dataclasses.replace(self, score=score)


@dataclass(frozen=True, kw_only=True)
class Hunted:
    """Hold the result of a search.

    Attributes:
        heads: The chosen heads, in the order in which they were chosen.
        pool: All heads that the search began with, in execution order.
        rounds: What each round marked and chose.
        plan: The search.
        baseline: Mean mark without any perturbation, if the plan asks for it.
        change: Norm of the first step's c - p of each head, if the plan prunes.
        images: Pictures that the result rests on.
        generated: Pictures that this process generated in this run.
        seconds: Time of this run.
        pictures: Pictures by label, if the plan shows some.
    """

    heads: HeadSet
    pool: tuple[Head, ...]
    rounds: tuple[Round, ...]
    plan: HuntPlan
    baseline: float | None
    change: Mapping[Head, float]
    images: int
    generated: int
    seconds: float
    pictures: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def control(self, strength: float = 1.0) -> SoftPAG:
        """Return the chosen heads as a control, with the u and the weight of the search times a strength."""
        return compose((self.heads, strength))[0]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as JSON values."""
        return {
            "heads": self.heads.to_dict(), "baseline": self.baseline, "images": self.images,
            "generated": self.generated, "seconds": round(self.seconds, 2), "plan": self.plan.to_dict(),
            "pool": [list(h) for h in self.pool],
            "change": [[*h, round(v, 6)] for h, v in self.change.items()],
            "rounds": [
                {
                    "chosen": [list(h) for h in r.chosen], "score": r.score,
                    "scores": [[*h, v, r.seen[h]] for h, v in r.scores.items()],
                }
                for r in self.rounds
            ],
        }  # fmt: skip

    def heat_map(self, round_: int = 0) -> Image.Image:
        """Draw the marks of a round, a row for each layer and a column for each head; chosen heads are framed."""
        scores = dict(self.rounds[round_].scores)
        zero = self.baseline
        if zero is None or round_ or self.plan.group:
            zero = float(np.mean(list(scores.values())))
        return heat_map(self.pool, scores, self.rounds[round_].chosen, zero)

    def grid(self) -> Image.Image:
        """Lay out the pictures: a row for plain, for each chosen head and for the whole set; a column for each pair.

        Raises:
            ConfigError: The plan asked for no pictures.
        """
        if not self.pictures:
            raise ConfigError("The search drew no pictures: give the plan show=1 or more.")
        n = self.plan.show
        labels = [text for text, _ in self.plan.pairs[:n]]
        tiles = [image for row in self.pictures.values() for image in row]
        return grid(tiles, len(self.pictures), n, list(self.pictures), labels)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the head set, its card, the marks, the heat map and the grid into a folder.

        Raises:
            FileExists: One of the files is there already, and `force` is not set.
        """
        from io import BytesIO

        path = Path(folder)
        files = {path / "hunt_result.json": json.dumps(self.to_dict(), indent=1).encode()}
        images = {f"heat_map_{i + 1}.png": self.heat_map(i) for i in range(len(self.rounds))}
        if self.pictures:
            images["grid.png"] = self.grid()
        for name, image in images.items():
            data = BytesIO()
            image.save(data, "PNG")
            files[path / name] = data.getvalue()
        check_free([*files, path / "attnctl_heads.json"], force=force)
        publish(files, force=force)
        self.heads.save_pretrained(path, force=force)
        return path


def compose(*sets: HeadSet | tuple[HeadSet, float]) -> tuple[SoftPAG, ...]:
    """Return head sets as controls that act together, each with a strength of its own.

    Every set keeps its u and its guidance weight times the strength, so the prediction receives the sum of their
    guidances: pass the result on as `attnctl.control(pipe, *compose((a, 1.0), (b, 0.5)))`. Each costs one pass.

    Raises:
        ConfigError: A set knows no u or weight, or a strength is not a number.
    """
    controls = []
    for entry in sets:
        heads, strength = entry if isinstance(entry, tuple) else (entry, 1.0)
        if not isinstance(heads, HeadSet) or isinstance(strength, bool) or not isinstance(strength, (int, float)):
            raise ConfigError(f"{entry!r} was given; expected a HeadSet, or a HeadSet and its strength.")
        if heads.u is None or heads.scale is None:
            raise ConfigError(
                f"The head set {heads.objective or heads.pairs!r} tells no u and scale: use SoftPAG(heads=..., u=..., "
                "scale=...), or make the set with them."
            )
        controls.append(SoftPAG(heads=heads, u=heads.u, scale=heads.scale * strength))
    return tuple(controls)


def heat_map(pool: Sequence[Head], scores: Mapping[Head, float], chosen: Sequence[Head], zero: float) -> Image.Image:
    """Draw scores as a table of layers and heads: red above `zero`, blue below it, gray where nothing was marked."""
    layers = list(dict.fromkeys(site for site, _ in pool))
    heads = sorted({h for _, h in pool})
    font = ImageFont.load_default(12)
    left = round(max(font.getlength(name) for name in layers)) + 12
    size = (left + _CELL * len(heads) + 8, 24 + _CELL * len(layers) + 26)
    image = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(image)
    span = max((abs(v - zero) for v in scores.values()), default=0.0) or 1.0
    for j, h in enumerate(heads):
        draw.text((left + _CELL * (j + 0.5), 14), str(h), fill=(32, 32, 32), font=font, anchor="mm")
    for i, site in enumerate(layers):
        y = 24 + _CELL * i
        draw.text((left - 6, y + _CELL / 2), site, fill=(32, 32, 32), font=font, anchor="rm")
        for j, h in enumerate(heads):
            score = scores.get((site, h))
            x = left + _CELL * j
            color = _MISSING if score is None else _shade((score - zero) / span)
            draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=color)
            if (site, h) in chosen:
                draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), outline=(0, 0, 0), width=2)
                rank = str(list(chosen).index((site, h)) + 1)
                draw.text((x + _CELL / 2 - 1, y + _CELL / 2 - 1), rank, fill=(0, 0, 0), font=font, anchor="mm")
    text = f"blue {zero - span:.3f}, white {zero:.3f}, red {zero + span:.3f}"
    draw.text((left, size[1] - 14), text, fill=(105, 105, 105), font=font, anchor="lm")
    return image


def _shade(value: float) -> tuple[int, int, int]:
    """Colour a value in [-1, 1]: blue, white, red."""
    fade = round(255 * (1 - min(1.0, abs(value)) * 0.85))
    return (255, fade, fade) if value >= 0 else (fade, fade, 255)
