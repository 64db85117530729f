"""Train the shapes video model: `python -m attnctl.shapes.train video --out runs/video [--resume]`.

Motion modules for the UNet of text2image, and a text encoder that knows motion words (see `clips`). Without options it
learns how things move, but not where to: that takes a second run with `--teach`, `--expect` and `--keep`, and a third
on clips again, each with `--start` of the one before. The model card says with which options the shipped one was made.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from attnctl.errors import ConfigError
from attnctl.shapes import clips as world
from attnctl.shapes.expected import make_expected
from attnctl.shapes.export import put_lineage, settle
from attnctl.shapes.loop import Plan, train
from attnctl.shapes.options import add_options, load_average, load_base, plan_from, put_average, shares
from attnctl.shapes.words import teach_motion

if TYPE_CHECKING:
    from diffusers import (
        AnimateDiffPipeline,
        MotionAdapter,
        StableDiffusionPipeline,
        UNet2DConditionModel,
        UNetMotionModel,
    )
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
    start: Path | None = None,
    teach: int = 0,
    **options: Any,
) -> AnimateDiffPipeline:
    """Train motion modules and text encoder on cached clips and return the assembled pipeline with averaged weights.

    Args:
        out: folder for `log.jsonl` and `checkpoint/`.
        plan: length and rates.
        base: the text2image pipeline that gets motion; it is not changed.
        clips: encoded clips.
        device: where to train.
        resume: go on from the checkpoint in `out` where there is one.
        quiet: no progress bar.
        start: folder of an earlier run whose weights to begin with.
        teach: how many steps the text encoder of the base is first taught motion words; 0: not.
        options: of `clips.Motions`.

    Raises:
        ConfigError: `out` holds a checkpoint and `resume` is false, or the checkpoint is damaged.
    """
    text_encoder, adapter, unet = _fresh(plan.seed, base)
    if start is not None:
        _start_from(start, {"text_encoder": text_encoder, "unet": unet})
    if teach:
        text_encoder.load_state_dict(base.text_encoder.state_dict())
        teach_motion(text_encoder, base.tokenizer, steps=teach, seed=plan.seed)
    modules = {"text_encoder": text_encoder.to(device), "unet": unet.to(device)}
    loss = world.Motions(unet, text_encoder, base.tokenizer, clips, **options)
    facts = {name: getattr(loss, name) for name in ("batch", "frames", "noisy", "skew", "expect")}
    facts |= {"anchor": loss.weight, "keep": loss.keep is not None, "teach": teach, "clips": len(clips.captions)}
    put_lineage(out, start)
    average = train(modules, loss, out, plan, facts=facts, resume=resume, quiet=quiet)
    put_average(average, modules)
    return _assemble(base, text_encoder, adapter, unet)


def export_video(out: Path, base: StableDiffusionPipeline, target: Path) -> int:
    """Write the averaged weights of the last checkpoint as a pipeline folder in fp16; return the checkpoint's step.

    The UNet is stored without the motion modules and these as a MotionAdapter, so that no weight is there twice;
    `AnimateDiffPipeline.from_pretrained` joins them.

    Raises:
        ConfigError: a file of the checkpoint is missing or damaged.
    """
    text_encoder, adapter, unet = _fresh(0, base)
    step = load_average(out, {"text_encoder": text_encoder, "unet": unet})
    pipe = _assemble(base, text_encoder, adapter, unet)
    pipe.register_modules(unet=_flat(base, unet))
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
    parser.add_argument("--noisy", type=float, default=0.5, help="below 1, more of the noisy steps: t = u ** NOISY")
    parser.add_argument("--frames", type=int, help="frames of a clip in a batch; fewer: more clips")
    parser.add_argument("--teach", type=int, default=0, help="steps of the text encoder alone, with motion words")
    parser.add_argument(
        "--skew",
        type=shares,
        default="0",
        help="share of clips that move right or down only, STEP:SHARE from a step on",
    )
    parser.add_argument(
        "--expect", type=shares, default="0", help="share of a batch that learns the mean of what fits its caption"
    )
    parser.add_argument("--keep", action="store_true", help="learn the rest from what the UNet knew at the start")
    parser.add_argument("--start", type=Path, help="folder of an earlier run whose weights to begin with")
    parser.add_argument("--anchor", type=float, default=1.0, help="weight of what keeps still captions as they are")
    args = parser.parse_args(argv)
    plan = plan_from(args)
    torch.set_num_threads(args.threads)

    out: Path = args.out
    base = load_base(args.base)
    if not args.export_only:
        base.vae.to(args.device)
        clips = world.make_clips(args.cache or out / "cache", base.vae, n=args.clips, seed=args.seed)
        expected = make_expected(base.vae) if any(s for _, s in args.expect) else None
        base.vae.cpu()
        train_video(
            out / "motion", plan, base, clips, resume=args.resume,
            start=args.start, teach=args.teach, batch=args.batch, frames=args.frames, anchor=args.anchor,
            noisy=args.noisy, skew=args.skew, expected=expected, expect=args.expect,
            keep=args.keep, bf16=not args.fp32, device=args.device,
        )  # fmt: skip
    target = args.export or out / "pipeline"
    step = export_video(out / "motion", base, target)
    print(f"wrote {target} (step {step})")
    return 0


def _flat(base: StableDiffusionPipeline, unet: UNetMotionModel) -> UNet2DConditionModel:
    """Return the trained UNet without its motion modules."""
    flat: UNet2DConditionModel = copy.deepcopy(base.unet)
    flat.load_state_dict(world.flat_parameters(unet))
    return flat


def _assemble(
    base: StableDiffusionPipeline, text_encoder: CLIPTextModel, adapter: MotionAdapter, unet: UNetMotionModel
) -> AnimateDiffPipeline:
    """Put the parts together, leaving the base as it is."""
    adapter.load_state_dict(world.motion_parameters(unet))
    tuned = copy.copy(base)
    tuned.unet = _flat(base, unet)
    return world.assemble(tuned, text_encoder, adapter)


def _start_from(folder: Path, modules: dict[str, torch.nn.Module]) -> None:
    """Take over the averaged weights of an earlier run, as far as it has them.

    Raises:
        ConfigError: there is no checkpoint.
    """
    path = folder / "checkpoint" / "average.safetensors"
    if not path.is_file():
        raise ConfigError(f"--start {folder} holds no checkpoint: expected {path}.")
    put_average(load_file(path), modules)


def _fresh(seed: int, base: StableDiffusionPipeline) -> tuple[CLIPTextModel, MotionAdapter, UNetMotionModel]:
    torch.manual_seed(seed)
    adapter = world.build_adapter(base.unet)
    return copy.deepcopy(base.text_encoder).requires_grad_(True), adapter, world.with_motion(base.unet, adapter)
