"""BroadWay: more motion from temporal attention, by self-guidance and a Fourier gain.

"ByTheWay: Boost Your Text-to-Video Generation Model to Higher Quality in a Training-free Way", arXiv 2410.06241 (first
called BroadWay). In the first fifth of the run every temporal map A of the decoder becomes

    A_g = A + alpha (R - A)                  temporal self-guidance: R is the map of the lowest decoder block
    A'  = A_g with its high band times max(beta, sqrt((E1 - E2_low) / E2_high))      Fourier motion enhancement

E1 and E2 being the energies of A and A_g over the prompt's rows. `kernels.bands` says why no FFT is needed, and no
map either where alpha is 0. Only the formulas are published: what they leave open is said at each field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnctl.core.hosts.families import Family
from attnctl.core.live import LiveControl
from attnctl.core.registry import Conflict
from attnctl.core.sites import Site, select
from attnctl.data.about import About, Preset
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError
from attnctl.processors.broadway.fields import MotionFields, decoder_stage, is_after, reference_stage
from attnctl.processors.broadway.motion import Motion

__all__ = ["BroadWay"]


@dataclass(frozen=True, kw_only=True)
class BroadWay(MotionFields):
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
        motion: One knob in place of alpha and beta: 0 changes nothing, 1 is the published setting, more is stronger.
            alpha = 0.6 min(motion, 1), beta = 1 + motion / 2.
        reference: Decoder stage that guides, such as "up_blocks.1"; None for the lowest of the last three with
            temporal attention, which is the published one in models of four stages.
        interpolation: How the maps of the reference are enlarged. The paper leaves this open; "nearest" costs least.
        head_match: If the reference has more heads, "group_mean" averages them in groups (ours); "strict" raises.
        energy_floor: Keep at least the energy before self-guidance. If False, a beta below 1 reduces motion.
        beta_scope: "batch": one gain for all prompts of a batch, as published; "sample": one for each.
        mask: Where to act, as a picture of any size: fully where it is white, not at all where it is black. A path, a
            PIL image, or an array or tensor [height, width] of 0 to 1. Kept as rows of numbers.

    Example:
        >>> BroadWay(motion=1.0).strength()
        (0.6, 1.5)
    """

    about: ClassVar[About] = About(
        does="more and steadier motion in video models",
        page="broadway",
        goal="make a video move more, or more steadily",
        paper="arXiv 2410.06241",
        cite=(
            "Bu et al., *ByTheWay: Boost Your Text-to-Video Generation Model to Higher Quality in a Training-free "
            "Way*, arXiv 2410.06241",
        ),
        group="Video",
        sites="temporal attention of the last three decoder stages; attention over all frames in transformers",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("BroadWay", "site", "both set the gain of the same motion: give one beta and alpha"),
    )
    presets: ClassVar[tuple[Preset, ...]] = (Preset("shapes:video", "BroadWay(motion=1.0)", column=1),)

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
            later = [s for s in chosen if is_after(s, stage)]
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
        return tuple(
            s for s in sites if s.kind == "temporal" and (decoder_stage(s.name) == stage or is_after(s, stage))
        )

    def default_source(self, family: Family) -> str | None:
        if family.name == "AnimateDiff":
            return "BroadWay, arXiv 2410.06241: temporal attention of the last three decoder stages"
        return "BroadWay, arXiv 2410.06241, for AnimateDiff; carried over to this family by attnctl"

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return Motion(self, sites, denoiser)
