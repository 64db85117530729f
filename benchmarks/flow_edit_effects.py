"""What edits along a flow do to pictures, judged: `python benchmarks/flow_edit_effects.py`.

Rendered pictures of the shapes world are edited with the shipped joint-attention model: another colour, another shape,
another background. Beside FateZero stand SDEdit, the inversion without fusion, FlowEdit and injection, on the same
pictures, each at its best of some settings on tuning pictures; figures come from others, with 95 % bootstrap intervals
over pictures. The marks are those of `fatezero_effects.py`. `--solvers` measures what each solver's inversion gives
back by itself, as PSNR of pictures against what the autoencoder gives; `--picture PATH` draws the edits of three
pictures. The JSON goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from fatezero_effects import Task, marks, merit, tasks
from judged import interval
from PIL import Image
from tqdm import tqdm

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.core.hosts.autoencoders import Coder
from attnctl.data.pictures import grid
from attnctl.pipelines import edit_video
from attnctl.pipelines.editing.codec import decode
from attnctl.pipelines.editing.flow_inversion import call_of, invert_flow
from attnctl.pipelines.editing.running import running_on

KINDS = ("colour", "shape", "background")
TUNING_SEED, REPORT_SEED = 81_000, 930_000
OPTIONS = {"max_sequence_length": 0}  # no padding for the text encoder that the model has not: twice as fast
SOLVERS = ("fireflow", "rf_solver", "euler", "uniinv")


def flow(pipe: Any, task: Task, steps: int, **fields: Any) -> np.ndarray:
    """Edit by one of the methods of `edit_video`."""
    words = [task.word] if fields.pop("blend", False) else None
    more = {} if words is None else {"blend_words": words}
    done = edit_video(
        pipe,
        task.video,
        source=task.source,
        target=task.target,
        steps=steps,
        guidance_scale=fields.pop("guidance"),
        options=OPTIONS,
        progress=False,
        **fields,
        **more,
    )
    assert done.frames is not None
    return done.frames


def sdedit(pipe: Any, task: Task, steps: int, guidance: float, strength: float) -> np.ndarray:
    """Noise the picture and denoise it with the target prompt."""
    host = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    host.set_progress_bar_config(disable=True)
    image = host(
        prompt=task.target,
        image=Image.fromarray(task.video[0]),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(0),
        **OPTIONS,
    ).images[0]
    return np.asarray(image)[None]


def settings(kind: str) -> dict[str, list[dict[str, Any]]]:
    """List what is tried on the tuning pictures, what is likely to be best first."""
    ours: list[dict[str, Any]] = [{"guidance": 4.0, "cross_replace": 0.5, "self_replace": 0.5}]
    if kind != "background":
        inside = {"blend": True, "blend_attention": False, "blend_latents": True, "blend_window": (0.0, 1.0)}
        ours.append(ours[0] | inside)
    ours += [{"guidance": 4.0, "cross_replace": c, "self_replace": s} for c, s in ((0.3, 0.3), (0.5, 0.0))]
    plain = {"cross_replace": 0.0, "self_replace": 0.0}
    return {
        "FateZero": ours,
        "no fusion": [{"guidance": g} | plain for g in (4.0, 2.0)],
        "SDEdit": [{"guidance": 4.0, "strength": s} for s in (0.7, 0.85, 0.55)],
        "FlowEdit": [
            {"method": "flowedit", "guidance": g, "source_scale": s, "strength": t}
            for g, s, t in ((6.0, 2.0, 0.8), (4.0, 1.5, 0.8), (6.0, 2.0, 0.66))
        ],
        "injection": [{"method": "inject", "guidance": 4.0, "stop": t} for t in (0.2, 0.5)],
    }


def score(pipe: Any, method: str, chosen: dict[str, Any], chosen_tasks: list[Task], steps: int) -> dict[str, Any]:
    """Edit and judge pictures with one setting."""
    run = sdedit if method == "SDEdit" else flow
    rows = [marks(t, run(pipe, t, steps, **chosen)) for t in chosen_tasks]
    return {name: [r[name] for r in rows] for name in rows[0]}


def study(kind: str, options: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """Tune each method on some pictures, report on others."""
    tuning, report = tasks(kind, options.tune, TUNING_SEED, 1), tasks(kind, options.n, REPORT_SEED, 1)
    result: dict[str, Any] = {"tuning": [], "methods": {}}
    raw: dict[str, dict[str, list[float]]] = {}
    for method, tried in settings(kind).items():
        best = None
        for chosen in tqdm(tried[: options.tries], desc=f"{kind}, {method}: settings", disable=None):
            found = score(pipe, method, dict(chosen), tuning, options.steps)
            result["tuning"].append(
                {"method": method, "setting": chosen, **{m: round(float(np.mean(v)), 3) for m, v in found.items()}}
            )
            if best is None or merit(kind, found) > best[0]:
                best = merit(kind, found), chosen
        assert best is not None
        began = time.perf_counter()
        raw[method] = score(pipe, method, dict(best[1]), report, options.steps)
        spread = {m: interval(np.array(v), percent=m in ("success", "object")) for m, v in raw[method].items()}
        result["methods"][method] = {"setting": best[1], "seconds": time.perf_counter() - began, **spread}
        shown = "  ".join(f"{m} {v[0]} [{v[1]}, {v[2]}]" for m, v in spread.items())
        print(f"{kind:10} {method:10} {shown}  {best[1]}", file=sys.stderr, flush=True)
    for other in raw:
        result["methods"][other]["FateZero_minus_this"] = {
            m: interval(np.array(raw["FateZero"][m]) - np.array(raw[other][m]), percent=m in ("success", "object"))
            for m in raw[other]
        }
    return result


@torch.no_grad()
def solvers(pipe: Any, n: int) -> dict[str, Any]:
    """Measure what each inversion gives back, in dB, against what the autoencoder gives."""
    coder, found = Coder(pipe), {}
    pictures = [(t, coder.encode(t.video)) for t in tasks("colour", n, REPORT_SEED + 7, 1)]
    for solver in SOLVERS:
        for steps in (10, 20, 50):
            rows = []
            for task, coded in pictures:
                inversion = invert_flow(pipe, coded, task.source, steps=steps, solver=solver, options=OPTIONS)
                call = call_of(pipe, task.source, coded, inversion.noise, steps, 1.0) | OPTIONS
                with running_on(pipe, inversion.way_back()) as more:
                    z = pipe(**call | more)[0]
                a, b = (decode_flow(pipe, x).astype(np.float64) for x in (z, coded.latents))
                rows.append(10 * math.log10(255**2 / max(float(((a - b) ** 2).mean()), 1e-9)))
            found[f"{solver}, {steps} steps"] = interval(np.array(rows), percent=False)
            print(f"{solver:10} {steps:3} steps  PSNR {found[f'{solver}, {steps} steps']}", file=sys.stderr, flush=True)
    return found


def decode_flow(pipe: Any, z: torch.Tensor) -> np.ndarray:
    """Decode a picture's latents."""
    return decode(pipe, z)


