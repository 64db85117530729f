"""BroadWay: more motion from temporal attention, by self-guidance and a Fourier gain.

"ByTheWay: Boost Your Text-to-Video Generation Model to Higher Quality in a Training-free Way", arXiv 2410.06241 (first
called BroadWay). In the first fifth of the run every temporal map A of the decoder becomes

    A_g = A + alpha (R - A)                  temporal self-guidance: R is the map of the lowest decoder block
    A'  = A_g with its high band times max(beta, sqrt((E1 - E2_low) / E2_high))      Fourier motion enhancement

E1 and E2 being the energies of A and A_g over the prompt's rows. `kernels.bands` says why no FFT is needed, and no
map either where alpha is 0. Only the formulas are published: what they leave open is said at each field.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch

from attnctl.core.call import CallState
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.live import LiveControl
from attnctl.core.sites import Site, select
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.kernels.temporal import Interpolation

__all__ = ["Beta", "BroadWay", "HeadMatch", "decoder_stage", "reference_stage"]

HeadMatch = Literal["group_mean", "strict"]
BetaScope = Literal["batch", "sample"]
Beta: TypeAlias = "float | Sequence[float] | Mapping[str, float | Sequence[float]]"

_MASK_SIDE = 128  # more than the latents of any temporal attention in use


@dataclass(frozen=True, kw_only=True)
class BroadWay(Control):
    """Raise the motion of a video by what its temporal attention already holds (arXiv 2410.06241).

    On UNets with temporal attention (AnimateDiff in all its pipelines, UNet3D, I2VGenXL, Stable Video Diffusion) both
    parts act. Latte has no decoder to take a reference from: enhancement only. Transformers that attend over all frames
    at once (CogVideoX, Wan, LTX, HunyuanVideo and their kin) have no temporal map; there the values are mixed over the
    frames, which filters every row of the full map along the key frames exactly. That is experimental: start with beta
    1.1. Self-guidance acts on neither, and attaching says so.

    Attributes:
        alpha: Strength of self-guidance in [0, 1].
        beta: Gain of the high band, 0 or more. A number; several numbers for a course over the window (linear between
            them); or a mapping from selectors ("up.2", "up_blocks.3") to either, sites not named taking 1.
        tau: Half width of the high band in bins; "auto" is F // 2 - 1 (the published 7 of 16): all but the mean.
        motion: One knob in place of alpha and beta: 0 changes nothing, 1 is the published setting, more is more.
            alpha = 0.6 min(motion, 1), beta = 1 + motion / 2.
        reference: Decoder stage that guides, such as "up_blocks.1"; None for the lowest of the last three with
            temporal attention, which is the published one in models of four stages.
        interpolation: How its maps are enlarged. The paper does not say; nearest costs least.
        head_match: Where the reference has more heads, "group_mean" averages them in groups (ours); "strict" refuses.
        energy_floor: Never less than the energy before self-guidance. Off, a beta below 1 dampens motion.
        beta_scope: "batch": one gain for all prompts of a batch, as published; "sample": one for each.
        mask: Where to act, a picture of any size: white fully, black not at all. A path, a PIL image, or an array or
            tensor [height, width] of 0 to 1. Kept as rows of numbers.

    Example:
        >>> BroadWay(motion=1.0).strength()
        (0.6, 1.5)
    """

    alpha: float = 0.6
    beta: Beta = field(default=1.5, hash=False)
    tau: int | Literal["auto"] = "auto"
    stop: float = 0.2
    motion: float | None = None
    reference: str | None = None
    interpolation: Interpolation = "nearest"
    head_match: HeadMatch = "group_mean"
    energy_floor: bool = True
    beta_scope: BetaScope = "batch"
    mask: Any = None

    kinds: ClassVar[tuple[str, ...]] = ("temporal",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("alpha", 0.0, 1.0)
        object.__setattr__(self, "beta", _checked_beta(self.beta))
        whole = isinstance(self.tau, int) and not isinstance(self.tau, bool) and self.tau >= 0
        if self.tau != "auto" and not whole:
            raise ConfigError(f"BroadWay: tau={self.tau!r} must be 'auto' or a whole number of bins, 0 or more.")
        if self.motion is not None:
            self._check_number("motion", 0.0, 10.0)
            if (self.alpha, self.beta) != (0.6, 1.5):
                raise ConfigError(
                    f"BroadWay: motion={self.motion} sets alpha and beta, and alpha={self.alpha}, beta={self.beta} "
                    "were given too. Give the one knob, or the two numbers."
                )
        self._check_choice("interpolation", Interpolation)
        self._check_choice("head_match", HeadMatch)
        self._check_choice("beta_scope", BetaScope)
        if self.mask is not None:
            object.__setattr__(self, "mask", _checked_mask(self.mask))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> BroadWay:
        """Return a published setting: "animatediff" (0.6, 1.5) or "videocrafter2" (0.1, 10).

        Raises:
            ConfigError: There is no setting of that name.
        """
        settings = {"animatediff": {"alpha": 0.6, "beta": 1.5}, "videocrafter2": {"alpha": 0.1, "beta": 10.0}}
        if name not in settings:
            raise ConfigError(f"BroadWay has no preset {name!r}; it has {', '.join(settings)}.")
        return cls(**{**settings[name], **changes})

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

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        temporal = any(s.kind == "temporal" for s in sites)
        if not temporal and not family.all_frames:
            raise UnsupportedModelError(
                f"{self._label}: {family.name} models attend over the frames of no video: they have neither temporal "
                "attention nor attention over all frames. Use it with AnimateDiff, SVD, I2VGenXL, UNet3D, Latte, "
                "CogVideoX, Wan, LTX or HunyuanVideo."
            )
        kinds = self.kinds if temporal else ("self", "joint")
        if self.sites is None:
            return self.default_sites(sites, family)
        chosen = select(sites, self.sites, kinds=kinds, what=self._label)
        if self.strength()[0] > 0 and temporal and family.unet:
            stage = reference_stage(sites, self.reference)
            later = [s for s in chosen if _after(s, stage)]
            if later and not any(decoder_stage(s.name) == stage for s in chosen):
                raise SiteError(
                    f"{self._label}: self-guidance of {later[0].name} needs the maps of {stage}, which "
                    f"sites={self.sites!r} leaves out. Add {stage!r} (beta={{...}} can keep it unenhanced), name "
                    "another reference, or set alpha=0."
                )
        return chosen

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if not any(s.kind == "temporal" for s in sites):
            return tuple(s for s in sites if s.kind in ("self", "joint"))
        if not family.unet:
            return tuple(s for s in sites if s.kind == "temporal")
        stage = reference_stage(sites, self.reference)
        return tuple(s for s in sites if s.kind == "temporal" and (decoder_stage(s.name) == stage or _after(s, stage)))

    def default_source(self, family: Family) -> str | None:
        if family.name == "AnimateDiff":
            return "BroadWay, arXiv 2410.06241: temporal attention of the last three decoder stages"
        return "BroadWay, arXiv 2410.06241, for AnimateDiff; carried over to this family by attnctl"

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        from attnctl.processors.motion import Motion

        return Motion(self, sites, denoiser)


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
    known = [f"up_blocks.{i}" for i in sorted(set(stages))]
    if wanted is not None and wanted.replace("up.", "up_blocks.") in known:
        return wanted.replace("up.", "up_blocks.")
    if wanted is not None or not known:
        raise SiteError(
            f"BroadWay: {wanted or 'the decoder'} has no temporal attention to take reference maps from. "
            f"Stages that have: {', '.join(known) or 'none'}. alpha=0 needs none."
        )
    return f"up_blocks.{max(min(stages), max(stages) - 2)}"


def _after(site: Site, stage: str) -> bool:
    own = decoder_stage(site.name)
    return own is not None and int(own.split(".")[1]) > int(stage.split(".")[1])


def _checked_beta(beta: Any) -> Beta:
    if isinstance(beta, Mapping):
        if not beta or not all(isinstance(name, str) for name in beta):
            raise ConfigError(f"BroadWay: beta={beta!r} must map selectors such as 'up.2' to numbers.")
        return {name: _checked_course(value) for name, value in beta.items()}
    return _checked_course(beta)


def _checked_course(value: Any) -> float | tuple[float, ...]:
    several = isinstance(value, (list, tuple))
    values = tuple(value) if several else (value,)
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 <= v <= sys.float_info.max:
            raise ConfigError(f"BroadWay: beta={value!r} is out of range: give finite numbers, 0 or more.")
    if not values:
        raise ConfigError("BroadWay: beta is an empty list: give at least one number.")
    return tuple(map(float, values)) if several else value


def _checked_mask(mask: Any) -> tuple[tuple[float, ...], ...]:
    """Read a picture of where to act as rows of numbers from 0 to 1, at most 128 on a side."""
    import cv2
    from PIL import Image

    if isinstance(mask, (str, bytes)) or hasattr(mask, "__fspath__"):
        try:
            with Image.open(mask) as image:
                mask = image.convert("L")
        except OSError as error:
            raise ConfigError(f"BroadWay: the mask {mask!r} cannot be read as a picture: {error}.") from None
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"), np.float32) / 255
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
