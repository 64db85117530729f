"""Low and high bands of the frames' spectrum, without FFT and, where the algebra allows it, without maps.

"ByTheWay: Boost Your Text-to-Video Generation Model to Higher Quality in a Training-free Way" (BroadWay), arXiv
2410.06241, multiplies the high band of the Fourier transform of every row of a temporal map A by beta. That is a
product with one constant symmetric circulant matrix on the key side,

    A' = A M,   M = beta I + (1 - beta) L,   L = the low-band projector of (F, tau)

so A' V = A (M V): the values are filtered and any kernel runs unchanged. Where only the mean is low (even F, tau =
F / 2 - 1, the published setting), L averages the frames and A' V = mu + beta (A V - mu).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels.checks import full, wide_dtype

__all__ = ["Band", "filter_frames", "motion_beta"]


@dataclass(frozen=True, slots=True)
class Band:
    """The split of F frequency bins: F // 2 - tau to F // 2 + tau are high, the others, the mean among them, low.

    Attributes:
        frames: F, 4 or more.
        tau: Half width of the high band.

    Example:
        >>> Band.of(16, "auto"), Band.of(16, "auto").mean_only
        (Band(frames=16, tau=7), True)
    """

    frames: int
    tau: int
    _low: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False, compare=False)
    """L, on each device that has asked for it."""

    @classmethod
    def of(cls, frames: int, tau: int | Literal["auto"] = "auto") -> Band:
        """Check tau against the number of frames; "auto" is F // 2 - 1, the published 7 of 16.

        Raises:
            ConfigError: Fewer than 4 frames, or a high band that leaves the spectrum.
        """
        if frames < 4:
            raise ConfigError(
                f"BroadWay splits the frames' spectrum into bands, and {frames} frames are too few: give 4 or more "
                "(num_frames=...; fewer than 16 are poor with most motion models)."
            )
        largest = (frames - 1) // 2
        if tau == "auto":
            return cls(frames, frames // 2 - 1)
        if not 0 <= tau <= largest:
            raise ConfigError(
                f"tau={tau} is too large for {frames} frames: the high band of bins {frames // 2 - tau} to "
                f"{frames // 2 + tau} leaves 0 to {frames - 1}. Give tau from 0 to {largest}, or tau='auto' "
                f"({frames // 2 - 1} here)."
            )
        return cls(frames, tau)

    @property
    def whole(self) -> bool:
        """Tell whether every bin is high: rows then lose in the re-normalisation what they gained, and A' = A."""
        return 2 * self.tau + 1 == self.frames

    @property
    def mean_only(self) -> bool:
        """Tell whether the mean is all that is low."""
        return 2 * self.tau + 2 == self.frames

    def low(self, like: Tensor) -> Tensor:
        """Return L [F, F] in a tensor's device and dtype, float32 at least; the identity where every bin is high."""
        key = like.device, wide_dtype(like.dtype)
        if key not in self._low:
            self._low[key] = _projector(self.frames, self.tau).to(*key)
        return self._low[key]

    def matrix(self, like: Tensor, beta: float | Tensor) -> Tensor:
        """Return M / g_0 [F, F], symmetric, rows summing to 1."""
        eye = torch.eye(self.frames, device=like.device, dtype=wide_dtype(like.dtype))
        return torch.lerp(self.low(like), eye, full(beta, eye))


@lru_cache(maxsize=64)
def _projector(frames: int, tau: int) -> Tensor:
    if 2 * tau + 1 == frames:
        return torch.eye(frames, dtype=torch.float64)
    bins = torch.arange(frames)
    low = ((bins < frames // 2 - tau) | (bins > frames // 2 + tau)).double()
    # Taking the real part of the inverse transform averages the gains of k and F - k; they differ for odd F only.
    low = (low + low[-bins % frames]) / 2
    shift = (bins[:, None] - bins[None]).double()
    return (low * torch.cos(2 * math.pi / frames * shift[..., None] * bins)).sum(-1) / frames


def filter_frames(v: Tensor, band: Band, beta: float | Tensor, dim: int = -2) -> Tensor:
    """Compute M v along the frame axis (arXiv 2410.06241, Fourier motion enhancement moved to the values).

    Args:
        v: Values of any shape with F entries along `dim`.
        band: Low and high bins.
        beta: Gain of the high band: a number, or a tensor that broadcasts to v.
        dim: The frame axis.

    Returns:
        beta v + (1 - beta) L v in the dtype of v, sums in float32.
    """
    if band.whole:
        return v
    wide = v.to(wide_dtype(v.dtype))
    if band.mean_only:
        low = wide.mean(dim, keepdim=True)
    else:
        # L is symmetric. On the right of one long matrix it is used as it is; else it is copied for every position.
        # Contiguous, because fused kernels want the channels side by side and else make maps after all.
        last = wide.movedim(dim, -1)
        low = (last.reshape(-1, band.frames) @ band.low(v)).view(last.shape).movedim(-1, dim).contiguous()
    # lerp, because it returns v itself where beta is 1.
    return torch.lerp(low.expand_as(wide), wide, full(beta, wide)).to(v.dtype)


def motion_beta(e1: Tensor, e2: Tensor, e2_low: Tensor, floor: float) -> Tensor:
    """Compute max(floor, sqrt((E1 - E2_low) / E2_high)): at least the energy that guidance removed comes back.

    Args:
        e1: Energy of the map before self-guidance. Energies of centred maps serve as well: the mean drops out.
        e2: Energy of the guided map.
        e2_low: Its low band.
        floor: The user's beta.

    Returns:
        beta, of the energies' shape; `floor` where the ratio is 0 / 0 or the root is not real.
    """
    high = e2 - e2_low
    ratio = ((e1 - e2_low) / high).sqrt().masked_fill(high <= 0, math.nan)
    return torch.fmax(ratio, full(floor, ratio))
