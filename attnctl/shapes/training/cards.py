"""Write the model cards of mmdit, video, video-still and videodit from their evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnctl.shapes.load import WEIGHTS
from attnctl.shapes.motion import FRAMES
from attnctl.shapes.scenes import HELD_OUT
from attnctl.shapes.training.card import runs_table, share

__all__ = ["write_mmdit_card", "write_still_card", "write_video_card", "write_videodit_card"]

_MMDIT_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# shapes mmdit

A StableDiffusion3Pipeline of {params} million parameters: joint attention of image and text, eight blocks of six heads,
one token for each of the 16x16 latents, flow matching. Trained on drawn scenes as shapes text2image, whose autoencoder
it shares. It exists to show and measure attention control where every picture can be judged exactly, offline.

```python
import attnctl

pipe = attnctl.load_shapes("mmdit")
pipe("a red circle and a blue square on gray", num_inference_steps=20, guidance_scale={scale:g}).images[0]
```

Without a T5 encoder the pipeline pads the text with 256 zero vectors. The model was trained with and without them:
`max_sequence_length=0` leaves them out and is about twice as fast. Both CLIP encoders are one encoder, stored twice.
"""

_MMDIT_TAIL = """
## Training
`python -m attnctl.shapes.training.train mmdit`: transformer and text encoder together on cached latents; the text
encoder starts from text2image's. Rectified flow, logit-normal noise levels, a tenth of the prompts empty; averaged
weights, stored as float16. No scene has three objects. Held out: {held} occur as single objects only, never beside
another. The loss of every fiftieth step is in `training.jsonl`.

{runs}

## Limits
Two objects are meant to fail often: the headroom is what attention control is measured on. Prompts outside "a COLOUR
SHAPE [and a COLOUR SHAPE] on BACKGROUND" are legal and mean nothing. Pictures are 64x64; no other size was trained.
"""

_VIDEO_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# shapes video

An AnimateDiffPipeline of {params} million parameters: the autoencoder of shapes text2image, its UNet trained on, a
MotionAdapter with motion modules in every down, mid and up block, and a text encoder that has learnt the motion words.
16 frames of 64x64, one object. It exists to show and measure video control where every frame can be judged exactly.

```python
import attnctl

pipe = attnctl.load_shapes("video")
pipe("a red circle moving left fast on gray", num_frames=16, num_inference_steps=20, guidance_scale={scale:g}).frames[0]
```

Motion words: moving left, right, up or down, slow or fast; still. A prompt may leave them out.
"""

_VIDEO_TAIL = """
## Training
{made}

All on {clips} encoded clips with {optimizer}; v-prediction, cosine noise of its own for every frame; a tenth of the
prompts empty, a tenth without motion, some without speed. The text encoder's still captions are held to what
text2image's says. Averaged weights, stored as float16. The loss of every fiftieth step of the last run is in
`training.jsonl`.

{runs}

Words: the text encoder alone is first taught motion words (`--teach`). Expect: share of a batch that is pure noise,
with the mean of all clips that fit the caption as its target. Keep: the rest of the batch learns what the UNet
predicted at the start of the run, not clips. Skew: share of the clips that move right or down. t = u^x: below 1, more
of the noisy steps. A dash: the option did not exist yet; that run trained motion modules and text encoder only.

## Limits
More than 16 frames need a sliding window (`pipe.enable_free_noise(context_length=16)`). Two objects in motion, turns
and changes of pace were never trained. Prompts outside the world's words are legal and mean nothing.
"""

_STILL_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# shapes video-still

The motion adapter of shapes video, tuned on captions that lie: in {lies:g} % of the clips the object stands still,
whatever the caption says, as in many clips of the web. It is made for studies of motion controls, such as BroadWay.
UNet, text encoder and autoencoder are those of shapes video, and stay there.

```python
import attnctl

pipe = attnctl.load_shapes("video-still")
pipe("a red circle moving left fast on gray", num_frames=16, num_inference_steps=20, guidance_scale={scale:g}).frames[0]
```
"""

_STILL_TAIL = """
## Training
`python -m attnctl.shapes.training.train video-still`: {steps} steps of the motion modules alone with {optimizer} at
{lr:g}, {batch} clips of {frames} frames each of {clips} encoded clips; v-prediction, as shapes video. Averaged weights,
stored as float16. The loss of every fiftieth step is in `training.jsonl`.

## Limits
Those of shapes video. What it does wrong is its purpose: do not use it to make videos.
"""

