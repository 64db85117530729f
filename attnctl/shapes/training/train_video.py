"""Train the shapes video model: `python -m attnctl.shapes.training.train video --out runs/video`.

Motion modules for the UNet of text2image, and a text encoder that knows motion words (see `clips`). It is made in the
stages that `recipe` lists, each in a folder of its own in `--out`: the same command again skips those that are complete
and goes on with the one that is not. An option of a single stage, such as `--steps` or `--start`, trains that stage
alone, in `OUT/motion`. The model card says how the shipped one was made.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from attnctl.errors import ConfigError
from attnctl.shapes.training import clips as world
from attnctl.shapes.training.expected import Expected, make_expected
from attnctl.shapes.training.export import put_lineage, settle
from attnctl.shapes.training.loop import Plan, mend_checkpoint, train
from attnctl.shapes.training.options import add_options, load_average, load_base, plan_from, put_average, shares
from attnctl.shapes.training.recipe import STAGES, Stage, first_unfinished
from attnctl.shapes.training.words import teach_motion

if TYPE_CHECKING:
    from diffusers import (
        AnimateDiffPipeline,
        MotionAdapter,
        StableDiffusionPipeline,
        UNet2DConditionModel,
        UNetMotionModel,
    )
    from transformers import CLIPTextModel

__all__ = ["export_video", "main", "train_recipe", "train_video"]

# What a single stage takes for the options that are not given.
_SINGLE: dict[str, Any] = {
    "steps": 4000, "batch": 4, "frames": None, "lr": 2e-3, "cooldown": 0.4, "noisy": 0.5, "skew": [(0, 0.0)],
    "expect": [(0, 0.0)], "keep": False, "teach": 0, "anchor": 1.0, "start": None,
}  # fmt: skip


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
    stage: str | None = None,
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
        stage: name of the stage of a recipe that this is, for the record.
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
    facts |= {"stage": stage} if stage else {}
    put_lineage(out, start)
    average = train(modules, loss, out, plan, facts=facts, resume=resume, quiet=quiet)
    put_average(average, modules)
    return _assemble(base, text_encoder, adapter, unet)


def train_recipe(
    out: Path,
    plan: Plan,
    base: StableDiffusionPipeline,
    clips: Callable[[], world.Clips],
    expected: Callable[[], Expected],
    *,
    stages: Sequence[Stage] = STAGES,
    scale: float = 1.0,
    **options: Any,
) -> Path:
    """Train what is missing of the stages in `out`, each from the one before; return the last one's folder.

    Args:
        out: folder of the stages' folders.
        plan: what all stages share: optimiser, seed, warm-up.
        base: the text2image pipeline that gets motion; it is not changed.
        clips: gives the encoded clips; called only where a stage is left to train.
        expected: gives what captions let expect; called only where a stage that learns it is left.
        stages: the stages, in order.
        scale: what the steps of all stages, and those of the warm-up, are multiplied by.
        options: of `train_video` (device, quiet) and `clips.Motions` (bf16).

    Raises:
        ConfigError: a stage in `out` was trained with other settings, or lost the one before, or is damaged.
    """
    stages = [stage.scaled(scale) for stage in stages]
    plans = [stage.plan(plan, scale) for stage in stages]
    first = first_unfinished(out, stages, plans)
    if left := stages[first:]:
        data, means = clips(), expected() if any(stage.expect for stage in left) else None
        for n in range(first, len(stages)):
            stage = stages[n]
            start = out / stages[n - 1].name if n else None
            settings = {**stage.options(), "teach": stage.teach, "stage": stage.name}
            settings["expected"] = means if stage.expect else None
            train_video(out / stage.name, plans[n], base, data, resume=True, start=start, **settings, **options)
    return out / stages[-1].name


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
    args = _parse(argv)
    plan = plan_from(args)
    torch.set_num_threads(args.threads)

    out, base = args.out, load_base(args.base)
    folder: Path = out / "motion" if args.single else _last(out)
    if not args.export_only:

        def clips() -> world.Clips:
            with _on(base.vae, args.device):
                return world.make_clips(args.cache or out / "cache", base.vae, n=args.clips, seed=args.seed)

        def expected() -> Expected:
            with _on(base.vae, args.device):
                return make_expected(base.vae)

        where = {"bf16": not args.fp32, "device": args.device}
        if args.single:
            data, means = clips(), expected() if any(share for _, share in args.expect) else None
            options = {name: getattr(args, name) for name in _SINGLE if name not in ("steps", "lr", "cooldown")}
            train_video(folder, plan, base, data, resume=args.resume, expected=means, **options, **where)
        else:
            folder = train_recipe(out, plan, base, clips, expected, stages=STAGES, scale=args.scale, **where)
    target = args.export or out / "pipeline"
    step = export_video(folder, base, target)
    print(f"wrote {target} (step {step})")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; `single` tells whether an option of a single stage was given.

    Raises:
        ConfigError: --scale is not above 0, or given together with an option of a single stage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.shapes.training.train video", description=__doc__.splitlines()[0]
    )
    add_options(parser, steps=_SINGLE["steps"], batch=_SINGLE["batch"], lr=_SINGLE["lr"], cooldown=_SINGLE["cooldown"])
    parser.add_argument("--clips", type=int, default=3000, help="clips to encode")
    parser.add_argument("--scale", type=float, help="multiply the steps of all stages, to try them or to train longer")
    one = parser.add_argument_group("one stage alone", "with any of these, --steps, --batch, --lr or --cooldown")
    one.add_argument("--start", type=Path, help="folder of an earlier run whose weights to begin with")
    one.add_argument("--noisy", type=float, help="below 1, more of the noisy steps: t = u ** NOISY")
    one.add_argument("--frames", type=int, help="frames of a clip in a batch; fewer: more clips")
    one.add_argument("--teach", type=int, help="steps of the text encoder alone, with motion words")
    one.add_argument("--skew", type=shares, help="share of clips that move right or down only, STEP:SHARE from a step")
    one.add_argument("--expect", type=shares, help="share of a batch that learns the mean of what fits its caption")
    one.add_argument("--keep", action="store_true", help="learn the rest from what the UNet knew at the start")
    one.add_argument("--anchor", type=float, help="weight of what keeps still captions as they are")
    parser.set_defaults(**dict.fromkeys(_SINGLE))
    args = parser.parse_args(argv)

    given = [name for name in _SINGLE if getattr(args, name) is not None]
    # A folder that holds nothing but a single stage is what it is.
    alone = (args.out / "motion" / "checkpoint").exists() and not any((args.out / s.name).exists() for s in STAGES)
    args.single = bool(given) or (alone and (args.export_only or args.resume))
    for name in _SINGLE.keys() - set(given):
        setattr(args, name, _SINGLE[name])
    if args.scale is not None and given:
        raise ConfigError(f"--scale is for all stages together, but --{given[0]} asks for one alone: leave out one.")
    if args.scale is not None and not 0 < args.scale < math.inf:
        raise ConfigError(f"--scale must be above 0, got {args.scale:g}: 0.01 makes a hundredth of the steps.")
    args.scale = 1.0 if args.scale is None else args.scale
    return args


def _last(out: Path) -> Path:
    """Return the folder of the last stage that has left a checkpoint; of the first, where none has."""
    return next((out / s.name for s in reversed(STAGES) if mend_checkpoint(out / s.name)), out / STAGES[0].name)


@contextmanager
def _on(module: torch.nn.Module, device: str) -> Iterator[None]:
    """Lend a module to a device."""
    module.to(device)
    try:
        yield
    finally:
        module.cpu()


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
