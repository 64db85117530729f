"""The before/after pictures of the docs pages, made offline with the models that attnctl ships.

python examples/gallery.py pag        # out/pag.png, with its record
python examples/gallery.py --list     # what there is

Rows are the first prompts of a fixed list, seeds 0, 1, ..., not chosen; all columns share prompt and noise.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attnctl.data.pictures import grid
from attnctl.data.record import save_image
from attnctl.data.specs import parse_control
from attnctl.pipelines.generate import Call, sample
from attnctl.pipelines.models import load
from attnctl.shapes import clip_prompts, judge, judge_clip, pair_prompts, parse

GREEN = (30, 150, 70)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture: a shipped model, and the controls of the columns beside the plain one."""

    model: str
    columns: tuple[str, ...]
    guidance: float = 3.0
    negative: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


MMDIT: dict[str, Any] = {"model": "mmdit", "options": {"max_sequence_length": 0}}
UNET: dict[str, Any] = {"model": "text2image", "guidance": 1.5}
PICTURES = {
    "pag": Shown(columns=("PAG(scale=2.5, sites=6)", "SoftPAG(scale=2.5, u=0.5, sites=6)"), **MMDIT),
    "seg": Shown(columns=("SEG(scale=2.5, sites=6)",), **MMDIT),
    "slg": Shown(columns=("SLG(sites=6)", "SLG(sites=6, start=0.0, stop=0.6)"), **MMDIT),
    "combiners": Shown(
        columns=("APG(norm=0.0, eta=0.5, momentum=0.0)", "CFGZeroStar(zero_init_steps=0)", "GuidanceInterval()"),
        model="text2image",
        guidance=6.0,
    ),
    "tpg": Shown(columns=("TPG(scale=1.0)",), **UNET),
    "nag": Shown(columns=("NAG(scale=4.0)",), model="text2image", guidance=1.5, negative="on gray"),
    "astar": Shown(columns=('AStar(concepts=NOUNS, grad_transform="l2", step_size=1.0, stop=0.1)',), **UNET),
    "attend_excite": Shown(
        columns=('AttendExcite(concepts=NOUNS, grad_transform="l2", step_size=0.5, thresholds=())',), **UNET
    ),
    "agent": Shown(columns=("AgentAttention()",), **UNET),
    "broadway": Shown(model="video", columns=("BroadWay(motion=1.0)",)),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture", nargs="?", choices=PICTURES, metavar="PICTURE", help="which one to make")
parser.add_argument("--list", action="store_true", help="list the pictures and the controls that they show")
parser.add_argument("--shapes", action="store_true", help="accepted for symmetry; this script always uses it")
parser.add_argument("--control", action="append", help="show these controls instead")
parser.add_argument("--rows", type=int, default=4, help="prompts")
parser.add_argument("--steps", type=int, default=20, help="denoising steps")
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--force", action="store_true", help="overwrite")
args = parser.parse_args()


def nouns(prompt: str) -> tuple[str, ...]:
    """Name the objects of a prompt; one that occurs twice is numbered."""
    shapes = [thing.shape for thing in parse(prompt).things]
    return tuple(f"{s}#{shapes[: i + 1].count(s)}" if shapes.count(s) > 1 else s for i, s in enumerate(shapes))


def make(name: str, shown: Shown) -> Path:
    """Draw one picture, and write it with its record."""
    video = shown.model == "video"
    prompts = clip_prompts(2025, args.rows) if video else pair_prompts(2024, args.rows)
    loaded = load(f"shapes:{shown.model}")
    call = Call(
        prompts=tuple(prompts),
        seeds=tuple(range(args.rows)),
        steps=args.steps,
        guidance=shown.guidance,
        negative=shown.negative,
        options=shown.options,
        command=f"python examples/gallery.py {name}",
    )
    columns = ("plain", *(args.control or shown.columns))
    done = [sample(loaded, call)]
    for text in columns[1:]:
        if "NOUNS" in text:
            text = text.replace("NOUNS", repr(tuple(map(nouns, prompts))))
        done.append(sample(loaded, replace(call, controls=(parse_control(text),))))
        print(done[-1].report)
    labels = [f"{prompt}\nseed {seed}" for prompt, seed in zip(prompts, call.seeds, strict=True)]
    foot = f"Green frame: the judge finds what was asked for, and nothing else. shapes:{shown.model}, "
    foot += (
        f"CFG {shown.guidance:g}, {args.steps} steps" + f", negative: {shown.negative!r}" * bool(shown.negative) + "."
    )
    heads = ["plain"]
    for text in columns[1:]:
        heads.append(text if len(text) <= 40 else text.partition("(")[0])  # where a column is too narrow, below
        foot += "" if len(text) <= 40 else f" {text}"
    if video:
        tiles, frames = [], []
        for i, prompt in enumerate(prompts):
            for column in done:
                right = judge_clip(column.videos[i]).matches(prompt).right
                tiles += column.videos[i][::3]
                frames += [GREEN if right else None] * len(column.videos[i][::3])
        across = len(tiles) // (len(prompts) * len(done))
        names = [text for label in labels for text in (label, *heads[1:])]
        picture = grid(tiles, len(names), across, names, footer=foot, frames=frames, tile=128)
    else:
        tiles = [column.images[i] for i in range(args.rows) for column in done]
        asked = [prompt for prompt in prompts for _ in done]
        frames = [GREEN if judge(t).matches(p).right else None for t, p in zip(tiles, asked, strict=True)]
        picture = grid(tiles, args.rows, len(columns), labels, heads, footer=foot, frames=frames, tile=128)
    path = args.out / f"{name}.png"
    save_image(picture, path, [column.record for column in done], force=args.force)
    return path


if args.list or args.picture is None:
    for name, shown in PICTURES.items():
        print(f"{name}: shapes:{shown.model}, {'; '.join(shown.columns)}")
else:
    print(f"wrote {make(args.picture, PICTURES[args.picture])}")
