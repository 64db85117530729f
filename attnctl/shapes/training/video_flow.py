"""The training loss of videodit: the velocity of the straight path from noise to the latents of a clip.

A clip is seen first by single latent frames, then by a few that lie spread over it, at last whole: shapes, colours and
where things go are learnt where a clip costs little. The transformer is told by its rotary embedding which frames it
sees, so that places in time mean the same all along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnctl.errors import ConfigError
from attnctl.shapes.data import encode_captions
from attnctl.shapes.tokenizer import MAX_LENGTH
from attnctl.shapes.training.clips import TOLD, Clips
from attnctl.shapes.training.mmdit import draw_levels
from attnctl.shapes.training.videodit import SHIFT

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanAttention
    from transformers import T5TokenizerFast, UMT5EncoderModel

__all__ = ["COURSE", "Phase", "VideoFlow", "WrittenAttention", "course", "frames_at"]

_PLAIN_LENGTH = 512  # the pipeline's default `max_sequence_length`
_NEVER = -1e4
_CLEAN = 0.5  # the highest noise level of a frame that is to show where the object is


@dataclass(frozen=True, slots=True)
class Phase:
    """Say from which step on a batch holds how many clips, and how many latent frames of each."""

    first: int
    frames: int
    batch: int

    def __str__(self) -> str:
        """Write it as the command line does: "1200:3x16"."""
        return f"{self.first}:{self.frames}x{self.batch}"


COURSE = (Phase(0, 1, 24), Phase(600, 3, 8), Phase(2400, 9, 4))


def course(text: str) -> tuple[Phase, ...]:
    """Read "0:1x48,1200:3x16": from step 0 one latent frame of 48 clips in a batch, from step 1200 three of 16.

    Raises:
        ConfigError: it is written otherwise, does not begin at step 0, or its steps do not rise.
    """
    try:
        parts = [part.partition(":") for part in text.split(",")]
        sizes = [size.partition("x") for _, _, size in parts]
        phases = tuple(Phase(int(p[0]), int(s[0]), int(s[2])) for p, s in zip(parts, sizes, strict=True))
    except ValueError:
        phases = ()
    rising = all(a.first < b.first for a, b in pairwise(phases))
    if not phases or phases[0].first != 0 or not rising or any(p.frames < 1 or p.batch < 1 for p in phases):
        raise ConfigError(
            f"A course looks like '0:1x48,1200:3x16' (from step 0 one latent frame of 48 clips, from step 1200 three "
            f"of 16), with rising steps from 0 on and at least one frame and clip, got {text!r}."
        )
    return phases


class WrittenAttention:
    """Run Wan's attention whose last text token counts as many, by `null_bias` [batch] added to its logits.

    The pipeline pads the text with zero vectors up to `max_sequence_length`. No position tells these null tokens apart,
    so that any number n of them acts like one whose logit is raised by log(n). Only for training: written out, because
    on a CPU in bfloat16 that is faster than the fused kernel's backward.
    """

    null_bias: Tensor | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the rows of the video [batch, tokens, width]."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source)
        dtype = projected[2].dtype
        q, k, v = (x.to(dtype).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        if rotary_emb is not None:
            cos, sin = (table[0, :, 0].to(dtype) for table in rotary_emb)
            q, k = (x * cos + _quarter_turn(x) * sin for x in (q, k))
        with torch.autocast(q.device.type, enabled=False):
            logits = (q * q.shape[-1] ** -0.5) @ k.mT
            if encoder_hidden_states is not None and self.null_bias is not None:
                bias = torch.zeros(len(k), 1, 1, k.shape[-2], dtype=dtype, device=k.device)
                bias[..., -1] = self.null_bias.to(dtype)[:, None, None]
                logits = logits + bias
            out = logits.softmax(-1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _quarter_turn(x: Tensor) -> Tensor:
    """Turn pairs of channels (a, b) into (-b, a)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).flatten(-2)


@contextmanager
def frames_at(transformer: WanTransformer3DModel, places: Tensor) -> Iterator[None]:
    """Tell the transformer at which places in time [frames] the frames lie that it is about to see."""
    rope = transformer.rope
    tables = {name: getattr(rope, name) for name in ("freqs_cos", "freqs_sin")}
    try:
        for name, table in tables.items():
            moved = table.clone()
            moved[: len(places), : rope.t_dim] = table[places.to(table.device), : rope.t_dim]
            setattr(rope, name, moved)
        yield
    finally:
        for name, table in tables.items():
            setattr(rope, name, table)