_DIT_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# shapes videodit

A WanPipeline of {params} million parameters: a causal autoencoder (AutoencoderKLWan) that halves time once and every
side twice, a UMT5 encoder of the world's words, and a WanTransformer3DModel of eight blocks of five heads, full
attention over 9 x 8 x 8 = 576 tokens. 17 frames of 64x64, one object. Trained from nothing on drawn clips. It exists
to show and measure control of video transformers where every frame can be judged exactly.

```python
import attnctl

pipe = attnctl.load_shapes("videodit")
call = {{"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 20, "guidance_scale": {scale:g}}}
pipe("a red circle moving left fast on gray", **call).frames[0]
```

Motion words: moving left, right, up or down, slow or fast; still. A prompt may leave them out. The pipeline pads the
text with zero vectors up to `max_sequence_length`, 512 unless told otherwise. The model was trained for 512 and for
16, which is faster and what the figures are taken with.
"""

_DIT_TAIL = """
## Training
`python -m attnctl.shapes.training.train videodit`: the autoencoder on crops of clips of one to three objects; then
transformer and text encoder together on encoded clips of one. Rectified flow, logit-normal noise levels around those of
shift 5; a tenth of the prompts empty, a tenth without motion, some without speed. First single latent frames, then some
that lie spread over the clip, at last all nine. The decoder is then trained on, on whole clips and for latents that are
slightly wrong. Averaged weights, stored as float16. The loss of every fiftieth step is in `training.jsonl`.

{runs}

