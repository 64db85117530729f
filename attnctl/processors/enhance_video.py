"""Enhance-A-Video: stronger attention outputs where frames look at each other.

"Enhance-A-Video: Better Generated Video for Free", arXiv 2502.07508. At each attention over all frames of a video
transformer the mean weight between different frames at one place is measured,

    CFI = mean over places, heads and frames of (1 - A_tt) / (T - 1),   A = softmax(q k^T / sqrt(d)) over the T frames

and the video's part of the output, after its last projection, is multiplied by max(1, CFI (T + weight)). A uniform map
gives 1 + weight / T. Only the diagonal of the T x T maps is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels.checks import repeat_heads, room, wide_dtype

__all__ = ["EnhanceAVideo", "cross_frame_intensity"]

_WEIGHTS = {"CogVideoX": 3.4, "HunyuanVideo": 4.0, "Wan": 4.0}
_MAX_ELEMENTS = 2**23  # at once on a CPU


def cross_frame_intensity(q: Tensor, k: Tensor, frames: int, scale: float | None = None) -> Tensor:
    """Measure the mean attention between different frames at one place (arXiv 2502.07508, CFI).

    Args:
        q: Queries of the video tokens [B, H, T * S, D], frames major, after norms and rotary embedding.
        k: Keys of the same shape.
        frames: T, 2 or more.
        scale: Logit scale, 1 / sqrt(D) if None.

    Returns:
        One value a row [B], 0 to 1 / (T - 1), in float32 (float64 stays): a video in a batch is measured as if alone.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = wide_dtype(q.dtype)
    a, b = (x.unflatten(2, (frames, -1)).transpose(2, 3) for x in (q, k))  # [B, H, S, T, D]
    total = q.new_zeros(q.shape[0], dtype=wide)
    most = _MAX_ELEMENTS if q.device.type == "cpu" else room(q.device) // 16
    step = max(1, most // (frames * max(frames, q.shape[-1]) * q.shape[0] * q.shape[1]))
    for start in range(0, a.shape[2], step):
        part = slice(start, start + step)
        logits = (a[:, :, part].to(wide) * scale) @ b[:, :, part].to(wide).transpose(-2, -1)
        log_weights = logits.diagonal(dim1=-2, dim2=-1) - logits.logsumexp(-1)
        total = total - torch.expm1(log_weights).flatten(1).sum(1)
    return total / (a[0, ..., 0].numel() * (frames - 1))


@dataclass(frozen=True, kw_only=True)
class EnhanceAVideo(Control):
    """Strengthen attention between frames in video transformers (arXiv 2502.07508).

    Attributes:
        weight: Added to the number of latent frames; None for the published one of the family (CogVideoX 3.4,
            HunyuanVideo 4, Wan 4). Other families need a number of 0 or more.

    Example:
        >>> EnhanceAVideo(weight=4.0).describe()
        'EnhanceAVideo(weight=4.0)'
    """

    weight: float | None = knob(None, 0.0, hint="blank: published", shown=True)

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    about: ClassVar[About] = About(
        does="more cross-frame attention in 3D video transformers",
        page="enhance_video",
        goal="make a video move more, or more steadily",
        title="Enhance-A-Video",
        paper="arXiv 2502.07508",
        cite=("Luo et al., *Enhance-A-Video: Better Generated Video for Free*, arXiv 2502.07508",),
        group="Video",
        sites="every attention over all frames",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("EnhanceAVideo", "site", "both set the gain of the same output: give one weight"),
    )

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if not family.all_frames:
            raise UnsupportedModelError(
                f"{self._label}: {family.name} models do not attend over all frames of a video at once. Use it with "
                "CogVideoX, Wan, HunyuanVideo, LTX, Allegro or Cosmos; BroadWay is for temporal attention."
            )
        if family.name == "Mochi":
            raise UnsupportedModelError(
                f"{self._label}: Mochi normalises every attention output, which undoes any factor: it would do nothing."
            )
        if self.weight is None and family.name not in _WEIGHTS:
            raise ConfigError(
                f"{self._label}: no weight is published for {family.name}. Pass one, for example weight=4.0."
            )
        return super().resolve(sites, family)

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        present = [kind for kind in self.kinds if any(s.kind == kind for s in sites)]
        return select(sites, present or list(self.kinds), kinds=self.kinds, what=self._label)

    def default_source(self, family: Family) -> str | None:
        return "Enhance-A-Video, arXiv 2502.07508: every attention over all frames"

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        return self._enhance

    def _enhance(self, call: AttnCall, proceed: Proceed) -> Tensor:
        grid, image = call.grid, call.image
        if grid is None or (call.site.kind == "joint" and image is None):
            raise UnsupportedModelError(
                f"{self._label}: the frames of the tokens at {call.site.name} are not known. It needs the arguments of "
                "the denoiser's call: use attnctl.control(pipe, ...)."
            )
        if call.index > 0 or grid[0] < 2:  # a second attention, to an image; or a single picture
            return proceed(call)
        part = slice(0, call.q.shape[2]) if image is None else image
        if call.q.shape[2] != call.k.shape[2] and call.keys is None:
            return proceed(call)  # a perturbation that looks at no other place of the image: no frame sees another
        q, k = call.q[..., part, :], repeat_heads(call.k, call.q.shape[1])[..., call.keys or part, :]
        weight = self.weight
        if weight is None:
            assert call.state.family is not None
            weight = _WEIGHTS[call.state.family.name]
        intensity = cross_frame_intensity(q, k, grid[0], call.scale)
        score = (intensity * (grid[0] + weight)).clamp_min(1.0)
        call.after.append(lambda output: _scaled(output, score, image))
        return proceed(call)


def _scaled(output: Any, score: Tensor, image: slice | None) -> Any:
    """Multiply the video's part of what a processor returned, by one factor a row [B]."""
    if isinstance(output, tuple):
        return (_scaled(output[0], score, None), *output[1:])
    score = score.to(output.dtype).reshape(-1, *[1] * (output.ndim - 1))
    if image is None or output.shape[1] == image.stop - image.start:
        return output * score
    return torch.cat([output[:, : image.start], output[:, image] * score, output[:, image.stop :]], dim=1)
