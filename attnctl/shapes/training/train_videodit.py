"""Train the shapes videodit: `python -m attnctl.shapes.training.train videodit --out runs/videodit [--resume]`.

It takes four stages, each of which is skipped when its result is already in `--out`: the autoencoder (`vae`), a cache
of encoded clips (`cache`), text encoder and transformer together (`videodit`), and more training for the decoder
(`decoder`). Nothing of another model is needed.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attnctl.shapes.data import to_tensor
from attnctl.shapes.motion import Clip, render_clip, sample_clip
from attnctl.shapes.scenes import SIZE, sample
from attnctl.shapes.training import videodit
from attnctl.shapes.training.clips import Clips, cache_clips
from attnctl.shapes.training.export import settle
from attnctl.shapes.training.loop import Plan, train
from attnctl.shapes.training.options import add_options, load_average, plan_from, put_average
from attnctl.shapes.training.video_flow import COURSE, VideoFlow, course

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import T5TokenizerFast, UMT5EncoderModel

__all__ = [
    "export_videodit",
    "main",
    "make_dit_clips",
    "refine_video_decoder",
    "train_video_vae",
    "train_videodit",
]

_SEEN = 9  # frames of a clip that the autoencoder learns from: one alone, four after it, four after those
_CROP = SIZE // 2
_ROUGHNESS = 0.15  # in standard deviations of a latent
_MEASURED = 24  # clips that give the mean and the spread of the latents


def train_video_vae(
    out: Path,
    plan: Plan,
    *,
    batch: int = 2,
    bf16: bool = True,
    device: str = "cpu",
    resume: bool = False,
    quiet: bool = False,
) -> AutoencoderKLWan:
    """Train the autoencoder on fresh clips of one to three objects and return it, its weights frozen.

    Args:
        out: folder for `log.jsonl` and `checkpoint/`.
        plan: length and rates.
        batch: clips in a batch, of each of which two crops are seen.
        bf16: autocast to bfloat16.
        device: where to train.
        resume: go on from the checkpoint in `out` where there is one.
        quiet: no progress bar.

    Raises:
        ConfigError: `out` holds a checkpoint and `resume` is false, or the checkpoint is damaged.
    """
    torch.manual_seed(plan.seed)
    vae = videodit.build_vae().to(device)

    def loss(generator: torch.Generator, step: int) -> Tensor:
        x = _draw_crops(generator, batch, _SEEN).to(device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - x
        # The square keeps rare colours in the loss, which a median would ignore; see train.train_vae.
        return error.abs().mean() + 3 * error.square().mean() + 2e-4 * posterior.kl().float().sum() / noise.numel()

    average = train({"vae": vae}, loss, out, plan, facts={"batch": batch}, resume=resume, quiet=quiet)
    put_average(average, {"vae": vae})
    return _standardise(vae.requires_grad_(False).eval())


@torch.no_grad()
def _standardise(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Write the mean and the spread of every latent channel, over some clips, into the autoencoder's settings."""
    rng = np.random.default_rng(1)
    device = next(vae.parameters()).device
    latents = []
    for _ in range(_MEASURED):
        frames = render_clip(sample_clip(rng, frames=videodit.DIT_FRAMES), videodit.DIT_FRAMES)
        latents.append(vae.encode(to_tensor(frames).transpose(0, 1)[None].to(device)).latent_dist.mean.float())
    z = torch.cat(latents)
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae


