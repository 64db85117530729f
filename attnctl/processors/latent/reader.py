"""Reading attention to words in a forward that runs with gradients and stops after the last map that is needed.

Only the sites that are read compute maps; every other site runs the host's own fused attention. Nothing after the last
site contributes to a loss on the maps, so leaving there changes neither loss nor gradient, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.caches import hooks_below, saved_weights
from attnctl.core.hosts.checkpointing import Checkpointing
from attnctl.core.hosts.modules import named_below
from attnctl.core.live import PassEnded
from attnctl.core.sites import Grid
from attnctl.errors import UnsupportedModelError

__all__ = ["MapReader", "exit_refusal", "prepared", "usable"]


class MapReader:
    """Reads image-to-text attention at some sites of one guidance forward, and ends it after the last.

    Args:
        names: The sites to read. The last one is known by counting, not by its place in a list.
        share: Gives, for a number of text tokens, the columns to read: [rows, T, C], the share of each token.
        early_exit: Whether to leave the forward when no site remains.
        needs_self_attention: Whether to read, at self- and joint-attention sites, how image tokens attend to each
            other too.
    """

    def __init__(
        self, names: Sequence[str], share: Callable[[int], Tensor], early_exit: bool, needs_self_attention: bool = False
    ) -> None:
        self.share, self.early_exit, self.needs_self_attention = share, early_exit, needs_self_attention
        self.remaining = set(names)
        self.reading = True
        self.total: dict[Grid, Tensor] = {}
        self.heads = 0
        self.seen: dict[tuple[int, ...], Tensor] = {}
        self.seen_heads = 0

    def __call__(self, call: AttnCall, proceed: Proceed) -> Tensor:
        """Read one attention call, then let it run or leave the forward."""
        if call.index or (self.reading and call.site.name not in self.remaining):
            return proceed(call)
        read = None if call.site.kind == "self" else self.read(call)
        seen = self.look(call) if self.needs_self_attention and call.site.kind != "cross" else None
        if self.reading:  # a checkpointed block runs again during backward, and must then compute the same
            if read is not None:
                maps, grid = read
                if grid in self.total and self.total[grid].shape != maps.shape:
                    raise UnsupportedModelError(
                        f"{call.site.name} attends to {maps.shape[-1]} text tokens and a site before it to "
                        f"{self.total[grid].shape[-1]}: maps of different texts cannot be added. Choose `sites` of one."
                    )
                self.total[grid] = maps if grid not in self.total else self.total[grid] + maps
                self.heads += call.q.shape[1]
            if seen is not None:
                size = tuple(seen.shape)
                self.seen[size] = seen if size not in self.seen else self.seen[size] + seen
                self.seen_heads += call.q.shape[1]
            self.remaining.discard(call.site.name)
            if self.early_exit and not self.remaining:
                raise PassEnded
        return proceed(call)

    def read(self, call: AttnCall) -> tuple[Tensor, Grid]:
        """Compute the columns of one call summed over heads: [rows, N, C], and the grid of the N tokens."""
        text = call.text_keys()
        return call.text_map(self.share(text.stop - text.start)).sum(1), call.on_image()[1]

    def look(self, call: AttnCall) -> Tensor:
        """Compute how image tokens attend to each other in one call, summed over heads: [rows, N, N], row sums H."""
        attention = call.self_map()
        return attention.rows(range(attention.q.shape[2])).sum(1)

    def attention(self, samples: int) -> Tensor:
        """Average what image tokens pay to each other over heads and layers: [samples, h w, h w].

        Raises:
            UnsupportedModelError: The layers have several grids, or attend over several frames.
        """
        grids = sorted({grid[1:] for grid in self.total})
        if len(self.seen) != 1 or len(grids) != 1 or next(iter(self.seen))[:2] != (samples, math.prod(grids[0])):
            shown = ", ".join(f"{h} x {w}" for h, w in grids)
            raise UnsupportedModelError(
                "A loss on how image tokens attend to each other needs layers of one grid, and of one frame each; "
                f"these have {shown}. Choose sites of one size."
            )
        return next(iter(self.seen.values())) / self.seen_heads

    def maps(self) -> Tensor:
        """Average over heads and layers: [samples, C, h, w], at the finest grid read; a frame is a sample."""
        parts = []
        for (frames, h, w), total in self.total.items():
            part = total.unflatten(1, (frames, h, w)).flatten(0, 1) if frames > 1 else total.unflatten(1, (h, w))
            parts.append(part.permute(0, 3, 1, 2))
        size = max((p.shape[-2:] for p in parts), key=lambda s: s[0] * s[1])
        parts = [
            p if p.shape[-2:] == size else F.interpolate(p, size, mode="bilinear", align_corners=False) for p in parts
        ]
        return sum(parts[1:], start=parts[0]) / self.heads


def exit_refusal(denoiser: torch.nn.Module, bound: Mapping[str, Any]) -> str | None:
    """Say why a forward of this denoiser must not be left half way, or return None."""
    if hooks_below(denoiser):
        return "diffusers hooks (caches, group offloading) need every block to run"
    if any("_hf_hook" in vars(module) for module in named_below(denoiser) if module is not denoiser):
        return "accelerate hooks on blocks would leave weights on the device"
    for value in bound.values():
        if isinstance(value, dict) and value.get("scale") not in (None, 1, 1.0):
            return "older hosts undo a LoRA scale only at the end of the forward"
    return None


@contextlib.contextmanager
def prepared(denoiser: torch.nn.Module, checkpointing: bool, remember: Callable[[], Any]) -> Iterator[None]:
    """Freeze parameters, set compiled blocks aside and switch checkpointing on; give everything back afterwards.

    Gradients go to the latents alone: a parameter that required one would have its layer's input kept. Blocks that are
    checkpointed, by `checkpointing` or by the user, run again during backward under what `remember` noted.
    """
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    originals: list[tuple[torch.nn.Module, str, Any]] = []
    again: Checkpointing | None = None

    def put(module: torch.nn.Module, name: str, value: Any) -> None:
        originals.append((module, name, vars(module).get(name, _MISSING)))
        vars(module)[name] = value

    try:
        for p in trained:
            p.requires_grad_(False)
        for module in named_below(denoiser):
            if module._compiled_call_impl is not None:  # a compiled block would be compiled again, for this alone
                put(module, "_compiled_call_impl", None)
            if checkpointing and hasattr(module, "gradient_checkpointing"):
                put(module, "gradient_checkpointing", True)
                put(module, "_gradient_checkpointing_func", _checkpoint)
        again = Checkpointing(denoiser, remember)
        with saved_weights(denoiser):
            yield
    finally:
        if again is not None:
            again.remove()
        for module, name, value in reversed(originals):
            if value is _MISSING:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value
        for p in trained:
            p.requires_grad_(True)


_MISSING = object()


def _checkpoint(block: Any, *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False)


def usable(value: Any) -> Any:
    """Copy inference tensors, which autograd cannot save, in nested arguments; leave everything else."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: usable(v) for k, v in value.items()}
    return type(value)(usable(v) for v in value) if type(value) in (list, tuple) else value
