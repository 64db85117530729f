"""Injecting queries, keys or values of an inverted source at chosen blocks.

"Taming Rectified Flow for Inversion and Editing" (RF-Solver-Edit), arXiv 2411.04746: in the first steps of the edit,
the values of FLUX's later single-stream blocks are the source's, of image and text tokens alike. "Stable Flow: Vital
Layers for Training-Free Image Editing", arXiv 2411.14430, takes keys and values of image tokens at the layers that
matter most, which `attnctl hunt --unit block` finds. Both are one rule: at listed sites and steps

    x_edit[tokens] = x_source[tokens]        x among q, k, v

The source rides as a row in front of the edit (`beside`); nothing of it is kept but one latent per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family, family_of
from attnctl.core.hosts.published import Default, published_in
from attnctl.core.hosts.tokens import image_keys
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors.editing.beside import BesideSource
from attnctl.processors.editing.source import Inversion

__all__ = ["Inject", "InjectTokens"]

InjectTokens = Literal["all", "image"]
_PARTS = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Inject(Control):
    """Put parts of a source's attention in the place of an edit's (RF-Solver-Edit, arXiv 2411.04746).

    `attnctl.pipelines.edit_video` does the whole job. By hand: attach `dataclasses.replace(control, inversion=...)` and
    run the pipeline with `pipe.scheduler = inversion.way_back()` and `latents=inversion.noise`.

    Attributes:
        source: The prompt that describes the source.
        target: The prompt that describes the result.
        parts: Parts that are taken from the source: some of "q", "k" and "v".
        tokens: "all" tokens, text too, or those of the "image".
        inversion: The inverted source.

    Example:
        >>> Inject(source="a red car", target="a blue car").describe()
        "Inject(source='a red car', target='a blue car')"
    """

    source: str
    target: str
    parts: Sequence[str] = ("v",)
    tokens: InjectTokens = knob("all", options=InjectTokens)
    stop: float = knob(0.2, 0.0, 1.0, shown=True, last=True)
    inversion: Inversion | None = field(default=None, repr=False, compare=False)

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    about: ClassVar[About] = About(
        does="edits with a prompt, keeping values, keys or queries of the inverted source at chosen blocks",
        page="inject",
        goal="edit a video or an image with a prompt",
        paper="arXiv 2411.04746",
        cite=(
            "Wang et al., *Taming Rectified Flow for Inversion and Editing*, arXiv 2411.04746",
            "Avrahami et al., *Stable Flow: Vital Layers for Training-Free Image Editing*, arXiv 2411.14430",
        ),
        group="Editing",
        offered=False,
        sites="the last third of a transformer's self- or joint attention",
        needs=("the prompt", "an inversion of the source"),
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(("WordEdit", "Inject"), "model", "each takes the attention of a source of its own"),
        Conflict("Guidance", "model", "its extra pass has no row of the source"),
        Conflict("Combining", "model", "its sum would take in the source's row"),
        Conflict("LatentGuidance", "model", "moved latents leave the path that the source was inverted on"),
        Conflict("NAG", "site", "both compute the attention of chosen rows, which the other takes for all"),
        Conflict("ShareAttention", "site", "both decide which picture's keys the queries see"),
        Conflict("AgentAttention", "site", "merged tokens have no counterpart in the source's attention"),
    )
    published: ClassVar[dict[str, Default]] = {
        "FLUX.1": Default(
            span=(39, 57, 57), source="RF-Solver-Edit, arXiv 2411.04746: single blocks 20 to 37 of FLUX.1"
        )
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("source", "target"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"Inject: {name}={getattr(self, name)!r} is not a prompt: give a text.")
        parts: Any = self.parts
        if not isinstance(parts, (list, tuple)) or not parts or any(p not in _PARTS for p in parts):
            raise ConfigError(f"Inject: parts={parts!r:.60}: give a list of some of {', '.join(_PARTS)}.")
        object.__setattr__(self, "parts", tuple(p for p in _PARTS if p in parts))

    def needs_prompt(self) -> bool:
        return self.inversion is not None

    def describe(self) -> str:
        return super().describe() if self.inversion is None else replace(self, inversion=None).describe()

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if family.unet:
            raise UnsupportedModelError(
                f"Inject takes from a row that rides beside the edit, which only transformers have; this is a "
                f"{family.name} model. Use FateZero."
            )
        default = published_in(type(self), family, sites) or Default(
            span=(2, 3, 3), source="the last third, as on FLUX.1"
        )
        return default.of(sites, self.kinds, "Inject")

    def default_source(self, family: Family) -> str | None:
        return super().default_source(family) or "the last third, carried over from FLUX.1"

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        if family_of(denoiser).unet:
            self.default_sites(sites, family_of(denoiser))
        return _Injecting(self, denoiser, pipe)


class _Injecting(BesideSource):
    """Injection at work on one transformer."""

    def begin_edit(self, passes: LiveDenoiser) -> bool:
        return True

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        alone = call.q.shape[0] == 1 and call.state.rows.total > 1
        if not self.active or (call.index > 0 and not alone):
            return proceed(call)
        self.refuse_guidance(call)
        if alone:  # Mochi calls attention row by row
            if call.index == 0:
                self.whole = {p: getattr(call, p) for p in _PARTS}
            if call.index != self.edit:
                return proceed(call)
        changed = {}
        for part in self.control.parts:
            x = getattr(call, part)
            source = self.whole[part] if alone else x[:1]
            at = slice(0, 1) if alone else slice(self.edit, self.edit + 1)
            image = None if call.image is None else call.image if part == "q" else image_keys(call)
            if image is not None and (self.control.tokens == "image" or source.shape[2] != x.shape[2]):
                row = x[at].clone()
                row[:, :, image] = source[:, :, image]
            else:
                row = source
            changed[part] = torch.cat([x[: at.start], row, x[at.stop :]])
        return proceed(call.with_(**changed))
