"""The stages in which the shapes video model is made, and how far a folder has got with them.

Motion is learnt in three ways. On clips the motion modules learn how things move, but words of motion hardly count:
where an object happens to be is a far larger error. So the text encoder is taught the words, and the denoiser what a
caption lets expect, on few frames of many clips, while the rest of each batch keeps what it knew (see `words` and
`expected`). Clips again, with a share of the expected, join the two. Each stage starts from the averaged weights of the
one before, in a folder of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attnctl.errors import ConfigError
from attnctl.shapes.motion import FRAMES
from attnctl.shapes.training.loop import Plan, mend_checkpoint, read_history, read_step

__all__ = ["STAGES", "Stage", "first_unfinished"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Say what one stage learns from, and for how long.

    Attributes:
        name: Name of its folder.
        steps: Training steps.
        batch: Clips in a batch.
        frames: Frames of each, spread over the clip.
        lr: Rate on the plateau.
        cooldown: Last part of the steps, where the rate falls to 0.
        noisy: Below 1, more of the noisy steps: t = u ** noisy.
        skew: Share of clips that move right or down only.
        expect: Share of a batch that learns the mean of what fits its caption.
        keep: Whether the rest of the batch learns what the UNet knew when the stage began.
        teach: Steps in which the text encoder alone is first taught motion words.
        anchor: Weight of what keeps captions without motion as they are.
    """

    name: str
    steps: int
    batch: int = 4
    frames: int = FRAMES
    lr: float = 2e-3
    cooldown: float = 0.5
    noisy: float = 0.5
    skew: float = 0.0
    expect: float = 0.0
    keep: bool = False
    teach: int = 0
    anchor: float = 0.3

    def scaled(self, scale: float) -> Stage:
        """Return the stage with all its steps multiplied; what has any keeps at least one."""
        return replace(self, steps=_times(self.steps, scale), teach=_times(self.teach, scale))

    def plan(self, common: Plan, scale: float = 1.0) -> Plan:
        """Return the plan of a stage that `scaled` has shortened: what all stages share, with its length and rates."""
        warmup = _times(common.warmup, scale)
        return replace(common, steps=self.steps, warmup=warmup, lr=self.lr, cooldown=self.cooldown)

    def options(self) -> dict[str, Any]:
        """Return what the training's loss is told."""
        names = ("batch", "frames", "noisy", "skew", "expect", "keep", "anchor")
        return {name: getattr(self, name) for name in names}

    def facts(self) -> dict[str, Any]:
        """Return what the stage's checkpoint remembers of it."""
        shares = {"skew": [[0, self.skew]], "expect": [[0, self.expect]]}
        return {**self.options(), **shares, "teach": self.teach, "stage": self.name}


STAGES = (
    Stage(name="move", steps=2200, anchor=1.0),
    Stage(
        name="direct", steps=400, batch=9, frames=4, cooldown=0.3, noisy=1.0, skew=0.4, expect=0.67, keep=True,
        teach=600,
    ),
    Stage(name="join", steps=550, cooldown=0.7, expect=0.25),
    Stage(name="settle", steps=1200, cooldown=0.6, expect=0.25),
    Stage(name="finish", steps=500, lr=1e-3, cooldown=0.9, skew=0.3, expect=0.25),
)  # fmt: skip


def first_unfinished(out: Path, stages: Sequence[Stage], plans: Sequence[Plan]) -> int:
    """Return the number of the first stage in `out` that is not complete; `len(stages)` where all are.

    Raises:
        ConfigError: a stage in `out` was trained with other settings, or one that a later one goes back to is gone.
    """
    states = [_finished(out / stage.name, stage, plan) for stage, plan in zip(stages, plans, strict=True)]
    first = next((n for n, done in enumerate(states) if not done), len(states))
    later = [
        stage.name for stage, done in zip(stages[first + 1 :], states[first + 1 :], strict=True) if done is not None
    ]
    if later:
        raise ConfigError(
            f"{out / later[0]} was trained already, but {out / stages[first].name}, which it goes back to, is not "
            f"complete: delete {out / later[0]}, or pass another --out."
        )
    return first


def _finished(folder: Path, stage: Stage, plan: Plan) -> bool | None:
    """Tell whether a stage is complete; None where it has not left a checkpoint yet."""
    if not mend_checkpoint(folder):
        return None
    # How often it is saved changes no weight.
    wanted = json.loads(json.dumps({**asdict(plan), **stage.facts()})) | {"save_every": None}
    recorded = read_history(folder)[-1] | {"save_every": None}
    for name, value in wanted.items():
        if recorded.get(name) != value:
            raise ConfigError(
                f"{folder} was trained with {name}={recorded.get(name)!r}, and {value!r} is asked for now: repeat the "
                "options that it was begun with, or pass another --out."
            )
    return read_step(folder) >= stage.steps


def _times(steps: int, scale: float) -> int:
    return max(1, round(steps * scale)) if steps else 0
