"""Train the shapes video model: `python -m attnctl.shapes.train video --out runs/video [--resume]`.

Motion modules for the frozen UNet of text2image, and a text encoder that knows motion words (see `clips`).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnctl.shapes import clips as world
from attnctl.shapes.export import settle
from attnctl.shapes.loop import Plan, train
from attnctl.shapes.options import add_options, load_average, load_base, plan_from, put_average

if TYPE_CHECKING:
    from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline, UNetMotionModel
    from transformers import CLIPTextModel

__all__ = ["export_video", "main", "train_video"]


def train_video(
    out: Path,
    plan: Plan,
    base: StableDiffusionPipeline,
    clips: world.Clips,
    *,
    device: str = "cpu",
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> AnimateDiffPipeline:
    """Train motion modules and text encoder on cached clips and return the assembled pipeline with averaged weights.

    Args:
        out: folder for `log.jsonl` and `checkpoint/`.
        plan: length and rates.
        base: the text2image pipeline that gets motion; its own weights stay as they are.
        clips: encoded clips.
        device: where to train.
        resume: go on from the checkpoint in `out` where there is one.
        quiet: no progress bar.
        options: of `clips.Motions`.

    Raises:
        ConfigError: `out` holds a checkpoint and `resume` is false, or the checkpoint is damaged.
    """
    text_encoder, adapter, unet = _fresh(plan.seed, base)
    modules = {"text_encoder": text_encoder.to(device), "unet": unet.to(device)}
    loss = world.Motions(unet, text_encoder, base.tokenizer, clips, **options)
    facts = {"batch": loss.batch, "anchor": loss.weight, "clips": len(clips.captions)}
    average = train(modules, loss, out, plan, facts=facts, resume=resume, quiet=quiet)
    put_average(average, modules)
    adapter.load_state_dict(world.motion_parameters(unet))
    return world.assemble(base, text_encoder, adapter)


def export_video(out: Path, base: StableDiffusionPipeline, target: Path) -> int:
    """Write the averaged weights of the last checkpoint as a pipeline folder in fp16; return the checkpoint's step.

    The UNet is stored without the motion modules and these as a MotionAdapter, so that no weight is there twice;
    `AnimateDiffPipeline.from_pretrained` joins them.

    Raises:
        ConfigError: a file of the checkpoint is missing or damaged.
    """
    text_encoder, adapter, unet = _fresh(0, base)
    step = load_average(out, {"text_encoder": text_encoder, "unet": unet})
    adapter.load_state_dict(world.motion_parameters(unet))
    pipe = world.assemble(base, text_encoder, adapter)
    pipe.register_modules(unet=base.unet)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet, pipe.motion_adapter):
        torch.nn.Module.to(part, dtype=torch.float16)
    pipe.save_pretrained(target, safe_serialization=True)
    settle(out, target, step)
    return step


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m attnctl.shapes.train video", description=__doc__.splitlines()[0])
    add_options(parser, steps=4000, batch=4, lr=2e-3, cooldown=0.4)
    parser.add_argument("--clips", type=int, default=3000, help="clips to encode")
    parser.add_argument("--anchor", type=float, default=1.0, help="weight of what keeps still captions as they are")
    args = parser.parse_args(argv)
    plan = plan_from(args)
    torch.set_num_threads(args.threads)

    out: Path = args.out
    base = load_base(args.base)
    if not args.export_only:
        base.vae.to(args.device)
        clips = world.make_clips(args.cache or out / "cache", base.vae, n=args.clips, seed=args.seed)
        base.vae.cpu()
        train_video(
            out / "motion", plan, base, clips, resume=args.resume,
            batch=args.batch, anchor=args.anchor, bf16=not args.fp32, device=args.device,
        )  # fmt: skip
    target = args.export or out / "pipeline"
    step = export_video(out / "motion", base, target)
    print(f"wrote {target} (step {step})")
    return 0


def _fresh(seed: int, base: StableDiffusionPipeline) -> tuple[CLIPTextModel, MotionAdapter, UNetMotionModel]:
    torch.manual_seed(seed)
    adapter = world.build_adapter(base.unet)
    return copy.deepcopy(base.text_encoder).requires_grad_(True), adapter, world.with_motion(base.unet, adapter)
