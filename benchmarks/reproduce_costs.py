"""Count the work of the denoisers that the recipes of `attnctl reproduce` name, from their published configurations.

    python benchmarks/reproduce_costs.py
    python benchmarks/reproduce_costs.py --only pag nag

For each recipe's model and size: TFLOP of one row and one step (a product of matrices counts twice), and gigabytes of
the denoiser's weights at two bytes each. Everything is on the meta device: no weights, no network. The JSON goes to
stdout; a recipe whose `row_tflop` is off by more than 5 % is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnctl.pipelines.reproduce.recipes import Experiment, experiments, methods


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _sd1(e: Experiment) -> tuple[Any, dict[str, Any]]:
    model = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    return model, {"sample": _empty(1, 4, e.height // 8, e.width // 8), "encoder_hidden_states": _empty(1, 77, 768)}


def _animatediff(e: Experiment) -> tuple[Any, dict[str, Any]]:
    model = diffusers.UNetMotionModel(cross_attention_dim=768, use_motion_mid_block=False)
    latents = _empty(1, 4, e.options["num_frames"], e.height // 8, e.width // 8)
    return model, {"sample": latents, "encoder_hidden_states": _empty(e.options["num_frames"], 77, 768)}


def _sd3(e: Experiment) -> tuple[Any, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    return model, {
        "hidden_states": _empty(1, 16, e.height // 8, e.width // 8), "encoder_hidden_states": _empty(1, 333, 4096),
        "pooled_projections": _empty(1, 2048),
    }  # fmt: skip


def _flux(e: Experiment) -> tuple[Any, dict[str, Any]]:
    model, n = diffusers.FluxTransformer2DModel(), (e.height // 16) * (e.width // 16)
    return model, {
        "hidden_states": _empty(1, n, 64), "encoder_hidden_states": _empty(1, 256, 4096),
        "pooled_projections": _empty(1, 768), "img_ids": _empty(n, 3), "txt_ids": _empty(256, 3),
    }  # fmt: skip


def _cogvideox(e: Experiment) -> tuple[Any, dict[str, Any]]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
    )
    frames, h, w = (e.options["num_frames"] - 1) // 4 + 1, e.height // 8, e.width // 8
    n = frames * (h // 2) * (w // 2)
    return model, {
        "hidden_states": _empty(1, frames, 16, h, w), "encoder_hidden_states": _empty(1, 226, 4096),
        "image_rotary_emb": (_empty(n, 64), _empty(n, 64)),
    }  # fmt: skip


def _wan(e: Experiment) -> tuple[Any, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel()  # the 14B one
    frames = (e.options["num_frames"] - 1) // 4 + 1
    return model, {
        "hidden_states": _empty(1, 16, frames, e.height // 8, e.width // 8),
        "encoder_hidden_states": _empty(1, 512, 4096),
    }  # fmt: skip


BUILDERS: dict[str, Callable[[Experiment], tuple[Any, dict[str, Any]]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _sd1,
    "CompVis/stable-diffusion-v1-4": _sd1,
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3,
    "black-forest-labs/FLUX.1-schnell": _flux,
    "THUDM/CogVideoX-5b": _cogvideox,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan,
}


def count(e: Experiment) -> dict[str, Any]:
    """Count one row and one step of an experiment."""
    with torch.device("meta"), torch.no_grad():
        model, inputs = (_animatediff if e.adapter else BUILDERS[e.model])(e)
        model = model.to(torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            model(timestep=torch.empty(1, dtype=torch.long), **inputs)
    weights = 2 * sum(p.numel() for p in model.parameters()) / 1e9
    return {
        "experiment": e.label, "model": e.model, "row_tflop": round(counter.get_total_flops() / 1e12, 3),
        "recipe": e.row_tflop, "denoiser_gb": round(weights, 2),
    }  # fmt: skip


def main() -> int:
    """Count every recipe's work; return 1 where a recipe says something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=methods(), default=methods(), help="recipes to count")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    seen: dict[Any, dict[str, Any]] = {}
    for method in args.only:
        for e in experiments(method):
            facts = e.model, e.adapter, e.height or 512, e.width or 512, e.options.get("num_frames")
            if facts not in seen:
                seen[facts] = count(dataclasses.replace(e, height=facts[2], width=facts[3]))
            rows.append(seen[facts] | {"experiment": e.label, "recipe": e.row_tflop})
    off = [r["experiment"] for r in rows if abs(r["recipe"] - r["row_tflop"]) > 0.05 * r["row_tflop"]]
    print(json.dumps({"rows": rows, "off": off}, indent=1))
    if off:
        print(f"row_tflop is off in {', '.join(off)}", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
