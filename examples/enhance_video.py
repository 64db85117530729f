"""Enhance-A-Video on CogVideoX or Wan, the same noise.

    python examples/enhance_video.py --model THUDM/CogVideoX-5b --prompt "a red panda climbs a tree"
    python examples/enhance_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    python examples/enhance_video.py --shapes        # offline, with a tiny untrained Wan

VRAM: about 30 GB for CogVideoX-5b at 49 frames of 720 x 480, about 18 GB for Wan at 33 frames of 832 x 480, in bfloat16
(estimates, not measured); pipe.enable_model_cpu_offload() in the place of .to("cuda") needs less.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attnctl
from attnctl.processors import EnhanceAVideo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--shapes", action="store_true", help="use a tiny untrained model")
parser.add_argument("--model", default="THUDM/CogVideoX-5b", help="a CogVideoX, Wan or HunyuanVideo repository")
parser.add_argument("--prompt", default="a red panda climbs a tree")
parser.add_argument("--frames", type=int, help="frames of the video")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out"))
args = parser.parse_args()


def tiny_wan() -> Any:
    """Build a Wan pipeline of 33,576 random weights, without text encoder and autoencoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4, "ffn_dim": 32}
    model = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, freq_dim=32, rope_max_seq_len=32, **sizes)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    return WanPipeline(transformer=model.eval(), scheduler=scheduler, **parts)


call: dict[str, Any]
if args.shapes:
    pipe = tiny_wan()
    text = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(1))
    call = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "height": 96, "width": 64, "num_frames": 9}
    call |= {"num_inference_steps": 5, "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
else:
    from diffusers import DiffusionPipeline

    if not torch.cuda.is_available():
        raise SystemExit("These models need a CUDA GPU; --shapes runs anywhere.")
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to("cuda")
    call = {"prompt": args.prompt, "num_frames": args.frames or (33 if "Wan" in args.model else 49)}


def film(name: str) -> Any:
    """Generate from the same noise every time, and save."""
    frames = pipe(generator=torch.Generator("cpu").manual_seed(args.seed), **call).frames
    if args.shapes:
        np.save(args.out / f"{name}.npy", frames.numpy())
    else:
        from diffusers.utils import export_to_video

        export_to_video(frames[0], args.out / f"{name}.mp4", fps=16)
    return frames


args.out.mkdir(parents=True, exist_ok=True)
plain = film("plain")
with attnctl.control(pipe, EnhanceAVideo()) as handle:
    enhanced = film("enhanced")
    print(handle.report())
if args.shapes:
    print(f"the latents move by {float((enhanced - plain).norm() / plain.norm()):.3f} of their length")
print(f"wrote plain and enhanced to {args.out}")
