"""What latent guidance costs: early exit, memory, diffusers' Attend-and-Excite beside ours.

    python benchmarks/astar.py --flops      # counts only, on real configurations without weights
    python benchmarks/astar.py --wall       # diffusers' deprecated pipeline and ours: same latents, wall time
    python benchmarks/astar.py              # both; `astar_effects.py` judges what it does

Tables go to stderr, one JSON object to stdout; exit code 1 if a figure misses its limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from pag import flops, flux, meta, sd3, sd15, sdxl, small_sd15
from torch.overrides import TorchFunctionMode

import attnctl
from attnctl.processors import AStar, AttendExcite
from attnctl.processors.latent.reader import MapReader, prepared

WORDS = (2, 5)
FLOP_LIMIT, MEMORY_LIMIT, WALL_LIMIT, LATENT_LIMIT = 0.50, 1 / 6, 1.4, 1e-5


def guided(model: torch.nn.Module, inputs: dict[str, Any], sites: Any = None, **options: Any) -> MapReader:
    """Run the guidance forward of one control on a bare denoiser, as far as its last map."""
    name = "unet" if hasattr(model, "down_blocks") else "transformer"
    control = AStar(concepts=WORDS, sites=sites, **options)
    with attnctl.control(SimpleNamespace(**{name: model}), control) as handle:
        w = handle._watched[0]
        if w.family.name == "FLUX.1":  # its grid is read off position ids, which have no values here
            w.family = dataclasses.replace(w.family, grid=lambda model, bound: (1, 64, 64))
        names = [site.name for site in w.resolved[0]]
        reader = MapReader(names, lambda n: torch.zeros(1, n, 2, device="meta"), control.early_exit)
        with torch.enable_grad(), prepared(model, control.checkpoint, w.snapshot):
            w.extra_pass("latents", inputs, dict.fromkeys(names, reader))
    return reader


def count(most: int | None = None) -> list[dict[str, Any]]:
    """Count the share of a forward that guidance needs, for all configurations or the first few."""
    cases = {
        "SD1.5 512, 16x16 layers": (sd15, None),
        "SD1.5 512, down.2": (sd15, "down.2"),
        "SDXL 1024, 32x32 layers": (sdxl, None),
        "SDXL 1024, down.2 and mid": (sdxl, ("down.2", "mid")),
        "SD3 medium 1024, blocks 5-12": (sd3, None),
        "FLUX.1 1024, double blocks": (flux, None),
    }
    table = []
    for name, (make, sites) in list(cases.items())[:most]:
        with torch.device("meta"):
            model, inputs, _ = make()
        whole = flops(lambda m=model, i=inputs: m(**i(1), return_dict=False))
        part = flops(lambda m=model, i=inputs, s=sites: guided(m, i(1), s))
        table.append({"config": name, "whole_tflop": whole / 1e12, "guided_tflop": part / 1e12, "share": part / whole})
    return table


class _Fused(torch.autograd.Function):
    """Saves for backward what fused attention saves: q, k, v, out and a row statistic."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


class Fused(TorchFunctionMode):
    """Stands in for a fused kernel, which the meta device has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled_dot_product_attention."""
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3]) if len(args) >= 3 else _Fused.apply(*(kwargs[n] for n in NAMES))
        return func(*args, **(kwargs or {}))


NAMES = ("query", "key", "value")


