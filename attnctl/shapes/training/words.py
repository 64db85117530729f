"""Teach the text encoder of text2image motion words, before any video is seen.

It has never met them, and cross-attention has learnt to read past words that it does not know: hardly anything of
"left" would reach the frames. So every token from the words of motion on is taught to be what it would be without them,
plus a vector that says the motion: one axis for left and right, one for up and down, one for the speed, one for
standing still. What the UNet knows to read stays as it is, and the motion is said wherever it looks.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnctl.shapes.data import encode_captions
from attnctl.shapes.motion import DIRECTIONS, SPEEDS, Motion, say
from attnctl.shapes.scenes import BACKGROUNDS, COLORS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = ["motion_code", "teach_motion"]

_LENGTH = 4.0  # of a motion's vector; hidden states have a norm of about 9


def motion_code(motion: Motion) -> tuple[float, float, float, float]:
    """Return the four numbers that say a motion: to the right, down, fast (1) or slow (-1), still."""
    x, y = DIRECTIONS[motion.direction or "still"]
    speed = {None: 0.0, "slow": -1.0, "fast": 1.0}[motion.speed]
    return float(x), float(y), speed, float(motion.direction == "still")


_RATE = 3e-3


def teach_motion(
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    *,
    steps: int = 600,
    batch: int = 64,
    seed: int = 0,
) -> float:
    """Train the text encoder in place and return the last loss, a mean square."""
    motions = [Motion(d, s) for d in DIRECTIONS for s in (None, *SPEEDS) if d != "still" or s is None]
    kinds = list(product(COLORS, SHAPES, BACKGROUNDS))
    caption_ids = encode_captions(tokenizer, [say(*kind, motion) for motion in motions for kind in kinds])
    ids = caption_ids.unflatten(0, (len(motions), len(kinds)))
    plain = encode_captions(tokenizer, [say(*kind, Motion()) for kind in kinds])
    first = int((ids[0] != plain).any(0).nonzero()[0])  # behind "a red circle"
    extra = torch.tensor([len(str(motion).split()) for motion in motions])

    width = text_encoder.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, 4, generator=generator)).Q.T * _LENGTH
    codes = torch.tensor([motion_code(motion) for motion in motions]) @ axes
    before = copy.deepcopy(text_encoder).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(text_encoder.parameters(), lr=_RATE)
    loss = torch.zeros(())
    for step in range(steps):
        m = torch.randint(len(motions), (batch,), generator=generator)
        k = torch.randint(len(kinds), (batch,), generator=generator)
        reference = before(plain[k])[0]
        target = _moved(reference, first, extra[m], codes[m])
        loss = (text_encoder(ids[m, k])[0] - target).square().mean()
        loss = loss + (text_encoder(plain[k])[0] - reference).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()  # or the last gradient would go into the first step of what trains the encoder next
    return float(loss.detach())


def _moved(plain: Tensor, first: int, extra: Tensor, code: Tensor) -> Tensor:
    """Shift the states behind `first` by `extra` tokens and add the code to them and to the tokens put in."""
    n, length, _ = plain.shape
    place = torch.arange(length).expand(n, length)
    source = torch.where(place < first, place, place - extra[:, None])
    source = torch.where((place >= first) & (source < first), length - 1, source)  # a word of motion is like an end
    moved = plain.gather(1, source[..., None].expand_as(plain))
    heard = place >= first + (extra > 1)[:, None]  # at "moving" nobody knows where to
    return moved + code[:, None] * heard[..., None]