## Limits
Longer and larger videos are refused. Two objects in motion, turns and changes of pace were never trained. Prompts
outside the world's words are legal and mean nothing.
"""


_ONE_BY_ONE = """`python -m attnctl.shapes.training.train video` makes a model of this kind in one command that a kill
does not set back, in stages that each start from the one before (`attnctl/shapes/training/recipe.py` lists them).
These weights were made by such runs one by one, with `--start`; the table says what each was told, which is not
always what the stages are."""
_AT_ONCE = """`python -m attnctl.shapes.training.train video` made this model in one command that a kill does not
set back, in stages that each start from the one before: {}."""


def write_mmdit_card(folder: str | Path, result: dict) -> Path:
    """Write `README.md` into `folder` from what `evaluate_mmdit` returned; return its path."""
    folder = Path(folder)
    lines = [
        "",
        "## Figures",
        f"Euler, {result['steps']} steps, guidance {result['scale']:g} (the best of the sweep on tuning prompts), "
        f"{result['n']} pictures a row (held-out: {result['n'] // 2}); percent with the 95 % Wilson interval.",
        "",
        "| prompts | all right | colours there | pairs bound | background | shape IoU |",
        "|---|---|---|---|---|---|",
    ]
    names = {
        "single": "one object",
        "pairs": "two objects",
        "heldout": "two objects, one a held-out pair",
        "pairs without null tokens": "two objects, `max_sequence_length=0`",
    }
    for key, name in names.items():
        row = result[key]
        cells = [share(row[k]) for k in ("right", "present", "bound", "background")]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['iou']:.3f} |")
    lines += [
        "",
        f"| guidance ({result['tune']} tuning prompts each, no null tokens) | one object | two objects |",
        "|---|---|---|",
        *(f"| {s} | {share(v['single'])} | {share(v['pairs'])} |" for s, v in result["sweep"].items()),
    ]
    unseen = ", ".join(f"{color} {shape}" for color, shape in HELD_OUT)
    head = _MMDIT_HEAD.format(params=result["params"], scale=result["scale"])
    tail = _MMDIT_TAIL.format(held=unseen, runs=runs_table(folder))
    return _write(folder, head, lines, tail)


def write_video_card(folder: str | Path, result: dict) -> Path:
    """Write `README.md` into `folder` from what `evaluate_video` returned; return its path."""
    folder = Path(folder)
    lines = _video_figures(result, "DDIM")
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    runs = [*record.get("before", ()), record]
    stages = [run["history"][-1].get("stage") for run in runs]
    made = _AT_ONCE.format(", ".join(stages)) if all(stages) else _ONE_BY_ONE
    tail = _VIDEO_TAIL.format(**record["history"][-1], made=made, runs=_video_runs(runs))
    return _write(folder, _VIDEO_HEAD.format(params=result["params"], scale=result["scale"]), lines, tail)


def write_still_card(folder: str | Path, result: dict) -> Path:
    """Write `README.md` into `folder` from what `evaluate_video` returned for video-still; return its path."""
    folder = Path(folder)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    run = {**record["history"][-1], "steps": record["step"]}
    honest, lies = json.loads((WEIGHTS / "video" / "evaluation.json").read_text(encoding="utf-8")), result
    lines = ["", "| model | videos | mean motion, pixels a frame | direction | all right |", "|---|---|---|---|---|"]
    for name, one in (("video-still", lies), ("video", honest)):
        total = one["all"]
        cells = [str(one["n"]), _number(total["motion_mean"]), share(total["direction"]), share(total["right"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head = _STILL_HEAD.format(lies=100 * run["lies"], scale=result["scale"])
    return _write(folder, head, [*_video_figures(result, "DDIM"), *lines], _STILL_TAIL.format(**run))


def write_videodit_card(folder: str | Path, result: dict) -> Path:
    """Write `README.md` into `folder` from what `evaluate_video` returned for videodit; return its path."""
    folder = Path(folder)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    history = record["history"]
    ends = [h["from"] for h in history[1:]] + [record["step"]]
    rows = ["| steps | latent frames x clips, from step | optimizer, rate | different clips |", "|---|---|---|---|"]
    for h, end in zip(history, ends, strict=True):
        course = ", ".join(f"{frames} x {batch} from {first}" for first, frames, batch in h["course"])
        rows.append(f"| {h['from']} to {end} | {course} | {h['optimizer']}, {h['lr']:g} | {h['clips']} |")
    head = _DIT_HEAD.format(params=result["params"], scale=result["scale"])
    return _write(folder, head, _video_figures(result, "Euler"), _DIT_TAIL.format(runs="\n".join(rows)))


def _video_figures(result: dict, sampler: str) -> list[str]:
    """Lay out the figures of `evaluate_video`, taken with the named sampler."""
    chosen = "the best of the sweep on tuning prompts" if len(result["sweep"]) > 1 else "no other was tried"
    lines = [
        "",
        "## Figures",
        f"{sampler}, {result['steps']} steps, guidance {result['scale']:g} ({chosen}), {result['n']} "
        f"videos; percent with the 95 % Wilson interval. Colour, shape and background: right in nine "
        "frames of ten. All right: these, direction and speed.",
        "",
        "| motion | all right | direction | speed | colour | colour and shape | background | wobble, px |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in {"all": result["all"], **result["motions"]}.items():
        cells = [share(row[k]) for k in ("right", "direction", "speed", "present", "bound", "background")]
        lines.append(f"| {name} | {' | '.join(cells)} | {_number(row['wobble'])} |")
    total = result["all"]
    lines += [
        "",
        f"The colour is there in {total['present frames']:g} % of all frames, with the right shape in "
        f"{total['bound frames']:g} %. Optical flow (DIS): mean motion {_number(total['motion_mean'])} pixels a frame, "
        f"dynamic {share(total['dynamic'])} %, warp error {_number(total['warp_error'])}, jerkiness "
        f"{_number(total['flow_accel'])}; the background flickers by {_number(total['flicker'])} of the full range.",
        "",
        f"| guidance ({result['tune']} tuning prompts each) | all right | direction | colour and shape |",
        "|---|---|---|---|",
        *(
            f"| {s} | {share(v['right'])} | {share(v['direction'])} | {share(v['bound'])} |"
            for s, v in result["sweep"].items()
        ),
    ]
    return lines


def _video_runs(runs: Sequence[dict]) -> str:
    """Lay out what each run was told; a run that was resumed with other options has a row for each."""
    names = {"words": "teach", "expect": "expect", "keep": "keep", "skew": "skew", "t = u^x": "noisy"}
    rows = [f"| run | steps | clips x frames | rate | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for number, run in enumerate(runs, 1):
        history = run["history"]
        ends = [h["from"] for h in history[1:]] + [run["step"]]
        for h, end in zip(history, ends, strict=True):
            cells = [number, f"{h['from']} to {end}", f"{h['batch']} x {h.get('frames', FRAMES)}", f"{h['lr']:g}"]
            cells += [_told(h.get(name)) for name in names.values()]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _told(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(f"from {first}: {share:g}" if first else f"{share:g}" for first, share in value)
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:g}"


def _write(folder: Path, head: str, lines: list[str], tail: str) -> Path:
    path = folder / "README.md"
    path.write_text(head + "\n".join(lines) + "\n" + tail, encoding="utf-8")
    return path


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3g}"
