"""NAG written out by hand: the negative prompt as further rows of one call, its formula in plain softmax attention.

The project takes the negative prompt beside the prompt in other ways (recorded keys, a second call in lockstep). Rows
of one batch are the authors' way, and need none of that.
"""

from __future__ import annotations

from typing import Any

import torch
import zoo
from contract import Replace
from dense_maps import attended
from torch import Tensor, nn

import attnctl
from attnctl.core.call import AttnCall, Proceed


def naive_guidance(p: Tensor, n: Tensor, scale: float, tau: float, alpha: float, norm: int = 1) -> Tensor:
    """Compute eq. 7 to 9 of arXiv 2505.21179 for z+ and z- [B, H, N, D]."""
    z = p + scale * (p - n)
    ratio = ((z.abs() ** norm).sum((1, 3), keepdim=True) / (p.abs() ** norm).sum((1, 3), keepdim=True)) ** (1 / norm)
    z = torch.where(ratio > tau, z * tau / ratio, z)
    return alpha * z + (1 - alpha) * p


def doubled(inputs: Any, negative: Any) -> Any:
    """Put the negative prompt's rows behind the prompt's, in each batched input."""
    if isinstance(inputs, Tensor):
        return torch.cat([inputs, negative]) if inputs.ndim else inputs
    if isinstance(inputs, dict):
        return {k: v if k in zoo.SHARED_INPUTS else doubled(v, negative[k]) for k, v in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return inputs + negative if isinstance(inputs, list) else tuple(map(doubled, inputs, negative))
    return inputs


def naive_nag(model: nn.Module, inputs: Any, negative: Any, kind: str, **setting: Any) -> Tensor:
    """Run a model with NAG at all sites of one kind, the negative prompt in rows of its own."""

    def guided(call: AttnCall, proceed: Proceed) -> Tensor:
        if call.site.kind != kind:
            return proceed(call)
        out, half = attended(call), call.q.shape[0] // 2
        image = call.image or slice(0, call.q.shape[2])
        if torch.equal(call.k[:half], call.k[half:]):  # an image prompt
            return out
        z = naive_guidance(out[:half, :, image], out[half:, :, image], **setting)
        out = out.clone()
        if call.image is not None and call.text is not None and out.shape[2] == call.k.shape[2]:
            # What stands beside image and text (Z-Image pads its image) goes with the prompt's image in both halves.
            beside = torch.ones(out.shape[2], dtype=torch.bool)
            beside[call.text] = False
            out[half:, :, beside] = out[:half, :, beside]
        out[:half, :, image] = out[half:, :, image] = z
        return out

    with attnctl.control(model, Replace(function=guided), layout="cond"):
        out = zoo.call(model, doubled(inputs, negative))
    return out[: len(out) // 2]


def naive_nag_by_keys(model: nn.Module, inputs: Any, negative: Any, **setting: Any) -> Tensor:
    """Run a model with NAG at its cross-attention, with keys and values that a call with the negative prompt had."""
    seen: dict[tuple[str, int], AttnCall] = {}

    def note(call: AttnCall, proceed: Proceed) -> Tensor:
        seen[call.site.name, call.index] = call
        return proceed(call)

    def guided(call: AttnCall, proceed: Proceed) -> Tensor:
        there = seen[call.site.name, call.index]
        if torch.equal(call.k, there.k):  # an image prompt
            return proceed(call)
        away = call.with_(k=there.k, v=there.v, mask=there.mask)
        return naive_guidance(attended(call), attended(away), **setting)

    with attnctl.control(model, Replace(sites="cross", function=note), layout="cond"):
        zoo.call(model, negative)
    with attnctl.control(model, Replace(sites="cross", function=guided), layout="cond"):
        return zoo.call(model, inputs)


def naive_nag_by_turns(model: nn.Module, inputs: Any, negative: Any, **setting: Any) -> Tensor:
    """Run a model with NAG at its joint attention, site after site: for models that take no further rows.

    In each turn both prompts are called with what is known of the sites before, and one more site becomes known: z for
    the image, and for what stands beside image and text what the prompt's call has there.
    """
    known: dict[tuple[str, int], Tensor] = {}

    def turn(arguments: Any) -> tuple[Tensor, dict[tuple[str, int], tuple[Tensor, AttnCall]]]:
        new: dict[tuple[str, int], tuple[Tensor, AttnCall]] = {}

        def at(call: AttnCall, proceed: Proceed) -> Tensor:
            text, key = call.text, (call.site.name, call.index)
            if text is None or text.start == text.stop:
                return proceed(call)
            out = attended(call)
            if key not in known:
                new[key] = out, call
                return out
            keep = known[key].clone()
            if out.shape[2] == call.k.shape[2]:
                keep[:, :, text] = out[:, :, text]
            return keep

        with attnctl.control(model, Replace(sites="joint", function=at), layout="cond"):
            return zoo.call(model, arguments), new

    while True:
        out, new = turn(inputs)
        if not new:
            return out
        _, there = turn(negative)
        key = next(iter(new))
        (p, call), n = new[key], there[key][0]
        image = call.image or slice(0, p.shape[2])
        known[key] = p.clone()
        known[key][:, :, image] = naive_guidance(p[:, :, image], n[:, :, image], **setting)
