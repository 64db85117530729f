"""One place of attention, and the selectors that choose among a model's.

A site is one attention module. A selector names some sites: an exact module name, a prefix of names, a glob, a stage
("mid", "down.2", "up.1"), a depth index or range, a kind, or a list of these. `hosts.listing` finds a model's sites.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from attnctl.errors import SiteError, nearest, shown, unboxed

__all__ = ["KINDS", "Grid", "Selector", "Site", "plain_selector", "select"]

Grid = tuple[int, int, int]
"""Frames, rows, columns of the token grid."""

Selector: TypeAlias = "str | int | range | slice | Sequence[str | int | range | slice]"

KINDS = ("self", "cross", "joint", "dual", "temporal", "text", "audio", "aux", "pool")
_STAGE = re.compile(r"(?:(down|up)\.(\d+)|(down|up|mid))")


@dataclass(frozen=True)
class Site:
    """One attention module of a denoiser.

    Attributes:
        name: diffusers' dotted module name.
        kind: self, cross, joint (text and image in one sequence), dual (SD3.5's image-only attention beside a joint
            one), temporal (over frames), text (text tokens only), audio (over sound beside a video), aux (to something
            that is neither the image nor its text) or pool (single tokens of an image backbone to all of it). Every
            control of denoisers leaves text, audio and aux alone.
        heads: Number of query heads H.
        head_dim: Channels per head D.
        depth: Place in execution order, from 0. A dual site runs beside its joint site and shares its depth.
        grid: Frames, rows, columns of the tokens: known after the first call, or for a default-sized UNet before.
        image: Image tokens in a joint sequence, known after the first call.
        text: Text tokens in a joint sequence, known after the first call.
    """

    name: str
    kind: str
    heads: int
    head_dim: int
    depth: int
    grid: Grid | None = None
    image: slice | None = None
    text: slice | None = None
    module: torch.nn.Module | None = field(default=None, repr=False, compare=False)


def plain_selector(selector: Any) -> Any:
    """Return a selector of Python's own numbers and lists, which records can hold; anything else as it is."""
    if isinstance(selector, (list, tuple)):
        return type(selector)(map(plain_selector, selector))
    if isinstance(selector, slice):
        return slice(*map(unboxed, (selector.start, selector.stop, selector.step)))
    return unboxed(selector)


def select(
    sites: Sequence[Site], selector: Selector, *, kinds: Iterable[str] = KINDS, what: str = "this control"
) -> tuple[Site, ...]:
    """Choose sites by name, prefix, glob, stage, depth, range or kind, in execution order.

    Names and depths must point at a site of an allowed kind; wider selectors (prefixes, globs, stages, ranges) keep the
    allowed ones among their matches, and leave an SD3.5 dual attention to be named exactly.

    Raises:
        SiteError: A part of the selector matches nothing, or only sites of other kinds.
    """
    allowed = tuple(kinds)
    several = isinstance(selector, Sequence) and not isinstance(selector, (str, bytes, range))
    parts: list[Any] = list(selector) if several else [selector]  # type: ignore[arg-type]
    if not parts:
        raise SiteError(f"{what}: the selector is an empty list. Name at least one site.")
    chosen: dict[str, Site] = {}
    for part in parts:
        matched, exact = _match(sites, part, what)
        eligible = [s for s in matched if s.kind in allowed]
        if not exact:
            eligible = [s for s in eligible if s.kind != "dual"]
        if not eligible:
            other_kinds = ", ".join(sorted({s.kind for s in matched}))
            here = next((kind for kind in allowed if any(s.kind == kind for s in sites)), None)
            hint = "this model has none of these kinds" if here is None else f"sites={here!r} selects what it acts on"
            raise SiteError(
                f"{what} acts on {', '.join(allowed)} attention, but {part!r} selects only {other_kinds} attention "
                f"({matched[0].name}, ...): {hint}. A control of your own says in its class: kinds = (...)."
            )
        chosen.update((s.name, s) for s in eligible)
    return tuple(s for s in sites if s.name in chosen)


def _match(sites: Sequence[Site], part: Any, what: str) -> tuple[list[Site], bool]:
    """Return the sites that one part of a selector names, and whether it named them exactly."""
    depths = max(s.depth for s in sites) + 1
    part = unboxed(part)
    if isinstance(part, bool) or not isinstance(part, (str, int, range, slice)):
        raise SiteError(f"{what}: a selector is a name, glob, depth or range, or a list of these; got {shown(part)}.")
    if isinstance(part, int):
        index = part + depths if part < 0 else part
        matched = [s for s in sites if s.depth == index]
        if not matched:
            raise SiteError(f"{what}: depth {part} is out of range: the model has depths 0 to {depths - 1}.")
        return matched, False
    if isinstance(part, (range, slice)):
        wanted = range(depths)[part] if isinstance(part, slice) else part
        matched = [s for s in sites if s.depth in wanted]
        # A range is never unrolled: its ends say whether it leaves the depths, however many numbers it has.
        if not matched or min(wanted[0], wanted[-1]) < 0 or max(wanted[0], wanted[-1]) >= depths:
            raise SiteError(f"{what}: {part} leaves the model's depths 0 to {depths - 1}.")
        return matched, False
    exact = [s for s in sites if s.name == part]
    if exact:
        return exact, True
    if part in KINDS:
        matched = [s for s in sites if s.kind == part]
    elif stage := _STAGE.fullmatch(part):
        prefix = f"{stage[1]}_blocks.{stage[2]}" if stage[1] else f"{stage[3]}_block"
        matched = [s for s in sites if s.name.startswith(prefix if stage[3] else prefix + ".")]
    elif any(c in part for c in "*?["):
        matched = [s for s in sites if fnmatch.fnmatchcase(s.name, part)]
    else:
        matched = [s for s in sites if s.name.startswith(part.rstrip(".") + ".")]
    if not matched:
        names = [s.name for s in sites]
        prefixes = {n.rpartition(".")[0] for n in names}
        raise SiteError(
            f"{what}: no attention site matches {part!r}.{nearest(part, names + sorted(prefixes))} "
            f"Kinds here: {', '.join(sorted({s.kind for s in sites}))}; depths 0 to {depths - 1}."
        )
    return matched, False
