"""The shapes video model: text2image's UNet with motion modules, and what trains them.

The text encoder of text2image has never seen a motion word, and the motion modules see no text: direction reaches them
only through the features that cross-attention writes into every frame. So the video pipeline has a text encoder of its
own, which is taught the words first (`words`), and a UNet that is trained on with the motion modules. What the text
encoder says about captions without motion words is tied to what it said before (`Motions.anchor`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnctl.errors import ConfigError
from attnctl.shapes.data import encode_captions, to_tensor
from attnctl.shapes.motion import FRAMES, clip_caption, render_clip, sample_clip
from attnctl.shapes.training.expected import Expected
from attnctl.shapes.training.models import build_scheduler

if TYPE_CHECKING:
    from diffusers import (
        AnimateDiffPipeline,
        AutoencoderKL,
        MotionAdapter,
        StableDiffusionPipeline,
        UNet2DConditionModel,
        UNetMotionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = [
    "Clips",
    "Motions",
    "assemble",
    "build_adapter",
    "cache_clips",
    "flat_parameters",
    "make_clips",
    "motion_parameters",
    "with_motion",
]

# How often a training caption is told in full, without its speed, without its motion, or not at all.
_RIGHT_OR_DOWN = re.compile(r" moving (right|down)\b")
TOLD = (0.65, 0.15, 0.1, 0.1)


@dataclass(frozen=True)
class Clips:
    """Hold scaled latents [n, 16, 4, 16, 16] (fp16; of videodit: see there) and, for each clip, three captions.

    The forms are the full caption, the one without its speed, and the one without its motion.
    """

    values: Tensor
    captions: list[list[str]]

    @cached_property
    def one_way(self) -> Tensor:
        """Return the indices of clips that move right or down; 0 where there are none."""
        return torch.tensor([i for i, c in enumerate(self.captions) if _RIGHT_OR_DOWN.search(c[0])] or [0])

    def draw(self, generator: torch.Generator, n: int, skew: float = 0.0) -> Tensor:
        """Draw `n` indices, a share of `skew` of them from clips that move right or down only."""
        some = self.one_way
        index = torch.randint(len(self.captions), (n,), generator=generator)
        skewed = some[torch.randint(len(some), (n,), generator=generator)]
        return torch.where(torch.rand(n, generator=generator) < skew, skewed, index)


@torch.no_grad()
def make_clips(folder: str | Path, vae: AutoencoderKL, *, n: int, seed: int = 0) -> Clips:
    """Encode `n` training clips once, or read them back where `folder` already holds them."""

    def encode(x: Tensor) -> Tensor:
        return vae.encode(x.to(vae.device)).latent_dist.mean * vae.config.scaling_factor

    return cache_clips(folder, encode, n=n, seed=seed)


def cache_clips(
    folder: str | Path, encode: Callable[[Tensor], Tensor], *, n: int, seed: int = 0, frames: int = FRAMES
) -> Clips:
    """Encode `n` training clips once, or read them back where `folder` already holds them.

    Args:
        folder: where they are kept.
        encode: turns the frames of one clip, float [frames, 3, 64, 64] in -1..1, into its latents.
        n: how many clips to encode.
        seed: which clips.
        frames: how long they are.
    """
    from tqdm import tqdm

    folder = Path(folder)
    if not (folder / "captions.json").exists():
        rng = np.random.default_rng(seed)
        captions, parts = [], []
        for _ in tqdm(range(n), desc="encode"):
            clip = sample_clip(rng, frames=frames)
            captions.append([clip_caption(clip), clip_caption(clip, speed=False), clip_caption(clip, motion=False)])
            parts.append(encode(to_tensor(render_clip(clip, frames))).half().cpu())
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.stack(parts).contiguous()}, folder / "latents.safetensors")
        # Written last: its presence says that the cache is whole.
        (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    info = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return Clips(load_file(folder / "latents.safetensors")["latents"], info)


def build_adapter(unet: UNet2DConditionModel) -> MotionAdapter:
    """Build motion modules for every down, mid and up block of the UNet; each starts as the identity."""
    from diffusers import MotionAdapter

    adapter = MotionAdapter(
        block_out_channels=tuple(unet.config.block_out_channels),
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=4,
        motion_norm_num_groups=unet.config.norm_num_groups,
        motion_max_seq_length=FRAMES,
        use_motion_mid_block=True,
    )
    for name, module in adapter.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(".proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return adapter


def with_motion(unet: UNet2DConditionModel, adapter: MotionAdapter) -> UNetMotionModel:
    """Join UNet and motion modules for training, which reaches all of them."""
    from diffusers import UNetMotionModel
    from diffusers.models.attention_processor import AttnProcessor

    model = UNetMotionModel.from_unet2d(unet, adapter)
    # On a CPU the fused kernel's backward takes more than twice as long as attention written out.
    model.set_attn_processor(AttnProcessor())
    return model.requires_grad_(True)


def flat_parameters(unet: UNetMotionModel) -> dict[str, Tensor]:
    """Return the weights of the UNet without its motion modules."""
    return {n: t for n, t in unet.state_dict().items() if ".motion_modules." not in n}


def motion_parameters(unet: UNetMotionModel) -> dict[str, Tensor]:
    """Return the motion modules' weights under the names that they have in a MotionAdapter."""
    return {n: t for n, t in unet.state_dict().items() if ".motion_modules." in n}


