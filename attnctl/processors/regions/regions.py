"""Regions: a prompt of its own for each region of the picture, inside attention.

Cross-attention (attention couple), for each image token x with m_r(x) the share of it that region r covers,
c = min(1, sum_r m_r) and b the base ratio:

    o(x) = (1 - c (1 - b)) A(q, text_0) + c (1 - b) sum_r m_r A(q, text_r) / sum_r m_r

Joint attention (regional masks, as in InstantX's Regional-Prompting-FLUX, arXiv 2411.02395), with the regions R(x) that
hold token x:

    image x    attends to text_r of R(x), to the base text with log(b / (1 - b)) added to its logits, and to the image;
               outside of all regions to the base text and the image
    text_r     attends to itself and to the image inside of region r
    isolation  at every site or every second one, image x attends only to image tokens that share a region with it

The region's texts have streams of their own beside the prompt's, so no position changes, and tokens of one set of
regions attend in one call, so there is no N x N mask.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch

from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.ghost import equal
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About
from attnctl.errors import ConfigError
from attnctl.kernels.areas import checked_box
from attnctl.processors.regions.live import LiveRegions

__all__ = ["Area", "Isolation", "Regions"]

Area: TypeAlias = Any
"""A box (left, top, right, bottom) in fractions of the picture, the name of a mask file, or a mask [h, w], 0 to 1."""
Isolation: TypeAlias = Literal["none", "alternate", "all"]


@dataclass(frozen=True, kw_only=True)
class Regions(Control):
    """Give each region of the picture a prompt of its own.

    The layout is made early: the control ends at 2/5 of the run, and the rest follows the prompt of the call.

    Attributes:
        prompts: One prompt per region.
        embeds: Embeddings in place of the prompts, one mapping per region, by the names of the pipeline's arguments
            for the prompt's ("prompt_embeds"), or of the denoiser's ("encoder_hidden_states").
        areas: One area per region: a box (left, top, right, bottom) in fractions of the picture, the name of a picture
            file that is white inside, or a mask [h, w] from 0 to 1. Areas may overlap.
        base: How much a covered token follows the prompt of the call, 0 to 1, besides the regions' prompts.
        isolation: Sites of joint attention at which image tokens attend only to their own region: "none", every second
            one ("alternate") or "all".
        stop: Fraction of the run at which the control ends, 0 to 1.
    """

    prompts: tuple[str, ...] = knob((), kind="free", values="one text per region")
    embeds: tuple[Mapping[str, Any], ...] | None = knob(None, values="tensors by name", compare=False, repr=False)
    areas: tuple[Area, ...] = knob((), kind="free", values="one box, file or mask per region", compare=False)
    base: float = knob(0.2, 0.0, below=1.0, span=(0.0, 0.9, 0.05), shown=True)
    isolation: Isolation = knob("alternate", options=Isolation)
    stop: float = knob(0.4, 0.0, 1.0, shown=True, last=True)

    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")
    about: ClassVar[About] = About(
        does="a prompt of its own for each region of the picture",
        page="regions",
        goal="get every object of the prompt, in its place",
        paper="arXiv 2411.02395",
        cite=("Chen et al., *Training-free Regional Prompting for Diffusion Transformers*, arXiv 2411.02395",),
        group="Words and layout",
        offered=False,
        sites="every cross-attention; without any, every joint attention",
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict("Regions", "site", "each takes the prompt's rows for all: give one Regions all prompts and areas"),
        Conflict("NAG", "site", "both attend with the prompt's rows to other texts, which the other takes for all"),
        Conflict("WordEdit", "site", "both compute the cross-attention of chosen rows, which the other takes for all"),
        Conflict("ShareAttention", "site", "both decide which keys the prompt's rows see"),
        Conflict(
            ("PARO", "SparseAttention"),
            "site",
            "regions decide which keys a query sees, as a choice of blocks does",
        ),
        Conflict(
            ("Inject", "FlowEdit"),
            "model",
            "the edit makes calls with rows of its own, and regions encode their prompts for the pipeline's",
        ),
        Conflict("AgentAttention", "site", "regions go by the places of tokens, which merging takes away"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompts", "areas", "embeds"):
            given = getattr(self, name)
            if name == "areas" and getattr(given, "ndim", 0) == 3:  # masks in one array [regions, height, width]
                given = tuple(given)
                object.__setattr__(self, name, given)
            if not isinstance(given, (list, tuple, str)) and not (name == "embeds" and given is None):
                raise ConfigError(f"Regions: {name}={given!r:.60} is no list: give one entry per region.")
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        embeds = None if self.embeds is None else tuple(self.embeds)
        if embeds is not None and (prompts or not embeds or not all(isinstance(e, Mapping) and e for e in embeds)):
            raise ConfigError("Regions: embeds takes one mapping of names to tensors per region, without prompts.")
        if embeds is None and not (prompts and all(isinstance(p, str) and p.strip() for p in prompts)):
            raise ConfigError(
                f"Regions: prompts={self.prompts!r:.80} should be one text per region, none of them empty."
            )
        areas = tuple(self.areas)
        count = len(prompts if embeds is None else embeds)
        if len(areas) != count:
            raise ConfigError(
                f"Regions: {count} prompts and {len(areas)} areas were given: give one area per prompt, such as "
                "areas=((0, 0, 0.5, 1), (0.5, 0, 1, 1)) for two halves."
            )
        object.__setattr__(self, "prompts", prompts)
        object.__setattr__(self, "embeds", embeds)
        object.__setattr__(self, "areas", tuple(_area(a, f"Regions: areas[{i}]") for i, a in enumerate(areas)))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and equal(vars(self), vars(other))

    def __repr__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        areas = tuple(_Shown(f"mask {list(a.shape)}") if isinstance(a, torch.Tensor) else a for a in self.areas)
        shown = copy.copy(self)  # no `replace`, which would check these words
        object.__setattr__(shown, "areas", areas)
        if self.embeds is not None:
            embeds = tuple(_Shown(f"{{{', '.join(map(str, e))}}}") for e in self.embeds)
            object.__setattr__(shown, "embeds", embeds)
        return Control.describe(shown)

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        cross = any(site.kind == "cross" for site in sites)
        return select(sites, "cross" if cross else "joint", kinds=self.kinds, what="Regions")

    def needs_prompt(self) -> bool:
        return True

    @property
    def texts(self) -> tuple[tuple[str | None, Mapping[str, Any] | None], ...]:
        """Return each region's prompt and embeddings, one of which is None."""
        return tuple((p, None) for p in self.prompts) if self.embeds is None else tuple((None, e) for e in self.embeds)

    def isolated(self, index: int) -> bool:
        """Tell whether image tokens see their own region alone at one of the control's sites."""
        return self.isolation == "all" or (self.isolation == "alternate" and index % 2 == 0)

    @property
    def base_bias(self) -> float:
        """Return what is added to the base text's logits for covered tokens, -inf for a base ratio of 0."""
        return math.log(self.base / (1 - self.base)) if self.base > 0 else -math.inf

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveRegions:
        return LiveRegions(self, sites, denoiser)


