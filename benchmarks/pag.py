"""What PAG costs: FLOPs of real configurations, and the wall time of a whole run beside diffusers' own PAG pipeline.

    python benchmarks/pag.py              # both parts
    python benchmarks/pag.py --flops      # counts only: seconds, no memory (meta device)

"naive" is what diffusers' PAG pipelines do: one batch with the perturbed rows appended at every step. "shared" is
attnctl: the base batch, then the perturbed rows from the first perturbed layer on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnctl  # first: it keeps xformers from warning where it cannot run
from attnctl.processors import PAG

Inputs = dict[str, Any]
LIMITS = {"SD1.5 mid": 0.90, "SDXL mid": 0.90, "SD3 block 13": 0.82, "PixArt block 14": 0.84, "FLUX single 0": 0.84}


def meta(*shape: int) -> torch.Tensor:
    """Make a tensor that has a shape and nothing else."""
    return torch.empty(shape, device="meta")


def sd15() -> tuple[torch.nn.Module, Callable[[int], Inputs], PAG]:
    """Stable Diffusion 1.5 at 512 px."""
    model = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)

    def inputs(rows: int) -> Inputs:
        return {
            "sample": meta(rows, 4, 64, 64),
            "timestep": torch.tensor(1, device="meta"),
            "encoder_hidden_states": meta(rows, 77, 768),
        }

    return model, inputs, PAG(sites="mid")


def sdxl() -> tuple[torch.nn.Module, Callable[[int], Inputs], PAG]:
    """Stable Diffusion XL at 1024 px."""
    model = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )

    def inputs(rows: int) -> Inputs:
        return {
            "sample": meta(rows, 4, 128, 128),
            "timestep": torch.tensor(1, device="meta"),
            "encoder_hidden_states": meta(rows, 77, 2048),
            "added_cond_kwargs": {"text_embeds": meta(rows, 1280), "time_ids": meta(rows, 6)},
        }

    return model, inputs, PAG(sites="mid")


def sd3() -> tuple[torch.nn.Module, Callable[[int], Inputs], PAG]:
    """Stable Diffusion 3 medium at 1024 px."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
    )

    def inputs(rows: int) -> Inputs:
        return {
            "hidden_states": meta(rows, 16, 128, 128),
            "timestep": meta(rows),
            "encoder_hidden_states": meta(rows, 333, 4096),
            "pooled_projections": meta(rows, 2048),
        }

    # The whole map becomes the identity, so that the count holds no attention in the perturbed rows either way.
    return model, inputs, PAG(sites="transformer_blocks.13", scope="all")


def pixart() -> tuple[torch.nn.Module, Callable[[int], Inputs], PAG]:
    """PixArt-Sigma at 1024 px."""
    model = diffusers.PixArtTransformer2DModel(sample_size=128, use_additional_conditions=False, caption_channels=4096)

    def inputs(rows: int) -> Inputs:
        return {
            "hidden_states": meta(rows, 4, 128, 128),
            "timestep": meta(rows),
            "encoder_hidden_states": meta(rows, 300, 4096),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return model, inputs, PAG(sites="transformer_blocks.14.attn1")


def flux() -> tuple[torch.nn.Module, Callable[[int], Inputs], PAG]:
    """FLUX.1-dev at 1024 px (guidance-distilled: one row)."""
    model = diffusers.FluxTransformer2DModel(guidance_embeds=True)

    def inputs(rows: int) -> Inputs:
        return {
            "hidden_states": meta(rows, 4096, 64),
            "encoder_hidden_states": meta(rows, 512, 4096),
            "pooled_projections": meta(rows, 768),
            "timestep": meta(rows),
            "img_ids": meta(4096, 3),
            "txt_ids": meta(512, 3),
            "guidance": meta(rows),
        }

    return model, inputs, PAG(sites="single_transformer_blocks.0", scope="all")


CONFIGS = {
    "SD1.5 mid": (sd15, 2),
    "SDXL mid": (sdxl, 2),
    "SD3 block 13": (sd3, 2),
    "PixArt block 14": (pixart, 2),
    "FLUX single 0": (flux, 1),
}


def flops(call: Callable[[], object]) -> int:
    """Count the floating-point operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def guided_flops(model: torch.nn.Module, inputs: Inputs, control: PAG, rows: int) -> int:
    """Count base pass and perturbed pass under attnctl, after the step that learns the prefix."""
    with attnctl.control(model, control, layout="uncond_first" if rows == 2 else "cond"):
        model_call = lambda: model(**inputs, return_dict=False)  # noqa: E731
        with torch.no_grad():
            model_call()
        return flops(model_call)


def count() -> list[dict[str, Any]]:
    """Count the real configurations."""
    table = []
    for name, (make, rows) in CONFIGS.items():
        with torch.device("meta"):
            model, inputs, control = make()
        base = flops(lambda m=model, i=inputs, r=rows: m(**i(r), return_dict=False))
        naive = flops(lambda m=model, i=inputs, r=rows: m(**i(r + 1), return_dict=False))
        shared = guided_flops(model, inputs(rows), control, rows)
        table.append(
            {
                "config": name,
                "rows": rows,
                "base_tflop": base / 1e12,
                "naive_tflop": naive / 1e12,
                "shared_tflop": shared / 1e12,
                "shared_over_naive": shared / naive,
                "extra_naive": naive / base - 1,
                "extra_shared": shared / base - 1,
                "limit": LIMITS[name],
            }
        )
    return table


def small_sd15() -> tuple[Any, Any, Inputs]:
    """Build an SD1.5-shaped pipeline with a fifth of the width, and diffusers' PAG twin on the same components."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=128, attention_head_dim=8
    ).eval()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: dict[str, Any] = {"unet": unet, "scheduler": scheduler}
    parts |= dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    plain = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    twin = diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers="mid")
    for pipe in (plain, twin):
        pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    call = {
        "prompt_embeds": torch.randn(1, 77, 128, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 77, 128, generator=generator),
        "latents": torch.randn(1, 4, 32, 32, generator=generator),
        "height": 256,
        "width": 256,
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }
    return plain, twin, call


