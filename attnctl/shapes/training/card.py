"""Write the model card of a shapes model from its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from attnctl.shapes.scenes import HELD_OUT

__all__ = ["runs_table", "share", "write_card"]

_HEAD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# shapes text2image

A StableDiffusionPipeline of {params} million parameters, trained from nothing on drawn scenes: one coloured shape,
at times two, on a plain background, 64x64. It exists to show and measure attention control where every picture can be
judged exactly, offline. It knows 30 colour-shape pairs and nothing else.

```python
import attnctl

pipe = attnctl.load_shapes("text2image")
pipe("a red circle and a blue square on gray", num_inference_steps=20, guidance_scale={scale:g}).images[0]
```
"""

_TAIL = """
## Training
`python -m attnctl.shapes.training.train text2image`: autoencoder (64x64x3 to 16x16x4), then text encoder and UNet
together on cached latents, v-prediction, cosine noise, a tenth of the prompts empty; averaged weights, stored as
float16.
No scene has three objects. Held out: {held} occur as single objects only, never beside
another. The loss of every fiftieth step is in `training.jsonl`.

{runs}

Two-object scenes were to be an eighth; at that share the model put both objects right in 14 % of pictures after 2,000
steps and rose slowly, so the share was raised for a while. `--pairs 0.125,2000:0.5,3000:0.15`, the default, says so.

## Limits
Two objects are meant to fail often: the headroom is what attention control is measured on. Prompts outside "a COLOUR
SHAPE [and a COLOUR SHAPE] on BACKGROUND" are legal and mean nothing. Pictures are 64x64; no other size was trained.
"""


def write_card(folder: str | Path, result: dict) -> Path:
    """Write `README.md` into `folder` from what `evaluate` returned; return its path."""
    folder = Path(folder)
    lines = [
        "",
        "## Figures",
        f"DDIM, {result['steps']} steps, guidance {result['scale']:g} (the best of the sweep on tuning prompts), "
        f"{result['n']} pictures a row (held-out: {result['n'] // 2}); percent with the 95 % Wilson interval.",
        "",
        "| prompts | all right | colours there | pairs bound | background | shape IoU |",
        "|---|---|---|---|---|---|",
    ]
    words = (
        "All right: every object is there with its own colour and shape, and nothing else is. Colours there: every "
        "colour asked for covers some region. Pairs bound: as all right, but more objects than asked for are let pass."
    )
    names = {"single": "one object", "pairs": "two objects", "heldout": "two objects, one a held-out pair"}
    for key, name in names.items():
        row = result[key]
        cells = [share(row[k]) for k in ("right", "present", "bound", "background")]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['iou']:.3f} |")
    lines += ["", words]
    lines += ["", "| guidance (tuning prompts) | one object | two objects |", "|---|---|---|"]
    lines += [f"| {s} | {share(v['single'])} | {share(v['pairs'])} |" for s, v in result["sweep"].items()]
    maps = result["noun_maps"]
    lines += [
        "",
        f"The noun's cross-attention map (second half of the run, single objects that came out right) peaks inside its "
        f"object: mid block {share(maps['mid'])}, up blocks {share(maps['up'])}, both together "
        f"{share(maps['mid+up'])}; a random place would be inside in {maps['chance']:g} %.",
    ]
    unseen = ", ".join(f"{color} {shape}" for color, shape in HELD_OUT)
    head = _HEAD.format(params=result["params"], scale=result["scale"])
    path = folder / "README.md"
    path.write_text(
        head + "\n".join(lines) + "\n" + _TAIL.format(held=unseen, runs=runs_table(folder)), encoding="utf-8"
    )
    return path


def runs_table(folder: Path) -> str:
    """Say from the training record how many steps were made with which share of two-object scenes."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    history = record["history"]
    ends = [h["from"] for h in history[1:]] + [record["step"]]
    rows = ["| steps | batch | optimizer, rate | two-object scenes | different scenes |", "|---|---|---|---|---|"]
    for h, end in zip(history, ends, strict=True):
        cells = (
            f"{h['from']} to {end}",
            h["batch"],
            f"{h['optimizer']}, {h['lr']:g}",
            _shares(h["pairs"]),
            h["scenes"],
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _shares(pairs: list[tuple[int, float]]) -> str:
    return ", ".join(f"from {first}: {100 * share:g} %" if first else f"{100 * share:g} %" for first, share in pairs)


def share(value: list[float] | tuple[float, float, float]) -> str:
    """Write a share and its interval: "90.1 (87 to 92)"."""
    return f"{value[0]:g} ({value[1]:g} to {value[2]:g})"
