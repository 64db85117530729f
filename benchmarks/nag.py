"""Where NAG acts, how exact it is, and what it costs: `python benchmarks/nag.py > benchmarks/results/nag.json`.

Cost: FLOPs of a call under NAG at CFG 1 over those of the plain call, counted on shapes alone (no weights, no GPU), at
the sizes of FLUX.1, Qwen-Image and Wan 2.1 14B. The "stream" form takes the negative prompt's text beside the prompt's,
"rows" a whole row. Wan's figure is that of a run of four steps, the call that records the keys included.

Coverage: a tiny model of every denoiser class of diffusers in `tests/zoo.py`, in float64. NAG acts where the prediction
moves; the refusals are listed with their reason. `exact` is the relative distance to the formula written out, with the
negative prompt as further rows of one batch (`tests/naive_nag.py`), at CFG 1 and with CFG in one batch.

`--flops` and `--coverage` do one of both. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.core.hosts.ghost import text_arguments
from attnctl.processors import NAG

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo
from naive_nag import doubled, naive_nag_by_keys, naive_nag_by_turns

SETTING = {"scale": 3.0, "tau": 2.0, "alpha": 0.4}
# What must equal the formula.
NAMED = ("sd15", "sdxl", "sd3", "flux", "flux2", "qwen", "zimage", "cogvideox", "wan", "wan_i2v", "ltx")
NAMED += ("hunyuanvideo", "chroma", "sana", "pixart")
# Where the formula written out would be that of another model.
ELSEWHERE = {
    "mochi": "its text is pooled into the time embedding, so that its image's keys are another prompt's too",
    "stable_audio3": "its attention is the difference of two, of which NAG guides the first",
}
STEPS = 4
Inputs = dict[str, Any]


def meta(*shape: int) -> torch.Tensor:
    """Make a tensor that has a shape and nothing else."""
    return torch.empty(shape, device="meta")


def flux() -> tuple[torch.nn.Module, Inputs]:
    """FLUX.1 at 1024 x 1024, 512 text tokens."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=False)
    inputs = {"hidden_states": meta(1, 4096, 64), "encoder_hidden_states": meta(1, 512, 4096), "timestep": meta(1)}
    ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(64.0), torch.arange(64.0))
    return model, inputs | {"pooled_projections": meta(1, 768), "img_ids": ids, "txt_ids": torch.zeros(512, 3)}


def qwen() -> tuple[torch.nn.Module, Inputs]:
    """Qwen-Image at 1024 x 1024, 256 text tokens."""
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel()
    model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    inputs = {"hidden_states": meta(1, 4096, 64), "encoder_hidden_states": meta(1, 256, 3584), "timestep": meta(1)}
    return model, inputs | {"img_shapes": [[(1, 64, 64)]], "encoder_hidden_states_mask": None}


def wan() -> tuple[torch.nn.Module, Inputs]:
    """Wan 2.1 14B, 81 frames of 480 x 832, 512 text tokens."""
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel()
    inputs = {"hidden_states": meta(1, 16, 21, 60, 104), "encoder_hidden_states": meta(1, 512, 4096)}
    return model, inputs | {"timestep": meta(1)}


LIMITS = {"FLUX.1 stream": 1.30, "Qwen-Image stream": 1.30, "Wan 2.1 14B keys": 1.03}


def counted(call: Callable[[], object]) -> int:
    """Count the floating-point operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def cost() -> dict[str, float]:
    """Compute the FLOPs of NAG over those of plain calls."""
    table: dict[str, float] = {}
    for name, make, forms in (("FLUX.1", flux, 2), ("Qwen-Image", qwen, 2), ("Wan 2.1 14B", wan, 1)):
        model, inputs = make()
        model.eval()
        call = lambda model=model, inputs=inputs: model(**inputs, return_dict=False)  # noqa: E731
        plain = counted(call)
        embeds = {"encoder_hidden_states": meta(*inputs["encoder_hidden_states"].shape)}
        for form in ("stream", "rows")[:forms]:
            with attnctl.control(model, NAG(negative_embeds=embeds, form=form), layout="cond"):
                calls = STEPS if forms == 1 else 1
                total = sum(counted(call) for _ in range(calls))
            table[f"{name} {form if forms == 2 else 'keys'}"] = round(total / plain / calls, 4)
    return table


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Compute the relative distance of a to b."""
    return float((a - b).norm() / b.norm())