def saved_bytes(model: torch.nn.Module, forward: Any) -> int:
    """Add up the distinct storages that a forward keeps for backward, parameters left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage()._cdata not in own:
            kept[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.enable_grad():
        result = forward()
    del result
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def memory() -> dict[str, Any]:
    """Count what one guidance forward of SD1.5 at 512 px in bfloat16 keeps, in the ways that there are."""
    with torch.device("meta"):
        model = sd15()[0].to(torch.bfloat16)

    def inputs() -> dict[str, Any]:
        return {
            "sample": meta(1, 4, 64, 64).to(torch.bfloat16).requires_grad_(),
            "timestep": torch.tensor(1, device="meta"),
            "encoder_hidden_states": meta(1, 77, 768).to(torch.bfloat16),
        }

    found: dict[str, Any] = {}
    processors = dict(model.attn_processors)
    model.set_attn_processor(AttnProcessor())
    found["explicit maps everywhere, whole forward, trained parameters"] = saved_bytes(model, lambda: model(**inputs()))
    model.requires_grad_(False)
    found["the same, frozen"] = saved_bytes(model, lambda: model(**inputs()))
    model.set_attn_processor(processors)
    with Fused():
        found["fused elsewhere, whole forward, frozen"] = saved_bytes(
            model, lambda: guided(model, inputs(), early_exit=False)
        )
        model.requires_grad_(True)
        found["attnctl: fused elsewhere, early exit, frozen"] = saved_bytes(model, lambda: guided(model, inputs()))
        found["attnctl with checkpoint=True"] = saved_bytes(model, lambda: guided(model, inputs(), checkpoint=True))
    theirs, ours = (found[k] for k in (next(iter(found)), "attnctl: fused elsewhere, early exit, frozen"))
    return {"mib": {k: round(v / 2**20, 1) for k, v in found.items()}, "ratio": ours / theirs}


def wall(repeats: int, steps: int = 10) -> dict[str, Any]:
    """Run diffusers' Attend-and-Excite pipeline and ours on the same model, interleaved."""
    plain, _, call = small_sd15()
    parts = {n: p for n, p in plain.components.items() if n != "image_encoder"}
    twin = diffusers.StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    call |= {"num_inference_steps": steps}
    processors = dict(plain.unet.attn_processors)
    options = {"token_indices": list(WORDS), "attn_res": (8, 8), "thresholds": {}, "max_iter_to_alter": steps}

    def theirs() -> torch.Tensor:
        try:
            return twin(**call, prompt=None, **options).images
        finally:
            plain.unet.set_attn_processor(dict(processors))

    def ours() -> torch.Tensor:
        with attnctl.control(plain, AttendExcite(concepts=WORDS, stop=1.0, thresholds=())):
            return plain(**call).images

    runs = {"theirs": theirs, "ours": ours, "plain": lambda: plain(**call).images}
    results = {name: run() for name, run in runs.items()}  # also warms up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}
    gap = (results["theirs"] - results["ours"]).norm() / results["theirs"].norm()
    moved = (results["ours"] - results["plain"]).norm() / results["plain"].norm()
    return {
        "seconds": median,
        "guidance_speedup": (median["theirs"] - median["plain"]) / (median["ours"] - median["plain"]),
        "relative_difference_of_latents": float(gap),
        "relative_effect_of_guidance": float(moved),
        "steps": steps,
        "repeats": repeats,
    }


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", action="store_true", help="counts only")
    parser.add_argument("--wall", action="store_true", help="wall time only")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each pipeline")
    options = parser.parse_args()
    both = not (options.flops or options.wall)
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    failed: list[str] = []
    if options.flops or both:
        result["flops"], result["memory"] = count(), memory()
        for row in result["flops"]:
            print(
                f"{row['config']:32}{row['whole_tflop']:8.2f} TF {row['guided_tflop']:8.2f} TF {row['share']:7.1%}",
                file=sys.stderr,
            )
        for name, mib in result["memory"]["mib"].items():
            print(f"{name:64}{mib:9.1f} MiB", file=sys.stderr)
        print(f"attnctl keeps {result['memory']['ratio']:.3f} of diffusers' way", file=sys.stderr)
        failed += ["flops"] if result["flops"][0]["share"] > FLOP_LIMIT else []
        failed += ["memory"] if result["memory"]["ratio"] > MEMORY_LIMIT else []
    if options.wall or both:
        result["wall"] = w = wall(options.repeats)
        seconds, gap = w["seconds"], w["relative_difference_of_latents"]
        print(
            f"{w['steps']} steps: plain {seconds['plain']:.2f} s, diffusers {seconds['theirs']:.2f} s, "
            f"attnctl {seconds['ours']:.2f} s; guidance {w['guidance_speedup']:.2f} times faster; latents differ by "
            f"{gap:.1e} (guidance moves them by {w['relative_effect_of_guidance']:.1e})",
            file=sys.stderr,
        )
        failed += ["wall"] if w["guidance_speedup"] < WALL_LIMIT else []
        failed += ["latents"] if w["relative_difference_of_latents"] > LATENT_LIMIT else []
    result["failed"] = failed
    print(json.dumps(result, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