def refine_video_decoder(
    out: Path,
    plan: Plan,
    vae: AutoencoderKLWan,
    *,
    batch: int = 1,
    bf16: bool = True,
    resume: bool = False,
    quiet: bool = False,
) -> AutoencoderKLWan:
    """Train the decoder on, on whole clips and for latents that are slightly wrong, as generated ones are.

    Args:
        out: folder for `log.jsonl` and `checkpoint/`.
        plan: length and rates.
        vae: the trained autoencoder; its encoder stays as it is.
        batch: clips in a batch, of each of which two crops are seen.
        bf16: autocast to bfloat16.
        resume: go on from the checkpoint in `out` where there is one.
        quiet: no progress bar.

    Raises:
        ConfigError: `out` holds a checkpoint and `resume` is false, or the checkpoint is damaged.
    """
    parts = _decoder(vae)
    device = vae.post_quant_conv.weight.device
    spread = torch.tensor(vae.config.latents_std, device=device)[:, None, None, None]

    def loss(generator: torch.Generator, step: int) -> Tensor:
        x = _draw_crops(generator, batch, videodit.DIT_FRAMES).to(device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean.float()
            noise = torch.randn(z.shape, generator=generator) * torch.rand(len(z), 1, 1, 1, 1, generator=generator)
            error = vae.decode(z + _ROUGHNESS * spread * noise.to(device)).sample.float() - x
        return error.abs().mean() + 3 * error.square().mean()

    average = train(parts, loss, out, plan, facts={"batch": batch}, resume=resume, quiet=quiet)
    put_average(average, parts)
    return vae.requires_grad_(False).eval()


def _decoder(vae: AutoencoderKLWan) -> dict[str, torch.nn.Module]:
    """Return what comes after the latents, ready to be trained; the rest is frozen."""
    vae.requires_grad_(False)
    names = ("decoder", "post_quant_conv")
    return {name: getattr(vae, name).requires_grad_(True) for name in names}


def _draw_crops(generator: torch.Generator, n: int, frames: int) -> Tensor:
    """Draw two crops each of `n` clips of one to three objects, float [2 n, 3, frames, 32, 32] in -1..1."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    crops = []
    for _ in range(n):
        scene = sample(rng, 1 + int(rng.integers(3)), "any")
        angles, paces = rng.uniform(0, 2 * np.pi, len(scene.things)), rng.uniform(0, 2, len(scene.things))
        ways = zip(paces * np.cos(angles), paces * np.sin(angles), strict=True)
        # Some frames later objects have come closer, and stand partly outside.
        clip = Clip(scene, tuple((float(u), float(v)) for u, v in ways))
        clip = replace(clip, scene=clip.frame(int(rng.integers(_SEEN))))
        x = to_tensor(render_clip(clip, frames)).transpose(0, 1)
        places = rng.integers(0, SIZE - _CROP + 1, (4, 2)).tolist()
        parts = torch.stack([x[:, :, i : i + _CROP, j : j + _CROP] for i, j in places])
        crops.append(parts[parts.std((2, 3, 4)).sum(1).topk(2).indices])
    return torch.cat(crops)


def make_dit_clips(folder: Path, vae: AutoencoderKLWan, *, n: int, seed: int = 0) -> Clips:
    """Encode `n` training clips once, as latents [n, 8, 9, 16, 16], or read them back from `folder`."""
    device = next(vae.parameters()).device

    def encode(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return videodit.encode_video(vae, x.transpose(0, 1)[None].to(device))[0]

    return cache_clips(folder, encode, n=n, seed=seed, frames=videodit.DIT_FRAMES)


def train_videodit(
    out: Path,
    plan: Plan,
    vae: AutoencoderKLWan,
    clips: Clips,
    *,
    device: str = "cpu",
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> WanPipeline:
    """Train transformer and text encoder on cached clips and return the assembled pipeline with averaged weights.

    Args:
        out: folder for `log.jsonl` and `checkpoint/`.
        plan: length and rates.
        vae: the trained autoencoder, for the pipeline.
        clips: encoded clips.
        device: where to train.
        resume: go on from the checkpoint in `out` where there is one.
        quiet: no progress bar.
        options: of `video_flow.VideoFlow`.

    Raises:
        ConfigError: `out` holds a checkpoint and `resume` is false, or the checkpoint is damaged.
    """
    tokenizer, text_encoder, transformer = _fresh(out, plan.seed)
    modules = {"text_encoder": text_encoder.to(device), "transformer": transformer.to(device)}
    loss = VideoFlow(transformer, text_encoder, tokenizer, clips, **options)
    facts = {"course": [astuple(phase) for phase in loss.phases], "anchor": loss.share, "clips": len(clips.captions)}
    average = train(modules, loss, out, plan, facts=facts, resume=resume, quiet=quiet)
    put_average(average, modules)
    return videodit.assemble(vae, text_encoder, tokenizer, transformer)


def export_videodit(out: Path, vae: AutoencoderKLWan, target: Path) -> int:
    """Write the averaged weights of the last checkpoint as a pipeline folder in fp16; return the checkpoint's step.

    Raises:
        ConfigError: a file of the checkpoint is missing or damaged.
    """
    tokenizer, text_encoder, transformer = _fresh(out, 0)
    step = load_average(out, {"text_encoder": text_encoder, "transformer": transformer})
    pipe = videodit.assemble(copy.deepcopy(vae).cpu(), text_encoder, tokenizer, transformer)
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        torch.nn.Module.to(part, dtype=torch.float16)
    pipe.save_pretrained(target, safe_serialization=True)
    settle(out, target, step, tokenizer=videodit.write_t5_tokenizer, clip=False)
    return step


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.shapes.training.train videodit", description=__doc__.splitlines()[0]
    )
    add_options(parser, steps=6000, batch=None, lr=2e-3, cooldown=0.3)
    parser.add_argument("--vae-steps", type=int, default=1100)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--clips", type=int, default=2400, help="clips to encode")
    parser.add_argument(
        "--course", type=course, default=COURSE,
        help="latent frames and clips of a batch, STEP:FRAMESxCLIPS from a step on (default: "
        + ",".join(map(str, COURSE)) + ")",
    )  # fmt: skip
    parser.add_argument("--anchor", type=float, default=0.5, help="share of clips of which one frame is nearly clean")
    args = parser.parse_args(argv)
    plan = plan_from(args)
    torch.set_num_threads(args.threads)

    out: Path = args.out
    bf16 = not args.fp32
    vae_plan = Plan(steps=args.vae_steps, optimizer="muon", lr=2e-3, seed=args.seed, average=0.99, save_every=200)
    vae = train_video_vae(out / "vae", vae_plan, resume=True, device=args.device, bf16=bf16)
    if not args.export_only:
        clips = make_dit_clips(args.cache or out / "cache", vae, n=args.clips, seed=args.seed)
        train_videodit(
            out / "videodit", plan, vae, clips, resume=args.resume,
            phases=args.course, anchor=args.anchor, bf16=bf16, device=args.device,
        )  # fmt: skip
        refine = replace(vae_plan, steps=args.decoder_steps, lr=1e-3, seed=args.seed + 1, cooldown=0.7)
        vae = refine_video_decoder(out / "decoder", refine, vae, bf16=bf16, resume=True)
    elif (out / "decoder" / "checkpoint").exists():
        load_average(out / "decoder", _decoder(vae))
    target = args.export or out / "pipeline"
    step = export_videodit(out / "videodit", vae, target)
    print(f"wrote {target} (step {step})")
    return 0


def _fresh(out: Path, seed: int) -> tuple[T5TokenizerFast, UMT5EncoderModel, WanTransformer3DModel]:
    torch.manual_seed(seed)
    tokenizer = videodit.build_tokenizer(out / "tokenizer")
    return tokenizer, videodit.build_text_encoder(tokenizer), videodit.build_transformer()
