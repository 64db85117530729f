"""The video sheet of `attnctl demo`: clips of one object, plain and under control, with the judge's marks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnctl.app.commands.common import say, tally
from attnctl.app.demo import Panel, columns_of

__all__ = ["FILE", "MARKS", "judged", "make"]

FILE = "demo-video"
MARKS = {"present": "object there", "direction": "direction", "right": "all right"}
PROMPTS_SEED = 2025
GREEN = (30, 150, 70)
_EVERY = 3  # frames between those shown
_PRESENT = 0.9  # of the frames


def make(
    path: Path, *, videos: int, rows: int, steps: int, guidance: float, seed: int, command: str, force: bool
) -> dict[str, Any]:
    """Generate `videos` clips for each panel, judge them, and draw the first `rows`, two strips each."""
    from attnctl.data.progress import Progress
    from attnctl.data.record import save_image
    from attnctl.data.specs import parse_control
    from attnctl.pipelines.generate import Call, sample
    from attnctl.pipelines.models import load
    from attnctl.shapes.motion import clip_prompts

    panels = columns_of("shapes:video")
    prompts, seeds = clip_prompts(PROMPTS_SEED, videos), tuple(range(seed, seed + videos))
    loaded = load("shapes:video")
    say(f"shapes:video: {len(panels)} panels of {videos} videos, {steps} steps, on {loaded.pipe.device}")
    started, columns = time.perf_counter(), []
    with Progress(len(panels) * steps, "step", "shapes:video") as bar:
        for panel in panels:
            bar.describe(panel.name)
            call = Call(
                prompts=prompts,
                seeds=seeds,
                steps=steps,
                guidance=guidance,
                controls=tuple(map(parse_control, panel.controls)),
                command=command,
            )
            columns.append(sample(loaded, call, bar.update))
    seconds = time.perf_counter() - started
    marks = [[judged(v, p) for v, p in zip(column.videos, prompts, strict=True)] for column in columns]
    shown = min(rows, videos)
    save_image(
        _strips(panels, columns, marks, prompts[:shown], seeds, videos, guidance, steps),
        path,
        [replace(column.record, shows=tuple(range(shown))) for column in columns],
        force=force,
    )
    results = [_panel(panel.name, column, row) for panel, column, row in zip(panels, columns, marks, strict=True)]
    for panel, result in zip(panels, results, strict=True):
        for control, names in zip(panel.controls, result["sites"], strict=True):
            say(f"{control} acts on {', '.join(names)}")
    return {
        "model": "shapes:video",
        "pictures": [str(path)],
        "seconds": round(seconds, 1),
        "videos_per_panel": videos,
        "panels": results,
    }


def judged(video: Sequence[Any], prompt: str) -> dict[str, Any]:
    """Mark a clip of the shapes world, and measure its motion in pixels a frame.

    Raises:
        JudgeError: the prompt or the size of the frames is another.
    """
    import numpy as np

    from attnctl.data.motion import measure
    from attnctl.shapes.judge_video import judge_clip

    frames = np.stack([np.asarray(frame.convert("RGB")) for frame in video])
    match = judge_clip(frames).matches(prompt)
    return {
        "present": match.tracks[0].present >= _PRESENT,
        "direction": bool(match.direction[0]),
        "right": bool(match.right),
        "motion": measure(frames).motion_mean,
    }


def _panel(name: str, column: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    panel: dict[str, Any] = {"name": name, "controls": list(column.record.controls)}
    panel["sites"] = [list(names) for names in column.record.sites]
    for mark in MARKS:
        panel[mark] = tally([row[mark] for row in rows])
    panel["motion"] = round(sum(row["motion"] for row in rows) / len(rows), 3)
    return panel


def _strips(
    panels: Sequence[Panel],
    columns: Sequence[Any],
    marks: Sequence[Sequence[dict[str, Any]]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    videos: int,
    guidance: float,
    steps: int,
) -> Any:
    from attnctl.data.pictures import grid

    tiles, labels, frames = [], [], []
    for i, prompt in enumerate(prompts):
        for panel, column, row in zip(panels, columns, marks, strict=True):
            shown = column.videos[i][::_EVERY]
            tiles += shown
            labels.append(f"{prompt}\nseed {seeds[i]}" if not panel.controls else "\n".join(panel.controls))
            frames += [GREEN if row[i]["right"] else None] * len(shown)
    across = len(tiles) // len(labels)
    return grid(
        tiles,
        len(labels),
        across,
        labels,
        [f"frame {i * _EVERY}" for i in range(across)],
        footer=(
            "Green frame: the judge finds the object in its colour and shape, moving as asked. The first "
            f"{len(prompts)} of {videos} videos of shapes:video, not chosen; CFG {guidance:g}, {steps} steps."
        ),
        frames=frames,
    )
