"""Train the shapes models: `python -m attnctl.shapes.training.train text2image --out runs/t2i [--resume]`.

text2image takes four stages, each of which is skipped when its result is already in `--out`: the autoencoder (`vae`), a
cache of encoded scenes (`cache`), text encoder and UNet together (`unet`), and more training for the decoder
(`decoder`). The model `vae` is the first and the last of them. `mmdit` and `video` build on its result: see
`train_mmdit` and `train_video`; `videodit` stands alone: see `train_videodit`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnctl.shapes.data import Latents, draw_crops, draw_images, encode_captions, make_cache
from attnctl.shapes.training import models
from attnctl.shapes.training.export import settle
from attnctl.shapes.training.loop import Plan, load_checkpoint, named_parameters, train
from attnctl.shapes.training.options import shares

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = ["Denoising", "export", "finish_vae", "main", "train_text2image", "train_vae"]

_SNR_CAP = 5.0
_ROUGHNESS = 0.15  # in standard deviations of a latent


def train_vae(
    out: Path, plan: Plan, *, batch: int = 8, device: str = "cpu", resume: bool = False, quiet: bool = False
) -> AutoencoderKL:
    """Train the autoencoder on fresh scenes of one to three objects and return it."""
    torch.manual_seed(plan.seed)
    vae = models.build_vae().to(device)

    def loss(generator: torch.Generator, step: int) -> Tensor:
        x = draw_images(generator, batch)
        if torch.rand((), generator=generator) < 0.6:
            # Four crops cost as much as one picture and show four times as many edges.
            x = draw_crops(generator, x, 4)
        x = x.to(device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - x
        # L1 alone forgets rare colours for a long time (a median ignores them); the square brings them in at once.
        # The KL only keeps the latents of order one and the decoder tolerant of small errors.
        return error.abs().mean() + 3 * error.square().mean() + 2e-4 * posterior.kl().mean() / noise[0].numel()

    average = train({"vae": vae}, loss, out, plan, resume=resume, quiet=quiet)
    return finish_vae(vae, average)


@torch.no_grad()
def finish_vae(vae: AutoencoderKL, average: dict[str, Tensor]) -> AutoencoderKL:
    """Load averaged weights into the autoencoder and give every latent channel zero mean and unit variance."""
    vae.load_state_dict({n.removeprefix("vae/"): t for n, t in average.items()})
    vae.eval()
    x = draw_images(torch.Generator().manual_seed(1), 128).to(vae.device)
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(32)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    # Pipelines know one scaling factor only; the 1x1 convolutions on both sides of the latents take the rest exactly.
    into, back = vae.quant_conv, vae.post_quant_conv
    into.bias.sub_(torch.cat([mean, 2 * std.log()]))
    into.weight.div_(torch.cat([std, torch.ones_like(std)])[:, None, None, None])
    into.bias.div_(torch.cat([std, torch.ones_like(std)]))
    back.bias.add_(back.weight[:, :, 0, 0] @ mean)
    back.weight.mul_(std[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)
    return vae


def refine_decoder(out: Path, plan: Plan, vae: AutoencoderKL, *, resume: bool = False) -> AutoencoderKL:
    """Train the decoder on, for the encoder as it is and for latents that are slightly wrong, as generated ones are."""
    vae.requires_grad_(False)
    parts = {"decoder": vae.decoder.requires_grad_(True), "post_quant_conv": vae.post_quant_conv.requires_grad_(True)}

    def loss(generator: torch.Generator, step: int) -> Tensor:
        x = draw_images(generator, 8)
        if torch.rand((), generator=generator) < 0.6:
            x = draw_crops(generator, x, 4)
        x = x.to(vae.device)
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean
        noise = torch.randn(z.shape, generator=generator) * torch.rand(len(z), 1, 1, 1, generator=generator)
        error = vae.decode(z + _ROUGHNESS * noise.to(vae.device)).sample - x
        return error.abs().mean() + 3 * error.square().mean()

    average = train(parts, loss, out, plan, resume=resume)
    vae.load_state_dict(average_to_state(average), strict=False)
    return vae.requires_grad_(False).eval()


def average_to_state(average: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename averaged weights from "module/parameter" to "module.parameter"."""
    return {n.replace("/", ".", 1): t for n, t in average.items()}