class _Shown(str):
    """A word that `repr` shows as it is."""

    def __repr__(self) -> str:
        return str(self)


def _area(area: Any, what: str) -> Area:
    """Check one area; a file is read when the control is attached."""
    if isinstance(area, (str, os.PathLike)):
        return os.fspath(area)
    if isinstance(area, (np.ndarray, torch.Tensor)) and area.shape == (4,):
        area = area.tolist()
    if hasattr(area, "convert"):  # a picture
        area = torch.from_numpy(np.array(area.convert("L"), dtype="float32") / 255)
    if isinstance(area, (tuple, list)) and len(area) == 4 and not isinstance(area[0], (tuple, list)):
        return checked_box(area, what)
    try:
        mask = torch.as_tensor(area).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{what}={area!r:.60} is no area: give a box (left, top, right, bottom) in fractions of the picture, the "
            "name of a mask file, or a mask [height, width] from 0 to 1."
        ) from error
    if mask.is_meta or mask.is_complex():
        raise ConfigError(f"{what}: a mask of {mask.dtype} on {mask.device} was given; expected numbers from 0 to 1.")
    if mask.ndim == 1:
        raise ConfigError(
            f"{what}: {len(mask)} numbers were given; a box has four (left, top, right, bottom), in fractions of the "
            "picture, and a mask is [height, width]."
        )
    if mask.ndim != 2 or min(mask.shape) < 1:
        raise ConfigError(f"{what}: a mask of shape {tuple(mask.shape)} was given; expected [height, width].")
    mask = mask.to("cpu", torch.float32, copy=True)  # the caller's own may change
    if not bool(mask.isfinite().all()) or float(mask.min()) < 0 or float(mask.max()) > 1:
        raise ConfigError(
            f"{what}: the mask holds values from {float(mask.min()):g} to {float(mask.max()):g}; 0 to 1 are expected."
        )
    if not bool((mask > 0).any()):
        raise ConfigError(f"{what}: the mask is empty: no value is above 0.")
    return mask
