"""PAG and SoftPAG: guidance away from a prediction with damaged self-attention.

    pred = base + w (c - p),   base = u + s (c - u)  or  c

where p is the prediction for the prompt with the attention map A of some layers and heads replaced:

    PAG       A' = I                     "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance",
                                         arXiv 2403.17377, eq. 15
    SoftPAG   A' = (1 - u) A + u I       "Fine-Grained Perturbation Guidance via Attention Head Selection",
                                         arXiv 2506.10978, eq. 6

No map is ever made: by linearity A' v = (1 - u) SDPA(q, k, v) + u v, and the same holds for every target that is a map.
w is the weight of diffusers' PAG pipelines (`pag_scale`); the first authors' code counts from one (their 4 is w = 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.control import Guidance
from attnctl.core.guidance import Branch
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.linear import is_linear
from attnctl.core.hosts.tokens import has_outer_keys
from attnctl.core.registry import knob
from attnctl.core.sites import Site, select
from attnctl.data.about import About, Preset
from attnctl.errors import ConfigError, PlanError, SiteError, UnsupportedModelError
from attnctl.kernels import perturb
from attnctl.kernels.checks import part_of
from attnctl.plans import HeadSet

__all__ = ["PAG", "Heads", "Scope", "SoftPAG", "Target"]

Target = Literal["identity", "uniform", "query_mean", "argmax"]
Scope = Literal["all", "image", "image_block"]
Heads: TypeAlias = "HeadSet | Sequence[tuple[str | int, int]]"

_LINEAR_TARGETS = ("identity", "uniform")


@dataclass(frozen=True, kw_only=True)
class PAG(Guidance):
    """Guide away from the prediction whose self-attention maps are the identity (arXiv 2403.17377).

    Attributes:
        scope: In joint attention, "image_block" lets an image token attend to itself and to the text and leaves text
            rows alone (diffusers' PAG for SD3); "image" makes image rows the identity and leaves text rows alone;
            "all" makes every row the identity. Without text in the sequence the three are the same.

    Example:
        >>> PAG(scale=3.0, sites="mid").describe()
        "PAG(sites='mid')"
    """

    scope: Scope = knob("image_block", options=Scope, shown=True)

    about: ClassVar[About] = About(
        does="guides away from the prediction whose attention maps are the identity",
        page="pag",
        goal="sharpen structure",
        paper="arXiv 2403.17377",
        cite=("Ahn et al., *Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance*, arXiv 2403.17377",),
    )
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("shapes:text2image", 'PAG(scale=2.5, sites="up.0")', column=1),
        Preset("shapes:mmdit", "PAG(scale=2.5, sites=6)", column=1),
    )

    def alike_anywhere(self, site: Site) -> bool:
        return self.scope == "all" or site.kind == "self"

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        return _branch(self._label, sites, {}, "identity", 1.0, self.scope)


@dataclass(frozen=True, kw_only=True)
class SoftPAG(Guidance):
    """Guide away from the prediction whose attention maps lean towards a target, in chosen heads (arXiv 2506.10978).

    Attributes:
        u: Strength in [0, 1]: A' = (1 - u) A + u T. 1 replaces the map.
        heads: A `HeadSet`, or pairs (site name or depth, head); None for every head of `sites`.
        target: The map T: "identity"; "uniform" (all keys alike); "query_mean" (every query takes the map of the mean
            query, the limit of blurred queries for a wide blur); "argmax" (each query keeps its strongest key).
        scope: Which rows of a joint sequence take the target: see `PAG`.

    Example:
        >>> SoftPAG(u=0.25, heads=[("transformer_blocks.9.attn", 3), (11, 15)]).describe()
        "SoftPAG(u=0.25, heads=(('transformer_blocks.9.attn', 3), (11, 15)))"
    """

    u: float = knob(0.5, 0.0, 1.0, shown=True)
    heads: Heads | None = None
    target: Target = knob("identity", options=Target, shown=True)
    scope: Scope = knob("all", options=Scope, shown=True)

    about: ClassVar[About] = About(
        does="guides away from maps that lean towards a target, with a strength `u` and in chosen heads",
        page="pag",
        goal="sharpen structure",
        paper="arXiv 2506.10978",
        cite=(
            "Ahn et al., *Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow "
            "Models*, arXiv 2506.10978",
        ),
    )
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset("shapes:text2image", 'SoftPAG(scale=2.5, u=0.5, sites="up.0")', column=2),
        Preset("shapes:mmdit", "SoftPAG(scale=2.5, u=0.5, sites=6)", column=2),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope == "image_block" and self.target != "identity":
            raise ConfigError(
                f'{self._label}: scope="image_block" defines its own target (itself and the text), so target='
                f'{self.target!r} cannot be used with it. Use scope="image" or "all".'
            )
        if self.heads is None or isinstance(self.heads, HeadSet):
            return
        object.__setattr__(self, "heads", HeadSet.from_pairs(self.heads).pairs)

    def alike_anywhere(self, site: Site) -> bool:
        return self.heads is None and (self.scope == "all" or site.kind == "self")

    def weight(self, state: object) -> float:
        return 0.0 if self.u == 0 else super().weight(state)  # type: ignore[arg-type]

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if self.heads is None:
            return super().resolve(sites, family)
        depths = max(s.depth for s in sites) + 1
        if isinstance(self.heads, HeadSet) and self.heads.layers not in (None, depths):
            raise PlanError(
                f"{self._label}: the head set was made for a model of {self.heads.layers} attention depths "
                f"({self.heads.model or 'unnamed'}); this one has {depths}. Use it with the model it was made for."
            )
        chosen = _sites_of_pairs(self._label, self._pairs, sites, self.kinds)
        if self.sites is not None:
            names = {s.name for s in super().resolve(sites, family)}
            outside = [s.name for s in chosen if s.name not in names]
            if outside:
                raise SiteError(f"{self._label}: heads name {outside[0]}, which sites={self.sites!r} leaves out.")
        return chosen

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        heads: dict[str, tuple[int, ...]] = {}
        if self.heads is not None:
            for where, head in self._pairs:
                site = _site_of(self._label, where, sites, self.kinds)
                if not 0 <= head < site.heads:
                    raise SiteError(
                        f"{self._label}: head {head} of {site.name} is out of range: it has heads 0 to "
                        f"{site.heads - 1}."
                    )
                heads[site.name] = (*heads.get(site.name, ()), head)
        return _branch(self._label, sites, heads, self.target, self.u, self.scope)

    @property
    def _pairs(self) -> tuple[tuple[str | int, int], ...]:
        if isinstance(self.heads, HeadSet):
            return self.heads.pairs
        return tuple(self.heads or ())


def _site_of(label: str, where: str | int, sites: Sequence[Site], kinds: tuple[str, ...]) -> Site:
    """Find the one site that a head pair addresses."""
    hits = select(sites, where, kinds=kinds, what=label)
    if len(hits) > 1:
        raise SiteError(
            f"{label}: {where!r} names {len(hits)} attention sites ({hits[0].name}, {hits[1].name}, ...), but a "
            "head belongs to one. Give the full name of the site."
        )
    return hits[0]


def _sites_of_pairs(
    label: str, pairs: Sequence[tuple[str | int, int]], sites: Sequence[Site], kinds: tuple[str, ...]
) -> tuple[Site, ...]:
    if not pairs:
        raise SiteError(f"{label}: heads is empty. Name at least one (site, head) pair, or pass heads=None for all.")
    names = {_site_of(label, where, sites, kinds).name for where, _ in pairs}
    return tuple(s for s in sites if s.name in names)


def _branch(
    label: str,
    sites: tuple[Site, ...],
    heads: dict[str, tuple[int, ...]],
    target: Target,
    u: float,
    scope: Scope,
) -> Branch:
    """Build the branch that takes every site's attention towards a target."""
    for site in sites:
        processor = getattr(site.module, "processor", None)
        if is_linear(type(processor)) and target not in _LINEAR_TARGETS:
            raise UnsupportedModelError(
                f"{label}: {site.name} is linear attention, which has no map to take target={target!r} from. "
                f"Use {' or '.join(_LINEAR_TARGETS)}."
            )

    def towards_target(call: AttnCall, proceed: Proceed) -> torch.Tensor:
        def plain(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            mask: torch.Tensor | None = None,
            scale: float | None = None,
        ) -> torch.Tensor:
            return proceed(call.with_(q=q, k=k, v=v, mask=mask, scale=scale))

        at, keys = _scope_at(label, call, scope), call.keys
        if has_outer_keys(call) and at != "all":  # only the image's rows change, as where they ask alone
            assert call.image is not None
            image, out = call.image, proceed(call)
            moved = towards_target(_image_alone(call, image), proceed)
            return torch.cat([out[:, :, : image.start], moved, out[:, :, image.stop :]], 2)
        if has_outer_keys(call):  # every row has a key of its own behind the others
            keys = slice(call.k.shape[2] - call.q.shape[2], call.k.shape[2])
        return perturb(
            call.q,
            call.k,
            call.v,
            target=target,
            u=u,
            heads=heads.get(call.site.name),
            scope=at,
            image=call.image,
            keys=keys,
            mask=call.mask,
            scale=call.scale,
            plain=plain,
        )

    selected = tuple((s.name, heads.get(s.name)) for s in sites)
    return Branch(("attention", target, u, scope, selected), sites, towards_target)


def _image_alone(call: AttnCall, image: slice) -> AttnCall:
    """Return a call in which the image asks alone, of all keys."""
    mask = part_of(call.mask, call.q, call.k, image, slice(None))
    return call.with_(q=call.q[:, :, image], mask=mask, image=slice(0, image.stop - image.start), sums=None)


def _scope_at(label: str, call: AttnCall, scope: Scope) -> str:
    """Return the scope to use at one call: without other tokens in the sequence every scope means all rows."""
    if scope == "all" or (call.site.kind != "joint" and call.image is None):
        return "all"
    if call.image is None:
        raise UnsupportedModelError(
            f"{label}: scope={scope!r} needs to tell image from text tokens, which attnctl cannot at {call.site.name} "
            f'(family {call.state.family.name if call.state.family else "unknown"}). Use scope="all".'
        )
    return scope if call.image != slice(0, call.k.shape[-2]) else "all"