class Denoising:
    """The training loss of text2image: v-prediction on cached latents, a tenth of the prompts empty."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        latents: Latents,
        *,
        batch: int = 64,
        pairs: float | Sequence[tuple[int, float]] = 0.125,
        drop: float = 0.1,
        bf16: bool = True,
    ) -> None:
        self.unet, self.text_encoder, self.latents = unet, text_encoder, latents
        self.batch, self.drop, self.bf16 = batch, drop, bf16
        self.pairs = [(0, pairs)] if isinstance(pairs, float) else list(pairs)
        self.device = next(unet.parameters()).device
        self.ids = encode_captions(tokenizer, [*latents.captions, ""])
        self.scheduler = models.build_scheduler()
        snr = self.scheduler.alphas_cumprod / (1 - self.scheduler.alphas_cumprod)
        # A cap for the nearly clean steps, where nothing is decided; the noisy ones keep their full share.
        self.weight = (snr + 1).clamp(max=_SNR_CAP) / (snr + 1)
        self.weight = self.weight / self.weight.mean()

    def __call__(self, generator: torch.Generator, step: int) -> Tensor:
        """Return the loss of one batch drawn from `generator`; the share of pairs is the last one due at `step`."""
        share = [share for first, share in self.pairs if first <= step][-1]
        index = self.latents.draw(generator, self.batch, share)
        x = self.latents.values[index].float()
        dropped = torch.rand(self.batch, generator=generator) < self.drop
        ids = torch.where(dropped[:, None], self.ids[-1], self.ids[index])
        noise = torch.randn(x.shape, generator=generator)
        # Stratified timesteps: the same distribution with less noise in the loss.
        u = (torch.arange(self.batch) + torch.rand(self.batch, generator=generator)) / self.batch
        t = (u * self.scheduler.config.num_train_timesteps).long()
        target = self.scheduler.get_velocity(x, noise, t)
        noisy = self.scheduler.add_noise(x, noise, t)
        # Drawn on the CPU, so that a seed means the same everywhere.
        ids, noisy, target, weight, t = (a.to(self.device) for a in (ids, noisy, target, self.weight[t], t))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            text = self.text_encoder(ids)[0]
            v = self.unet(noisy, t, text, return_dict=False)[0]
        return ((v.float() - target) ** 2).mean((1, 2, 3)).mul(weight).mean()


def train_text2image(
    out: Path,
    plan: Plan,
    vae: AutoencoderKL,
    latents: Latents,
    *,
    device: str = "cpu",
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> StableDiffusionPipeline:
    """Train text encoder and UNet on cached latents and return the assembled pipeline with averaged weights."""
    tokenizer, text_encoder, unet = _fresh(out, plan.seed)
    text_encoder.to(device)
    unet.to(device)
    loss = Denoising(unet, text_encoder, tokenizer, latents, **options)
    modules = {"text_encoder": text_encoder, "unet": unet}
    facts = {"batch": loss.batch, "pairs": [list(p) for p in loss.pairs], "scenes": len(latents.captions)}
    average = train(modules, loss, out, plan, facts=facts, resume=resume, quiet=quiet)
    return _with_average(average, vae, text_encoder, tokenizer, unet)


def export(out: Path, vae: AutoencoderKL, target: Path) -> int:
    """Write the averaged weights of the last checkpoint as a pipeline folder in fp16; return the checkpoint's step."""
    tokenizer, text_encoder, unet = _fresh(out, 0)
    modules = {"text_encoder": text_encoder, "unet": unet}
    average = {n: p.detach().clone() for n, p in named_parameters(modules).items()}
    step = load_checkpoint(out, None, average)
    pipe = _with_average(average, vae.cpu(), text_encoder, tokenizer, unet)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        torch.nn.Module.to(part, dtype=torch.float16)
    pipe.save_pretrained(target, safe_serialization=True)
    settle(out, target, step)
    return step


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("mmdit", "video", "video-still", "videodit"):
        # They import this module, so it imports them only here.
        module = importlib.import_module(f"attnctl.shapes.training.train_{argv[0].removeprefix('video-')}")
        return int(module.main(argv[1:]))
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)

    out: Path = args.out
    vae_plan = Plan(steps=args.vae_steps, lr=2e-3, seed=args.seed, average=0.99, save_every=250)
    vae = train_vae(out / "vae", vae_plan, resume=True, device=args.device)
    refine = Plan(steps=args.decoder_steps, optimizer="muon", seed=args.seed + 1, average=0.99, cooldown=0.7)
    if args.model == "vae":
        refine_decoder(out / "decoder", refine, vae, resume=True)
        return 0
    latents = make_cache(out / "cache", vae, n_single=args.scenes, n_pairs=args.pair_scenes, seed=args.seed)
    plan = Plan(
        steps=args.steps, optimizer=args.optimizer, lr=args.lr, cooldown=args.cooldown,
        seed=args.seed, save_every=args.save_every,
    )  # fmt: skip
    if not args.export_only:
        train_text2image(
            out / "unet", plan, vae, latents, resume=args.resume,
            batch=args.batch, pairs=args.pairs, bf16=not args.fp32, device=args.device,
        )  # fmt: skip
        vae = refine_decoder(out / "decoder", refine, vae, resume=True)
    elif (out / "decoder" / "checkpoint").exists():
        parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
        average = {n: p.detach().clone() for n, p in named_parameters(parts).items()}
        load_checkpoint(out / "decoder", None, average)
        vae.load_state_dict(average_to_state(average), strict=False)
    step = export(out / "unet", vae, args.export or out / "pipeline")
    print(f"wrote {args.export or out / 'pipeline'} (step {step})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attnctl.shapes.training.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "model", choices=("text2image", "vae"), help="or mmdit, video, video-still or videodit, with their own options"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and results")
    parser.add_argument("--steps", type=int, default=3900, help="steps of text encoder and UNet")
    parser.add_argument("--vae-steps", type=int, default=1450)
    parser.add_argument("--decoder-steps", type=int, default=1200)
    parser.add_argument("--scenes", type=int, default=12000, help="single-object scenes to encode")
    parser.add_argument("--pair-scenes", type=int, default=18000, help="two-object scenes to encode")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--cooldown", type=float, default=0.25, help="last fraction of the steps, where lr falls to 0")
    parser.add_argument(
        "--pairs",
        type=shares,
        default="0.125,2000:0.5,3000:0.15",
        help="share of two-object scenes, STEP:SHARE from a step on",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fp32", action="store_true", help="train in float32 instead of bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="one can be as fast on a busy machine")
    parser.add_argument("--export-only", action="store_true", help="write out the last checkpoint, train nothing")
    parser.add_argument("--export", type=Path, help="write the pipeline folder here (default: OUT/pipeline)")
    return parser


def _fresh(out: Path, seed: int) -> tuple[CLIPTokenizer, CLIPTextModel, UNet2DConditionModel]:
    torch.manual_seed(seed)
    tokenizer = models.build_tokenizer(out / "tokenizer")
    return tokenizer, models.build_text_encoder(tokenizer), models.build_unet()


def _with_average(
    average: dict[str, Tensor],
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    for prefix, module in (("text_encoder/", text_encoder), ("unet/", unet)):
        state = {n.removeprefix(prefix): t for n, t in average.items() if n.startswith(prefix)}
        module.load_state_dict(state, strict=False)  # buffers such as position ids are not averaged
    return models.assemble(vae, text_encoder, tokenizer, unet)


if __name__ == "__main__":
    raise SystemExit(main())
