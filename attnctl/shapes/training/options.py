"""What the trainings of mmdit, video and videodit share: command line options and the export of averaged weights."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnctl.errors import ConfigError
from attnctl.shapes.training.loop import Plan, load_checkpoint, named_parameters

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["add_options", "load_average", "load_base", "plan_from", "put_average", "shares"]


def add_options(parser: argparse.ArgumentParser, *, steps: int, batch: int | None, lr: float, cooldown: float) -> None:
    """Add the options that the trainings share, with their defaults; without `batch`, none of those of a base model."""
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and results")
    if batch is not None:
        parser.add_argument("--base", type=Path, help="folder of a text2image pipeline (default: the shipped one)")
        parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--cache", type=Path, help="folder of encoded scenes, made where missing (default: OUT/cache)")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--cooldown", type=float, default=cooldown, help="last part of the steps, where lr falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fp32", action="store_true", help="train in float32 instead of bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="one can be as fast on a busy machine")
    parser.add_argument("--export-only", action="store_true", help="write out the last checkpoint, train nothing")
    parser.add_argument("--export", type=Path, help="write the pipeline folder here (default: OUT/pipeline)")


def plan_from(args: argparse.Namespace) -> Plan:
    """Make the training plan that the options ask for.

    Raises:
        ConfigError: a number is out of range, or the device is not there.
    """
    if str(args.device).startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"Device {args.device!r} was asked for, but this torch sees no CUDA GPU: use --device cpu.")
    if getattr(args, "batch", 1) < 1:
        raise ConfigError(f"--batch must be at least 1, got {args.batch}.")
    return Plan(
        steps=args.steps, optimizer=args.optimizer, lr=args.lr, cooldown=args.cooldown,
        seed=args.seed, save_every=args.save_every,
    )  # fmt: skip


def load_base(folder: Path | None) -> StableDiffusionPipeline:
    """Load the text2image pipeline to build on, its weights frozen, in float32 on the CPU.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    from attnctl.shapes.load import load_shapes

    pipe = load_shapes("text2image", folder=folder)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False)
    return pipe


def put_average(average: dict[str, Tensor], modules: dict[str, nn.Module]) -> None:
    """Load averaged weights, named "module/parameter", into their modules; what was not trained stays."""
    for key, module in modules.items():
        state = {n.removeprefix(f"{key}/"): t for n, t in average.items() if n.startswith(f"{key}/")}
        module.load_state_dict(state, strict=False)


def load_average(out: Path, modules: dict[str, nn.Module]) -> int:
    """Load the averaged weights of the last checkpoint in `out` into `modules`; return the checkpoint's step.

    Raises:
        ConfigError: a file of the checkpoint is missing or damaged.
    """
    average = {n: p.detach().clone() for n, p in named_parameters(modules).items()}
    step = load_checkpoint(out, None, average)
    put_average(average, modules)
    return step


def shares(text: str) -> list[tuple[int, float]]:
    """Read "0.125" or "0.125,2000:0.5" as [(first step, share), ...].

    Raises:
        ConfigError: a share is not within 0..1, or the first one does not hold from step 0.
    """
    try:
        parts = [part.rpartition(":") for part in text.split(",")]
        result = [(int(first or 0), float(share)) for first, _, share in parts]
    except ValueError:
        result = []
    if not result or result[0][0] != 0 or any(not 0 <= share <= 1 for _, share in result):
        raise ConfigError(f"Shares look like '0.125' or '0.125,2000:0.5' and lie within 0..1, got {text!r}.")
    return result
