"""What BroadWay is asked to do: its fields and their checks, and the decoder stages that they speak of.

They stand apart from `BroadWay`, which makes a `Motion`, so that `Motion` can read them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch

from attnctl.core.call import CallState
from attnctl.core.control import Control
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.data.picture_files import read_picture, upright
from attnctl.errors import ConfigError, SiteError, number, whole
from attnctl.kernels.temporal import Interpolation

__all__ = ["Beta", "HeadMatch", "MotionFields", "decoder_stage", "is_after", "reference_stage"]

HeadMatch = Literal["group_mean", "strict"]
BetaScope = Literal["batch", "sample"]
Beta: TypeAlias = "float | Sequence[float] | Mapping[str, float | Sequence[float]]"

_MASK_SIDE = 128  # more than the latents of any temporal attention in use


@dataclass(frozen=True, kw_only=True)
class MotionFields(Control, abstract=True):
    """Hold and check the fields of a `BroadWay`, whose docstring describes them."""

    alpha: float = knob(0.6, 0.0, 1.0, shown=True)
    beta: Beta = knob(1.5, kind="free", values="0 or more; a course of them; these by selector", shown=True, hash=False)
    tau: int | Literal["auto"] = knob("auto", values="'auto', or whole, 0 or more (bins)", shown=True)
    stop: float = 0.2
    motion: float | None = knob(None, 0.0, 10.0, hint="blank: alpha and beta; 1: published", shown=True)
    reference: str | None = None
    interpolation: Interpolation = knob("nearest", options=Interpolation)
    head_match: HeadMatch = knob("group_mean", options=HeadMatch)
    energy_floor: bool = True
    beta_scope: BetaScope = knob("batch", options=BetaScope)
    mask: Any = None

    kinds: ClassVar[tuple[str, ...]] = ("temporal",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "beta", _checked_beta(self.beta))
        if self.tau != "auto":
            object.__setattr__(self, "tau", whole(self.tau, "BroadWay: tau", of="bins (or 'auto')"))
        if self.motion is not None and (self.alpha, self.beta) != (0.6, 1.5):
            raise ConfigError(
                f"BroadWay: motion={self.motion} sets alpha and beta, and alpha={self.alpha}, beta={self.beta} "
                "were given too. Give the one knob, or the two numbers."
            )
        if self.mask is not None:
            object.__setattr__(self, "mask", _checked_mask(self.mask))

    def strength(self) -> tuple[float, Beta]:
        """Return alpha and beta, which `motion` may stand for."""
        if self.motion is None:
            return self.alpha, self.beta
        return 0.6 * min(self.motion, 1.0), 1 + self.motion / 2

    def beta_at(self, value: float | Sequence[float], state: CallState) -> float:
        """Return the gain at the current step: a course of several numbers spans the window."""
        if isinstance(value, Sequence):
            done = (state.progress - self.start) / max(self.stop - self.start, 1e-9)
            value = float(np.interp(done, np.linspace(0, 1, len(value)), value))
        return max(value, 1.0) if self.energy_floor else float(value)

    def in_window(self, state: CallState) -> bool:
        return not self._neutral and super().in_window(state)

    @property
    def _neutral(self) -> bool:
        alpha, beta = self.strength()
        values = beta.values() if isinstance(beta, Mapping) else (beta,)
        gains = [g for v in values for g in (v if isinstance(v, Sequence) else (v,))]
        return alpha == 0 and all(g == 1 or (g < 1 and self.energy_floor) for g in gains)


def decoder_stage(name: str) -> str | None:
    """Return the decoder stage of a site, such as "up_blocks.1"; None outside the decoder."""
    parts = name.split(".")
    return f"up_blocks.{parts[1]}" if parts[0] == "up_blocks" else None


def reference_stage(sites: Sequence[Site], wanted: str | None = None) -> str:
    """Return the decoder stage whose maps guide: the lowest of the last three with temporal attention.

    Raises:
        SiteError: The stage asked for has no temporal attention, or no decoder stage has any.
    """
    stages = [int(s.name.split(".")[1]) for s in sites if s.kind == "temporal" and decoder_stage(s.name)]
    names = [f"up_blocks.{i}" for i in sorted(set(stages))]
    if wanted is not None and wanted.replace("up.", "up_blocks.") in names:
        return wanted.replace("up.", "up_blocks.")
    if wanted is not None or not names:
        raise SiteError(
            f"BroadWay: {wanted or 'the decoder'} has no temporal attention to take reference maps from. "
            f"Stages that have: {', '.join(names) or 'none'}. alpha=0 needs none."
        )
    return f"up_blocks.{max(min(stages), max(stages) - 2)}"


def is_after(site: Site, stage: str) -> bool:
    site_stage = decoder_stage(site.name)
    return site_stage is not None and int(site_stage.split(".")[1]) > int(stage.split(".")[1])


def _checked_beta(beta: Any) -> Beta:
    if isinstance(beta, Mapping):
        if not beta or not all(isinstance(name, str) for name in beta):
            raise ConfigError(f"BroadWay: beta={beta!r} must map selectors such as 'up.2' to numbers.")
        return {name: _checked_course(value) for name, value in beta.items()}
    return _checked_course(beta)


def _checked_course(value: Any) -> float | tuple[float, ...]:
    several = isinstance(value, (list, tuple))
    if several and not value:
        raise ConfigError("BroadWay: beta is an empty list: give at least one number.")
    numbers = tuple(number(v, "BroadWay: beta", 0.0) for v in (value if several else (value,)))
    return tuple(map(float, numbers)) if several else numbers[0]


def _checked_mask(mask: Any) -> tuple[tuple[float, ...], ...]:
    """Read a picture of where to act as rows of numbers from 0 to 1, at most 128 on a side."""
    import cv2
    from PIL import Image

    if isinstance(mask, (str, bytes)) or hasattr(mask, "__fspath__"):
        mask = read_picture(os.fsdecode(mask), ConfigError)
    if isinstance(mask, Image.Image):
        mask = np.asarray(upright(mask).convert("L"), np.float32) / 255
    try:
        values: Any = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask, np.float32)
    except (TypeError, ValueError, OverflowError):
        values = np.zeros(0, np.float32)
    if values.ndim != 2 or not values.size or not bool(((values >= 0) & (values <= 1)).all()):
        raise ConfigError(
            f"BroadWay: mask must be a picture, or numbers [height, width] from 0 to 1; got {type(mask).__name__} of "
            f"shape {tuple(np.shape(mask))}."
        )
    rows, columns = (min(side, _MASK_SIDE) for side in values.shape)
    if (rows, columns) != values.shape:
        values = cv2.resize(values, (columns, rows), interpolation=cv2.INTER_AREA)
    return tuple(tuple(round(float(v), 4) for v in row) for row in values)
