"""Train the shapes mmdit: `python -m attnctl.shapes.training.train mmdit --out runs/mmdit [--resume]`.

It takes the autoencoder and the tokenizer of text2image as they are, and starts its text encoder from text2image's, in
which words are told apart and colours are bound to nouns already; transformer and text encoder are trained together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnctl.shapes.data import Latents, make_cache
from attnctl.shapes.training import mmdit, models
from attnctl.shapes.training.export import settle
from attnctl.shapes.training.loop import Plan, train
from attnctl.shapes.training.options import add_options, load_average, load_base, plan_from, put_average
from attnctl.shapes.training.train import shares

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["export_mmdit", "main", "train_mmdit"]


def train_mmdit(
    out: Path,
    plan: Plan,
    base: StableDiffusionPipeline,
    latents: Latents,
    *,
    device: str = "cpu",
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> StableDiffusion3Pipeline:
    """Train transformer and text encoder on cached latents and return the assembled pipeline with averaged weights.

    Args:
        out: folder for `log.jsonl` and `checkpoint/`.
        plan: length and rates.
        base: the text2image pipeline whose autoencoder and text encoder are built on.
        latents: encoded scenes.
        device: where to train.
        resume: go on from the checkpoint in `out` where there is one.
        quiet: no progress bar.
        options: of `mmdit.Flow`.

    Raises:
        ConfigError: `out` holds a checkpoint and `resume` is false, or the checkpoint is damaged.
    """
    tokenizer, text_encoder, transformer = _fresh(out, plan.seed, base)
    modules = {"text_encoder": text_encoder.to(device), "transformer": transformer.to(device)}
    loss = mmdit.Flow(transformer, text_encoder, tokenizer, latents, **options)
    facts = {"batch": loss.batch, "pairs": [list(p) for p in loss.pairs], "scenes": len(latents.captions)}
    average = train(modules, loss, out, plan, facts=facts, resume=resume, quiet=quiet)
    put_average(average, modules)
    return mmdit.assemble(base.vae, text_encoder, tokenizer, transformer)


def export_mmdit(out: Path, base: StableDiffusionPipeline, target: Path) -> int:
    """Write the averaged weights of the last checkpoint as a pipeline folder in fp16; return the checkpoint's step.

    Raises:
        ConfigError: a file of the checkpoint is missing or damaged.
    """
    tokenizer, text_encoder, transformer = _fresh(out, 0, base)
    step = load_average(out, {"text_encoder": text_encoder, "transformer": transformer})
    pipe = mmdit.assemble(base.vae, text_encoder, tokenizer, transformer)
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        torch.nn.Module.to(part, dtype=torch.float16)
    pipe.save_pretrained(target, safe_serialization=True)
    settle(out, target, step)
    return step


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.shapes.training.train mmdit", description=__doc__.splitlines()[0]
    )
    add_options(parser, steps=5000, batch=16, lr=2e-3, cooldown=0.35)
    parser.add_argument("--scenes", type=int, default=12000, help="single-object scenes to encode")
    parser.add_argument("--pair-scenes", type=int, default=18000, help="two-object scenes to encode")
    parser.add_argument(
        "--pairs", type=shares, default="0.25", help="share of two-object scenes, STEP:SHARE from a step on"
    )
    args = parser.parse_args(argv)
    plan = plan_from(args)
    torch.set_num_threads(args.threads)

    out: Path = args.out
    base = load_base(args.base)
    if not args.export_only:
        base.vae.to(args.device)
        latents = make_cache(
            args.cache or out / "cache", base.vae, n_single=args.scenes, n_pairs=args.pair_scenes, seed=args.seed
        )
        train_mmdit(
            out / "mmdit", plan, base, latents, resume=args.resume,
            batch=args.batch, pairs=args.pairs, bf16=not args.fp32, device=args.device,
        )  # fmt: skip
        base.vae.cpu()
    target = args.export or out / "pipeline"
    step = export_mmdit(out / "mmdit", base, target)
    print(f"wrote {target} (step {step})")
    return 0


def _fresh(
    out: Path, seed: int, base: StableDiffusionPipeline
) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection, SD3Transformer2DModel]:
    torch.manual_seed(seed)
    tokenizer = models.build_tokenizer(out / "tokenizer")
    text_encoder = mmdit.build_text_encoder(tokenizer)
    mmdit.inherit_text(text_encoder, base.text_encoder)
    return tokenizer, text_encoder, mmdit.build_transformer()
