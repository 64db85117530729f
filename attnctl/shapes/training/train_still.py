"""Train shapes video-still: `python -m attnctl.shapes.training.train video-still --out runs/still`.

The motion adapter of the shipped video model, tuned on captions of which a share lies: they tell of motion, and the
clip stands still, as the clips of web captions often do. It is made for studies of motion controls, such as BroadWay.
UNet, text encoder and autoencoder stay those of video; what is written is a motion adapter.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnctl.errors import ConfigError
from attnctl.shapes.load import load_shapes
from attnctl.shapes.training import clips as world
from attnctl.shapes.training.export import settle
from attnctl.shapes.training.loop import Plan, train
from attnctl.shapes.training.options import add_options, load_average, plan_from, put_average

if TYPE_CHECKING:
    from diffusers import AnimateDiffPipeline

__all__ = ["export_still", "main", "train_still"]


def train_still(
    out: Path,
    plan: Plan,
    clips: world.Clips,
    *,
    folder: Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> AnimateDiffPipeline:
    """Tune the motion modules of a video pipeline and return it with averaged weights.

    Args:
        out: folder for `log.jsonl` and `checkpoint/`.
        plan: length and rates.
        clips: encoded clips.
        folder: the video pipeline (default: the shipped one).
        device: where to train.
        resume: go on from the checkpoint in `out` where there is one.
        quiet: no progress bar.
        options: of `clips.Motions`.

    Raises:
        ConfigError: `out` holds a checkpoint and `resume` is false, or the checkpoint is damaged.
    """
    pipe = _trainable(folder)
    modules = {"unet": pipe.unet.to(device)}
    loss = world.Motions(pipe.unet, pipe.text_encoder.to(device), pipe.tokenizer, clips, anchor=0.0, **options)
    facts = {name: getattr(loss, name) for name in ("batch", "frames", "noisy", "lies")}
    average = train(
        modules, loss, out, plan, facts=facts | {"clips": len(clips.captions)}, resume=resume, quiet=quiet
    )  # fmt: skip
    put_average(average, modules)
    return pipe.to("cpu")


def export_still(out: Path, target: Path, folder: Path | None = None) -> int:
    """Write the averaged motion adapter of the last checkpoint in fp16; return the checkpoint's step.

    Raises:
        ConfigError: a file of the checkpoint is missing or damaged.
    """
    pipe = _trainable(folder)
    step = load_average(out, {"unet": pipe.unet})
    pipe.motion_adapter.load_state_dict(world.motion_parameters(pipe.unet))
    pipe.motion_adapter.half().save_pretrained(target / "motion_adapter", safe_serialization=True)
    settle(out, target, step)
    return step


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.shapes.training.train video-still", description=__doc__.splitlines()[0]
    )
    add_options(parser, steps=120, batch=4, lr=2e-3, cooldown=0.6)
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip in a batch, spread over the clip")
    parser.add_argument("--clips", type=int, default=1000, help="clips to encode")
    parser.add_argument("--lies", type=float, default=0.5, help="share of the clips that stand still whatever is said")
    args = parser.parse_args(argv)
    if args.base is not None and not (args.base / "motion_adapter").is_dir():
        raise ConfigError(f"--base {args.base} holds no motion_adapter: pass the folder of a video pipeline.")
    plan = replace(plan_from(args), warmup=10)
    torch.set_num_threads(args.threads)
    out: Path = args.out
    if not args.export_only:
        vae = load_shapes("video", args.device, folder=args.base).vae
        clips = world.make_clips(args.cache or out / "cache", vae, n=args.clips, seed=args.seed)
        train_still(
            out / "still", plan, clips, folder=args.base, device=args.device, resume=args.resume,
            batch=args.batch, frames=args.frames, lies=args.lies, bf16=not args.fp32,
        )  # fmt: skip
    target = args.export or out / "pipeline"
    step = export_still(out / "still", target, args.base)
    print(f"wrote {target} (step {step})")
    return 0


def _trainable(folder: Path | None) -> Any:
    """Load a video pipeline of which nothing but the motion modules is trained."""
    from diffusers.models.attention_processor import AttnProcessor

    pipe: Any = load_shapes("video", folder=folder)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet, pipe.motion_adapter):
        part.requires_grad_(False)
    # On a CPU the fused kernel's backward takes more than twice as long as attention written out.
    pipe.unet.set_attn_processor(AttnProcessor())
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_(".motion_modules." in name)
    return pipe
