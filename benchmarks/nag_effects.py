"""What NAG takes out of pictures at CFG 1, judged.

    python benchmarks/nag_effects.py > benchmarks/results/nag_effects.json

The shipped text2image model without classifier-free guidance, where a negative prompt does nothing by itself.

object   The prompt names two objects, the negative prompt the second of them. Share of pictures that show it (colour
         and shape), and that show the first one, which shall stay: plain and with NAG, the same noise.
colour   The prompt names a shape and no colour. The negative prompt is the same with the colour that the plain picture
         of this noise shows. Share of pictures that still show the colour, beside the share with the negative prompt of
         another colour, which tells what any change of the picture would do.

Settings are chosen on tuning prompts and seeds, by the share that shows the object less the share that loses the first.
Shares come with 95 % Wilson intervals, differences with 95 % bootstrap intervals over the pairs. The table goes to
stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import diffusers
import numpy as np
import torch
from judged import interval

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import NAG
from attnctl.shapes.judge import judge
from attnctl.shapes.load import load_shapes
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, pair_prompts, parse
from attnctl.shapes.training.evaluate import generate, wilson

STEPS = 10
TUNING_SEED, REPORT_SEED = 60_000, 700_000
SETTINGS = (
    NAG(scale=4.0, tau=2.5, alpha=0.5),
    NAG(scale=10.0, tau=3.5, alpha=0.5),
    NAG(scale=10.0, tau=3.5, alpha=1.0),
)


def pictures(
    pipe: Any, prompts: Sequence[str], seed: int, control: NAG | None = None, negatives: Sequence[str] = ()
) -> list[Any]:
    """Make one picture per prompt and judge it."""
    verdicts: list[Any] = []
    for i in range(0, len(prompts), 16):
        part = prompts[i : i + 16]
        options = {"negative_prompt": list(negatives[i : i + 16])} if negatives else {}
        with attnctl.control(pipe, control) if control is not None else nullcontext():
            images = generate(pipe, part, scale=1.0, seed=seed + i, steps=STEPS, **options)
        verdicts += [judge(image) for image in images]
        print(f"{len(verdicts)} of {len(prompts)}", file=sys.stderr, flush=True)
    return verdicts


def shows(verdict: Any, color: str, shape: str | None = None) -> float:
    """Tell whether a picture shows a colour, or an object."""
    return float(any(f.color == color and shape in (None, f.shape) for f in verdict.things))


def objects(verdicts: Sequence[Any], prompts: Sequence[str], which: int) -> np.ndarray:
    """Tell which pictures show the first or the second object of their prompts."""
    things = [parse(prompt).things[which] for prompt in prompts]
    return np.array([shows(v, t.color, t.shape) for v, t in zip(verdicts, things, strict=True)])


def without_first(prompt: str) -> str:
    """Name the second object alone: "a red circle and a blue square on gray" -> "a blue square on gray"."""
    return prompt.partition(" and ")[2]


def share(hits: np.ndarray) -> tuple[float, float, float]:
    """Return a share and its 95 % interval, in percent."""
    return wilson(int(hits.sum()), len(hits))


def tune(pipe: Any, n: int) -> tuple[NAG, list[dict[str, Any]]]:
    """Choose a setting on tuning prompts."""
    prompts = pair_prompts(1, n, "tuning")
    negatives = [without_first(p) for p in prompts]
    table, best = [], (-np.inf, SETTINGS[0])
    for control in SETTINGS:
        found = pictures(pipe, prompts, TUNING_SEED, control, negatives)
        first, second = objects(found, prompts, 0).mean(), objects(found, prompts, 1).mean()
        table.append({"control": control.describe(), "first": float(first), "second": float(second)})
        print(table[-1], file=sys.stderr, flush=True)
        best = max(best, (float(first - second), control), key=lambda item: item[0])
    return best[1], table


def removed_objects(pipe: Any, control: NAG, n: int) -> dict[str, Any]:
    """Count pictures that show the object of the negative prompt."""
    prompts = pair_prompts(2, n, "report")
    plain = pictures(pipe, prompts, REPORT_SEED)
    guided = pictures(pipe, prompts, REPORT_SEED, control, [without_first(p) for p in prompts])
    result: dict[str, Any] = {"pictures": n}
    for which, name in ((1, "negative object"), (0, "first object")):
        a, b = objects(plain, prompts, which), objects(guided, prompts, which)
        result[name] = {"plain": share(a), "NAG": share(b), "difference": interval(b - a)}
    return result


def removed_colours(pipe: Any, control: NAG, n: int) -> dict[str, Any]:
    """Count pictures that still show the colour of the negative prompt."""
    world = [f"a {shape} on {background}" for background in BACKGROUNDS for shape in SHAPES]
    prompts = [world[i % len(world)] for i in range(n)]
    plain = pictures(pipe, prompts, REPORT_SEED + 10_000)
    kept = [i for i, verdict in enumerate(plain) if verdict.things]
    colors, names = [plain[i].things[0].color for i in kept], list(COLORS)
    others = [names[(names.index(color) + 1 + i % 5) % 6] for i, color in enumerate(colors)]

    def with_negative(which: Sequence[str]) -> np.ndarray:
        # All pictures are made again, so that each keeps its noise; those without an object have no negative colour.
        named = dict(zip(kept, which, strict=True))
        negatives = [f"a {named.get(i, names[0])} {prompt[2:]}" for i, prompt in enumerate(prompts)]
        found = pictures(pipe, prompts, REPORT_SEED + 10_000, control, negatives)
        return np.array([shows(found[i], color) for i, color in zip(kept, colors, strict=True)])

    shown, other = with_negative(colors), with_negative(others)
    return {
        "pictures": len(kept),
        "shown colour": {"NAG": share(shown), "NAG, other colour": share(other), "difference": interval(shown - other)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=64, help="pictures of each task")
    parser.add_argument("--tune", type=int, default=16, help="pictures of each setting")
    parser.add_argument("--task", choices=("object", "colour"), nargs="*", default=("object", "colour"))
    args = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    pipe = load_shapes("text2image")
    pipe.set_progress_bar_config(disable=True)
    tasks: dict[str, Callable[..., dict[str, Any]]] = {"object": removed_objects, "colour": removed_colours}
    control, table = tune(pipe, args.tune)
    result: dict[str, Any] = {
        "model": "text2image",
        "cfg": 1.0,
        "steps": STEPS,
        "control": control.describe(),
        "tuning": {"pictures": args.tune, "table": table},
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    for task in args.task:
        result[task] = tasks[task](pipe, control, args.n)
        print(task, result[task], file=sys.stderr, flush=True)
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