def run_theirs(twin: Any, call: Inputs) -> torch.Tensor:
    """Run diffusers' PAG pipeline."""
    return twin(**call, pag_scale=3.0).images


def run_ours(plain: Any, call: Inputs) -> torch.Tensor:
    """Run the plain pipeline under attnctl, attaching and detaching included."""
    with attnctl.control(plain, PAG(scale=3.0, sites="mid")):
        return plain(**call).images


def wall(repeats: int) -> dict[str, Any]:
    """Time whole runs of both, interleaved; also count their FLOPs and compare their latents."""
    plain, twin, call = small_sd15()
    theirs, ours = run_theirs(twin, call), run_ours(plain, call)  # also warms up
    difference = float((theirs - ours).norm() / theirs.norm())
    times: dict[str, list[float]] = {"theirs": [], "ours": [], "plain": []}
    runs = {
        "theirs": lambda: run_theirs(twin, call),
        "ours": lambda: run_ours(plain, call),
        "plain": lambda: plain(**call),
    }
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}
    counted = {name: flops(run) for name, run in runs.items()}
    return {
        "seconds": median,
        "wall_ratio": median["ours"] / median["theirs"],
        "flop_ratio": counted["ours"] / counted["theirs"],
        "wall_over_plain": {n: median[n] / median["plain"] for n in ("theirs", "ours")},
        "relative_difference_of_latents": difference,
        "repeats": repeats,
    }


def main() -> int:
    """Print a table and JSON; exit with 1 if a figure misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", action="store_true", help="count only")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "flops": count(),
    }
    failed = [row["config"] for row in result["flops"] if row["shared_over_naive"] > row["limit"]]
    print(
        f"{'configuration':18}{'base TF':>9}{'naive':>9}{'shared':>9}{'ratio':>8}{'limit':>7}  extra", file=sys.stderr
    )
    for row in result["flops"]:
        print(
            f"{row['config']:18}{row['base_tflop']:9.2f}{row['naive_tflop']:9.2f}{row['shared_tflop']:9.2f}"
            f"{row['shared_over_naive']:8.3f}{row['limit']:7.2f}  "
            f"+{row['extra_naive']:.0%} -> +{row['extra_shared']:.0%}",
            file=sys.stderr,
        )
    if not options.flops:
        result["wall"] = w = wall(options.repeats)
        print(
            f"whole run, SD1.5-shaped: plain {w['seconds']['plain']:.2f} s, "
            f"diffusers' PAG {w['seconds']['theirs']:.2f} s, attnctl {w['seconds']['ours']:.2f} s; "
            f"wall ratio {w['wall_ratio']:.3f} at FLOP ratio {w['flop_ratio']:.3f}; "
            f"latents differ by {w['relative_difference_of_latents']:.1e}",
            file=sys.stderr,
        )
        if w["wall_ratio"] > w["flop_ratio"] + 0.05:
            failed.append("wall")
    result["failed"] = failed
    print(json.dumps(result, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
