"""Token mixers that take the place of softmax attention between a host's projections.

A mixer sees queries, keys and values split into heads, [B, H, prefix + h * w, D], the tokens x before the projection,
[B, prefix + h * w, C], and the grid (h, w); it returns [B, H, prefix + h * w, D]. Prefix tokens (class, registers)
come first and lie outside the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnctl.data.controls import load_entry_points
from attnctl.errors import ConfigError, nearest, shown

__all__ = ["MIXERS", "Mixer", "Slot", "find_mixer", "join_heads", "side_conv", "split_heads", "zero_conv"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class Slot:
    """What a mixer is built for.

    dim = heads * head_dim of the host; grid: (height, width) in tokens that the host was built for; prefix: class and
    register tokens; scale: of the host's logits; device, dtype: of its weights; width: channels of the tokens x, those
    of `dim` if None. window, positions: side of the host's square windows, and its table of relative positions in them,
    [(2 side - 1)^2, H]; None for a host without.
    """

    dim: int
    heads: int
    grid: Grid = (1, 1)
    prefix: int = 0
    scale: float = 1.0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    width: int | None = None
    window: int | None = None
    positions: Tensor | None = None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split channels: [B, N, C] -> [B, H, N, D]."""
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Undo `split_heads`: [B, H, N, D] -> [B, N, C]."""
    return x.transpose(1, 2).flatten(2)


def side_conv(conv: nn.Conv2d, v: Tensor, grid: Grid, prefix: int) -> Tensor:
    """Convolve the value map depthwise: v [B, H, prefix + h * w, D] -> the same shape, zero on prefix tokens."""
    b, m, _, d = v.shape
    tokens = join_heads(v[:, :, prefix:])
    out = conv(tokens.transpose(1, 2).reshape(b, m * d, *grid)).flatten(2).transpose(1, 2)
    out = split_heads(out, m)
    return torch.cat([torch.zeros_like(v[:, :, :prefix]), out], dim=2) if prefix else out


def zero_conv(slot: Slot, kernel: int) -> nn.Conv2d:
    """Build a depthwise convolution that starts at zero, so that it changes nothing before training."""
    dim = slot.dim
    conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, device=slot.device, dtype=slot.dtype)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


MIXERS: dict[str, type[Mixer]] = {}


class Mixer(nn.Module):
    """Base class of what `attnctl.swap` puts between a host's projections. A subclass registers itself by its kind.

        class Focused(Mixer, kind="focused"):
            def __init__(self, slot: Slot, *, power: float = 3.0, backend: str = "auto") -> None: ...
            def forward(self, q, k, v, x, grid): ...

    `__init__` takes the slot that the mixer fills, and the options of `attnctl.swap` by keyword; it should build its
    parameters with the slot's device and dtype. A subclass without a kind is a base of others and cannot be swapped in.
    Raises: ConfigError for a kind that another mixer has.
    """

    kind: ClassVar[str] = ""
    takes_mask: ClassVar[bool] = False
    """Whether `forward` takes mask=, an additive bias [1 or B, H, N, N]: a host's relative positions then stay."""

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(kind, str):
            raise ConfigError(f"{_full_name(cls)} has kind={kind!r}; expected a name.")
        cls.kind = kind
        if not kind:
            return
        first = MIXERS.get(kind, cls)
        if (first.__module__, first.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"Two mixers have the kind {kind!r}: {_full_name(first)} and {_full_name(cls)}. Give one another kind."
            )
        MIXERS[kind] = cls  # a module that is imported anew, as in a notebook, replaces its own

    def __init__(self, slot: Slot, *, backend: str = "auto") -> None:
        super().__init__()
        self.dim, self.heads, self.grid = slot.dim, slot.heads, slot.grid
        self.prefix, self.scale, self.backend = slot.prefix, slot.scale, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """Mix tokens; the module's docstring has the shapes."""
        raise NotImplementedError


def find_mixer(kind: str | type[Mixer]) -> type[Mixer]:
    """Return the mixer of a kind, or the mixer itself where a class is given.

    A kind that no imported class has is looked up among the entry points of installed packages, group
    `attnctl.mixers`. Raises: ConfigError for an unknown kind, naming an entry point that fails to import, and for a
    class that is no mixer or has no kind.
    """
    if isinstance(kind, type):
        if not issubclass(kind, Mixer):
            raise ConfigError(f"{_full_name(kind)} was given; expected a kind or a subclass of Mixer.")
        if not kind.kind:
            raise ConfigError(
                f"{_full_name(kind)} has no kind. Declare it as class {kind.__name__}(..., "
                f'kind="{kind.__name__.lower()}").'
            )
        return kind
    if not isinstance(kind, str):
        raise ConfigError(f"kind={shown(kind)} was given; expected a kind by name or a subclass of Mixer.")
    broken = ""
    if kind not in MIXERS:
        try:
            load_entry_points("attnctl.mixers", Mixer)
        except ConfigError as error:
            broken = f" {error}"
    if kind not in MIXERS:
        raise ConfigError(
            f"kind={kind!r} was given; expected one of {', '.join(map(repr, MIXERS))}.{nearest(kind, MIXERS)} A mixer "
            f"of your own is known once its module is imported.{broken}"
        )
    return MIXERS[kind]


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