class VideoFlow:
    """The training loss of videodit; a tenth of the prompts is empty, a tenth leaves out the motion.

    The noise level is logit-normal (arXiv 2403.03206) around the middle of the scheduler's steps, and uniform for a
    tenth of the samples, so that both ends are seen. `phases` says how many clips and latent frames a batch has.

    In a share of `anchor` of the clips, one frame is seen nearly clean, and the transformer is told so by a time for
    each token. Where the object goes from there is then a matter of the caption alone. Without that, words of motion
    hardly count: where an object happens to be is a far larger error.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        text_encoder: UMT5EncoderModel,
        tokenizer: T5TokenizerFast,
        clips: Clips,
        *,
        phases: Sequence[Phase] = COURSE,
        anchor: float = 0.5,
        bf16: bool = True,
    ) -> None:
        self.length = clips.values.shape[2]
        most = max(phase.frames for phase in phases)
        if most > self.length:
            raise ConfigError(f"A clip has {self.length} latent frames, but the course asks for {most} of them.")
        self.transformer, self.text_encoder, self.clips = transformer, text_encoder, clips
        self.phases, self.share, self.bf16 = tuple(phases), anchor, bf16
        self.device = next(transformer.parameters()).device
        self.pad = tokenizer.pad_token_id
        _, high, wide = transformer.config.patch_size
        self.patches = clips.values.shape[3] // high * (clips.values.shape[4] // wide)
        forms = [encode_captions(tokenizer, [c[i] for c in clips.captions]) for i in range(3)]
        self.ids = torch.stack([*forms, encode_captions(tokenizer, [""]).expand_as(forms[0])])
        self.attention = WrittenAttention()
        transformer.set_attn_processor(self.attention)

    def draw_frames(self, generator: torch.Generator, n: int) -> Tensor:
        """Draw the first latent frame and one of each of `n - 1` equal parts of the rest [n].

        Rotary embeddings know distances only: without the first frame no place would be known, and where an object is
        says most about the way that it will go. Nor are the latents of the first frame, which stand for one frame
        instead of two, like the others.
        """
        edges = torch.linspace(1, self.length, n).round()
        rest = edges[:-1] + torch.rand(n - 1, generator=generator) * edges.diff()
        return torch.cat([torch.zeros(1), rest]).long()

    def draw_levels(self, generator: torch.Generator, n: int, frames: int) -> Tensor:
        """Draw the noise levels, 0..1, of `n` clips [n, frames]: one for all frames, or a lower one for one of them."""
        level = draw_levels(generator, n, math.log(SHIFT))
        anchored = (torch.rand(n, generator=generator) < self.share) & (frames > 1)
        one = nn.functional.one_hot(torch.randint(frames, (n,), generator=generator), frames).bool()
        low = torch.minimum(level, _CLEAN * torch.rand(n, generator=generator))
        return torch.where(one & anchored[:, None], low[:, None], level[:, None])

    def text(self, ids: Tensor) -> Tensor:
        """Encode tokens as the pipeline does, with zeros after the end, and one null token more: [batch, 17, 96]."""
        mask = ids != self.pad
        words = self.text_encoder(ids, mask.long()).last_hidden_state * mask[..., None]
        return nn.functional.pad(words, (0, 0, 0, 1))

    def __call__(self, generator: torch.Generator, step: int) -> Tensor:
        """Return the loss of one batch drawn from `generator`."""
        phase = [p for p in self.phases if p.first <= step][-1]
        n = phase.batch
        index = self.clips.draw(generator, n)
        places = self.draw_frames(generator, phase.frames)
        x = self.clips.values[index][:, :, places].float()
        form = torch.multinomial(torch.tensor(TOLD), n, replacement=True, generator=generator)
        ids = self.ids[form, index]
        noise = torch.randn(x.shape, generator=generator)
        level = self.draw_levels(generator, n, phase.frames)
        null = torch.where(torch.rand(n, generator=generator) < 0.5, math.log(_PLAIN_LENGTH - MAX_LENGTH), _NEVER)
        s = level[:, None, :, None, None]
        noisy, target = (1 - s) * x + s * noise, noise - x
        # Drawn on the CPU, so that a seed means the same everywhere.
        ids, noisy, target, level, null = (a.to(self.device) for a in (ids, noisy, target, level, null))
        self.attention.null_bias = null
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), frames_at(self.transformer, places):
            times = level.repeat_interleave(self.patches, 1) * 1000
            v = self.transformer(noisy, times, self.text(ids), return_dict=False)[0]
        return (v.float() - target).square().mean()