def picture(pipe: Any, path: Path, steps: int) -> None:
    """Draw three edits by every method."""
    columns, labels = [], ["source", *settings("background")]
    for kind in KINDS:
        task = tasks(kind, 1, REPORT_SEED + 1, 1)[0]
        made = [task.video]
        for method, tried in settings(kind).items():
            made.append((sdedit if method == "SDEdit" else flow)(pipe, task, steps, **dict(tried[0])))
        columns.append((f"{task.source}\n{task.target}", [Image.fromarray(m[0]) for m in made]))
    images = [column[1][row] for row in range(len(labels)) for column in columns]
    grid(images, len(labels), len(columns), labels, [c[0] for c in columns], tile=128).save(path)


def main() -> int:
    """Run the study and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=32, help="pictures of each kind in the report")
    parser.add_argument("--tune", type=int, default=4, help="pictures of each setting tried")
    parser.add_argument("--tries", type=int, default=4, help="most settings of a method")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solvers", type=int, default=0, help="pictures for the table of solvers; 0 for none")
    parser.add_argument("--picture", type=Path, help="draw edits into this file, and do nothing else")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = attnctl.load_shapes("mmdit")
    if options.picture is not None:
        picture(pipe, options.picture, options.steps)
        return 0
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "attnctl": attnctl.__version__}
    result: dict[str, Any] = {"versions": versions, "machine": platform.machine(), "steps": options.steps}
    result |= {"pictures": options.n, "tuning_pictures": options.tune}
    if options.solvers:
        result["solvers"] = {"pictures": options.solvers, "psnr": solvers(pipe, options.solvers)}
    if options.n:
        result["kinds"] = {kind: study(kind, options, pipe) for kind in options.kinds}
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