def assemble(base: StableDiffusionPipeline, text_encoder: CLIPTextModel, adapter: MotionAdapter) -> AnimateDiffPipeline:
    """Put the parts together as an AnimateDiffPipeline."""
    from diffusers import AnimateDiffPipeline

    pipe = AnimateDiffPipeline(
        vae=base.vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=base.tokenizer,
        unet=base.unet.eval(),
        motion_adapter=adapter.eval(),
        scheduler=build_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _due(course: Sequence[tuple[int, float]], step: int) -> float:
    return [share for first, share in course if first <= step][-1]


class Motions:
    """The training loss of the motion modules: v-prediction on clips, every frame with noise of its own.

    A share of `expect` of a batch is pure noise, with the mean of all clips that fit the caption as its target. With
    `keep`, the target of the rest is what the UNet predicts before training, for the caption without its motion: the
    gradients are free of noise, and nothing is forgotten. A share of `lies` of the clips stands still at its first
    frame, whatever its caption says.
    """

    def __init__(
        self,
        unet: UNetMotionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        clips: Clips,
        *,
        batch: int = 4,
        anchor: float = 1.0,
        noisy: float = 0.5,
        frames: int | None = None,
        skew: float | Sequence[tuple[int, float]] = 0.0,
        expected: Expected | None = None,
        expect: float | Sequence[tuple[int, float]] = 0.0,
        keep: bool = False,
        lies: float = 0.0,
        bf16: bool = True,
    ) -> None:
        self.length = clips.values.shape[1]
        self.frames = self.length if frames is None else frames
        if not 1 <= self.frames <= self.length:
            raise ConfigError(f"frames must be 1 to {self.length}, the length of a clip, got {frames}.")
        if not 0 <= lies <= 1:
            raise ConfigError(f"lies is a share of the clips, 0 to 1, got {lies}.")
        self.unet, self.text_encoder, self.clips, self.lies = unet, text_encoder, clips, lies
        self.batch, self.weight, self.noisy, self.bf16 = batch, anchor, noisy, bf16
        self.skew = [(0, skew)] if isinstance(skew, float) else list(skew)
        self.expect = [(0, expect)] if isinstance(expect, float) else list(expect)
        self.expected, self.tokenizer = expected, tokenizer
        self.keep = copy.deepcopy(unet).requires_grad_(False).eval() if keep else None
        self.device = next(unet.parameters()).device
        forms = [encode_captions(tokenizer, [c[i] for c in clips.captions]) for i in range(3)]
        empty = encode_captions(tokenizer, [""]).expand_as(forms[0])
        self.ids = torch.stack([*forms, empty])
        self.before = copy.deepcopy(text_encoder).requires_grad_(False).eval()
        self.scheduler = build_scheduler()
        from diffusers.models.embeddings import SinusoidalPositionalEmbedding

        models = (unet,) if self.keep is None else (unet, self.keep)
        self.places = [m for u in models for m in u.modules() if isinstance(m, SinusoidalPositionalEmbedding)]
        self.tables = [m.pe for m in self.places]

    def draw_frames(self, generator: torch.Generator) -> Tensor:
        """Draw one frame of each of `frames` equal parts of the clip [frames]; the motion modules are told which."""
        edges = torch.linspace(0, self.length, self.frames + 1).round()
        chosen = (edges[:-1] + torch.rand(self.frames, generator=generator) * edges.diff()).long()
        for place, table in zip(self.places, self.tables, strict=True):
            place.pe = table[:, chosen.to(table.device)]
        return chosen

    def anchor(self, ids: Tensor) -> Tensor:
        """Return how far the text encoder has moved from text2image's on captions without motion [batch, 16]."""
        with torch.no_grad():
            before = self.before(ids)[0]
        return (self.text_encoder(ids)[0] - before).square().mean()

    def __call__(self, generator: torch.Generator, step: int) -> Tensor:
        """Return the loss of one batch drawn from `generator`."""
        skew, expect = (_due(course, step) for course in (self.skew, self.expect))
        index = self.clips.draw(generator, self.batch, skew)
        frames = self.draw_frames(generator)
        x = self.clips.values[index][:, frames].float()
        if self.lies:
            lying = torch.rand(self.batch, generator=generator) < self.lies
            x = torch.where(lying.view(-1, 1, 1, 1, 1), x[:, :1], x)
        form = torch.multinomial(torch.tensor(TOLD), self.batch, replacement=True, generator=generator)
        ids, still = self.ids[form, index], torch.cat([self.ids[2, index], self.ids[3, :1]])
        noise = torch.randn(x.shape, generator=generator)
        # Stratified; more of the noisy steps, where motion is decided: the rest is what the frozen layers can do.
        n = 0 if self.expected is None else round(expect * self.batch)
        strata = (torch.arange(self.batch) - n).clamp(min=0)
        u = (strata + torch.rand(self.batch, generator=generator)) / max(1, self.batch - n)
        t = (u**self.noisy * self.scheduler.config.num_train_timesteps).long()
        if self.expected is not None and n:
            x[:n], captions = self.expected.draw(generator, n, frames, skew)
            t[:n] = self.scheduler.config.num_train_timesteps - 1
            ids[:n] = encode_captions(self.tokenizer, captions)
        target = self.scheduler.get_velocity(x, noise, t)
        noisy = self.scheduler.add_noise(x, noise, t)
        # Drawn on the CPU, so that a seed means the same everywhere.
        ids, still, noisy, target, t = (a.to(self.device) for a in (ids, still, noisy, target, t))
        try:
            if self.keep is not None and n < self.batch:
                with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    text = self.before(still[n : self.batch])[0].repeat_interleave(x.shape[1], 0)
                    v = self.keep(noisy[n:].transpose(1, 2), t[n:], text, return_dict=False)[0]
                    target[n:] = v.transpose(1, 2).float()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                text = self.text_encoder(ids)[0].repeat_interleave(x.shape[1], 0)
                v = self.unet(noisy.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
        finally:
            for place, table in zip(self.places, self.tables, strict=True):
                place.pe = table
        loss = (v.float() - target).square().mean()
        return loss + self.weight * self.anchor(still) if self.weight else loss