def exact(name: str, model: torch.nn.Module, inputs: Inputs, other: Inputs, out: torch.Tensor) -> list[float] | str:
    """Compare with the formula, at CFG 1 and with CFG in one batch, where a model takes further rows."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    cross = any(s.kind == "cross" for s in attnctl.find_sites(model))
    expected = (naive_nag_by_keys if cross else naive_nag_by_turns)(model, inputs, {**inputs, **other}, **SETTING)
    far = [distance(out, expected)]
    try:
        batch = doubled({**inputs, **other}, inputs)
        zoo.call(model, batch)
    except Exception:
        return far
    with attnctl.control(model, NAG(**SETTING), layout="uncond_first"):
        guided = zoo.call(model, batch)
    return [*far, distance(guided[len(guided) // 2 :], expected)]


def one(name: str, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """Run NAG on one tiny model."""
    model, inputs = zoo.build(name, batch=batch, dtype=dtype)
    other = text_arguments(zoo.build(name, batch=batch, dtype=dtype, seed=1)[1], inputs)
    other = {k: v for k, v in other.items() if k in inputs}
    row: dict[str, Any] = {"class": type(model).__name__, "acts": False, "dtype": str(dtype), "rows": batch}
    if not other:
        return row | {"why": "takes no text"}
    try:
        plain = zoo.call(model, inputs)
        outs = []
        for form in ("auto", "rows"):
            control = NAG(**SETTING, negative_embeds=other, form=form)
            with attnctl.control(model, control, layout="cond") as handle:
                outs.append(zoo.call(model, inputs))
                live = handle._live(control)[0]
            row.setdefault("form", live.lockstep or "keys")
        row |= {"acts": distance(outs[0], plain) > 1e-6, "stream and rows": distance(*outs)}
        row["exact"] = exact(name, model, inputs, other, outs[0])
    except Exception as error:
        row["why"] = f"{type(error).__name__}: {str(error)[:160]}"
    return row


def coverage(names: tuple[str, ...]) -> dict[str, Any]:
    """Run NAG on a tiny model of each class; in single precision or with one row where a host takes no other."""
    rows: dict[str, Any] = {}
    for name in names:
        for dtype, batch in ((torch.float64, 2), (torch.float32, 2), (torch.float64, 1)):
            row = one(name, dtype, batch)
            rows[name] = row if row["acts"] or name not in rows else rows[name]
            if row["acts"] or row.get("why") == "takes no text":
                break
        print(f"{name:18}", {k: v for k, v in rows[name].items() if k != "class"}, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", action="store_true", help="the cost alone")
    parser.add_argument("--coverage", action="store_true", help="the classes alone")
    parser.add_argument("--names", nargs="*", help="models of tests/zoo.py; all by default")
    args = parser.parse_args()
    both = args.flops == args.coverage
    result: dict[str, Any] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        if args.flops or both:
            result |= {"flops": cost(), "limits": LIMITS}
            print(json.dumps(result["flops"], indent=1), file=sys.stderr)
        if args.coverage or both:
            rows = coverage(tuple(args.names or zoo.EVERY))
            compared = [max(rows[n]["exact"]) for n in NAMED if isinstance(rows.get(n, {}).get("exact"), list)]
            acting = sorted({row["class"] for row in rows.values() if row["acts"]})
            result |= {
                "classes": len(acting),
                "of": len({row["class"] for row in rows.values()}),
                "acting": acting,
                "named": len(compared),
                "worst": max(compared, default=None),
                "models": rows,
            }
            print(f"{len(acting)} classes; named {len(compared)}, worst {result['worst']}", file=sys.stderr)
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
