"""TextCenGen: keep a part of the picture free for text, by moving the attention of words out of it.

"TextCenGen: Attention-Guided Text-Centric Background Adaptation for Text-to-Image Generation", arXiv 2404.11824. For
each concept's map A, brought to [0, 1], and the free space R with the middle m:

    conflict    c = mean of A in R; a concept whose c is above theta moves
    force       the concept's centroid p is pushed off m by force^2 / |p - m|, and off each border of the picture by
                margin / distance^2; their sum, in shares of the picture, moves the map
    exclusion   B = moved map (x + (1 - x) (1 - R)), x = 1 - exclusion

The paper multiplies the values with the moved map in the attention itself, as `TextCenGenMaps` does. Here the latents
move, as A-STAR's do:

    L = sum over concepts in conflict of  1 - 2 sum min(A, B) / sum (A + B)  +  sum of A in R / sum of A

so that layers go on to compute what the model was trained for. The paper's force of 14 is in a unit that it does not
name, and its direction divides by a vector; here force is the distance in shares of the picture at which a push is as
long as the distance itself, along the line from m to p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.registry import knob
from attnctl.data.about import About
from attnctl.errors import ConfigError
from attnctl.kernels.areas import box_on_grid, checked_box
from attnctl.kernels.checks import send
from attnctl.kernels.maps import stretched
from attnctl.processors.latent.guidance import LatentGuidance

__all__ = ["Box", "TextCenGen", "checked_space", "displacement", "shifted"]

Box = tuple[float, float, float, float]
_NEAR = 1e-3  # share of the picture: closer to a middle or a border no force grows further


def displacement(maps: Tensor, space: Box, force: float, margin: float) -> Tensor:
    """Compute how far each map is pushed out of a space, in shares of the picture.

    Args:
        maps: [..., h, w], 0 or more.
        space: The free space: left, top, right, bottom in fractions of the picture.
        force: The distance at which a push is as long as the distance.
        margin: Strength of the borders.

    Returns:
        (x, y) [..., 2], such that the centroid stays within the picture. A map of zeros stays where it is.
    """
    h, w = maps.shape[-2:]
    y, x = (((torch.arange(n, device=maps.device) + 0.5) / n).to(maps.dtype) for n in (h, w))
    total = maps.sum((-2, -1)).clamp_min(torch.finfo(maps.dtype).tiny)
    centre = torch.stack([(maps.sum(-2) * x).sum(-1), (maps.sum(-1) * y).sum(-1)], -1) / total[..., None]
    middle = (space[0] + space[2]) / 2, (space[1] + space[3]) / 2
    away = torch.stack([at - m for at, m in zip(centre.unbind(-1), middle, strict=True)], -1)
    distance = away.norm(dim=-1, keepdim=True)
    # A map in the very middle goes down, and never nowhere.
    down = torch.cat([torch.zeros_like(distance), torch.ones_like(distance)], -1)
    unit = torch.where(distance > _NEAR, away / distance.clamp_min(_NEAR), down)
    push = unit * force**2 / distance.clamp_min(_NEAR)
    push = push + margin / centre.clamp_min(_NEAR) ** 2 - margin / (1 - centre).clamp_min(_NEAR) ** 2
    edge = 0.5 / min(h, w)
    return torch.maximum(torch.minimum(push.clamp(-1, 1), 1 - edge - centre), edge - centre)


def shifted(maps: Tensor, by: Tensor) -> Tensor:
    """Move maps [..., h, w] by (x, y) [..., 2] in shares of the picture, bilinearly; what comes in is 0."""
    flat, moves = maps.reshape(-1, 1, *maps.shape[-2:]), by.reshape(-1, 2).to(maps.dtype)
    theta = torch.eye(2, 3, dtype=maps.dtype, device=maps.device).repeat(len(flat), 1, 1)
    theta[:, :, 2] = -2 * moves
    grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=False).reshape(maps.shape)


def checked_space(space: Any, label: str) -> Box:
    """Check a free space.

    Raises: ConfigError for what is no box within the picture, or leaves less than a tenth of it.
    """
    if not isinstance(space, (list, tuple)) or len(space) != 4:
        raise ConfigError(
            f"{label}: space={space!r:.60} is no box: give (left, top, right, bottom) in fractions of the picture."
        )
    left, top, right, bottom = box = checked_box(space, f"{label}: space")
    if (right - left) * (bottom - top) > 0.9:
        raise ConfigError(f"{label}: space={box} leaves less than a tenth of the picture to its subjects.")
    return box


@dataclass(frozen=True, kw_only=True)
class TextCenGen(LatentGuidance):
    """Keep a part of the picture free for text (arXiv 2404.11824).

    Attributes:
        space: The part to keep free: a box (left, top, right, bottom) in fractions of the picture.
        theta: Mean of a concept's map in the space, from 0 to 1, above which the concept moves.
        force: Distance in shares of the picture at which a push out of the space is as long as the distance.
        margin: Strength of the push away from the picture's borders.
        exclusion: How much of a moved map is taken out of the space, 0 to 1.
    """

    space: Box = knob((0.0, 0.0, 1.0, 0.33), kind="free", values="left, top, right, bottom, 0 to 1")
    theta: float = knob(0.25, 0.0, 1.0)
    force: float = knob(0.3, 0.0, 2.0, shown=True)
    margin: float = knob(0.001, 0.0, 1.0)
    exclusion: float = knob(0.75, 0.0, 1.0)

    about: ClassVar[About] = About(
        does="keeps a part of the picture free for text",
        page="textcengen",
        goal="get every object of the prompt, in its place",
        paper="arXiv 2404.11824",
        cite=("Liang et al., *TextCenGen: Attention-Guided Text-Centric Background Adaptation*, arXiv 2404.11824",),
        group="Words and layout",
        offered=False,
        needs=("the prompt", "gradients"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "space", checked_space(self.space, "TextCenGen"))

    def loss(self, maps: Tensor, memory: dict[str, Any]) -> Tensor:
        free = send(box_on_grid(self.space, *maps.shape[-2:]), maps.device, maps.dtype)
        with torch.no_grad():
            level = stretched(maps.detach(), (-2, -1), from_zero=False)
            conflict = (level * free).sum((-2, -1)) / free.sum() > self.theta
            moved = shifted(level, displacement(level, self.space, self.force, self.margin))
            goal = moved * (1 - self.exclusion * free)
        heat = maps / maps.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        apart = 1 - 2 * torch.minimum(heat, goal).sum((-2, -1)) / (heat + goal).sum((-2, -1))
        inside = (heat * free).sum((-2, -1)) / heat.sum((-2, -1))
        return ((apart + inside) * conflict).sum(1)
