"""What kind of attention a site of an unlisted model computes, by what its first call shows.

Names are a hint alone there: the same class of module attends within the image in one model and over text and image in
another. What is certain is what a call brings: its queries and keys, the tokens that the processor was handed, and the
image and text of the denoiser's own call. Where these counts decide, the site has the kind that they show; where they
do not, it counts as joint attention whose parts are not known, so that whatever must tell image from text is refused.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from attnctl.core.hosts.arguments import main_input
from attnctl.core.hosts.families import Family
from attnctl.core.sites import Site
from attnctl.errors import SiteError, UnsupportedModelError

__all__ = ["chosen_sites", "shown_kind", "shown_site", "texts_of"]

_TEXT = re.compile(r"encoder_hidden_states|text|txt|caption|cap_feats|prompt|context|input_ids")
_NO_TEXT = re.compile(r"mask|_ids$|attention|length|lens|pooled|pool|projection|guidance|scale|layers|image_embeds")


def shown_kind(
    denoiser: torch.nn.Module,
    bound: Mapping[str, Any],
    queries: int,
    keys: int,
    hidden: int | None,
    encoder: int | None,
) -> str | None:
    """Tell the kind of an attention by counting tokens; None where the counts do not decide.

    Args:
        denoiser: The model.
        bound: Arguments of its call by name.
        queries: Tokens of q.
        keys: Tokens of k.
        hidden: Tokens that the processor was called with, or None where that is no sequence.
        encoder: Tokens of a second sequence that it was called with, or None.
    """
    if encoder and queries == keys == (hidden or 0) + encoder:
        return "joint"
    text, image = text_lengths(bound), image_lengths(denoiser, bound)
    if not text and queries == keys:
        return "self"  # nothing but the image (or the classes that modulate it) came in
    only_image, only_text = image - text, text - image
    if queries in image and keys - queries in text and keys not in text:
        return "joint"  # queries of the image alone
    if queries == keys:
        if queries in only_image:
            return "self"
        if queries in only_text:
            return "text"
        return "joint" if any(queries == i + t for i in image for t in text) else None
    if queries in image and keys in text:
        return "cross" if keys in only_text else None
    return "aux"


def chosen_sites(controls: Sequence[Any], sites: tuple[Site, ...], family: Family) -> dict[int, tuple[Site, ...]]:
    """Choose the sites of each control, by its place in the list.

    Raises:
        SiteError: A control finds none; of an unlisted model the error says that kinds are read off names.
    """
    try:
        return {i: c.resolve(sites, family) for i, c in enumerate(controls)}
    except SiteError as error:
        if family.classes:
            raise
        raise SiteError(
            f"{error} This model is in no table of attnctl: the kinds of its sites are guessed from their names. "
            "`attnctl sites MODEL --probe` shows what a call computes there, and the row of the table that says so."
        ) from None


def shown_site(site: Site, state: Any, queries: int, keys: int, hidden: Any, encoder: Any) -> tuple[Site, bool]:
    """Return an unlisted model's site with the kind that its first call shows, and whether controls act there.

    A control that was put on self-attention by name acts where the call shows self or joint attention (of unknown parts
    where the counts do not decide); one that was put on cross-attention acts there unless the call shows another kind.
    Elsewhere it leaves the site alone, and a warning gives the counts.

    Raises:
        UnsupportedModelError: It is another kind, and the call runs inside a compiled block, where that comes too late.
    """
    if site.kind not in ("self", "cross", "joint") or state.denoiser is None:
        return site, True
    shown = shown_kind(state.denoiser, state.bound, queries, keys, _tokens(hidden), _tokens(encoder))
    kind = shown or ("cross" if site.kind == "cross" and queries != keys else "joint")
    if kind == site.kind:
        return site, True
    if torch.compiler.is_compiling():
        raise UnsupportedModelError(
            f"{site.name} attends to more than its image, which a compiled block shows too late: call the model once "
            "under control before it is compiled."
        )
    acts = kind == "joint" and site.kind != "cross"
    if not acts:
        text, image = sorted(text_lengths(state.bound)), sorted(image_lengths(state.denoiser, state.bound))
        warnings.warn(
            f"attnctl: {site.name} was taken for {site.kind}-attention by its name, and computes {kind} attention "
            f"({queries} queries, {keys} keys; the image has {_either(image)} tokens, the text {_either(text)}): it is "
            "left alone. Name other sites to be rid of this warning: `attnctl sites MODEL --probe` lists their kinds.",
            stacklevel=2,
        )
    return replace(site, kind=kind), acts


def _either(lengths: list[int]) -> str:
    return " or ".join(map(str, lengths)) if lengths else "no"


def _tokens(value: Any) -> int | None:
    return int(value.shape[1]) if isinstance(value, torch.Tensor) and value.ndim == 3 else None


def text_lengths(bound: Mapping[str, Any]) -> set[int]:
    """Return the lengths that the texts of a call may have, by the names of its arguments."""
    lengths: set[int] = set()
    for name, part in texts_of(bound):
        ids = name == "input_ids"
        if ids and part.ndim == 1:
            lengths.add(int(part.shape[0]))
        elif part.ndim >= 2:
            lengths |= {int(part.shape[-1 if ids else -2]), int(part.shape[1] if part.ndim > 2 else part.shape[0])}
    return lengths


def texts_of(bound: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the texts of a call and the names of the arguments that hold them, by these names."""
    for name, value in bound.items():
        if not _TEXT.search(name) or (_NO_TEXT.search(name) and name != "input_ids"):
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, torch.Tensor):
                yield name, part


def image_lengths(denoiser: torch.nn.Module, bound: Mapping[str, Any]) -> set[int]:
    """Return how many tokens the image of a call may have, in all readings of its latents' axes."""
    latents = main_input(bound)
    latents = latents[0] if isinstance(latents, (list, tuple)) else latents
    if not isinstance(latents, torch.Tensor):
        return set()
    config: Any = getattr(denoiser, "config", None)
    size = getattr(config, "patch_size", None) or 1
    patch = int(size[-1]) if isinstance(size, (list, tuple)) else int(size)
    in_time = int(size[0]) if isinstance(size, (list, tuple)) else int(getattr(config, "patch_size_t", None) or 1)
    shape = tuple(latents.shape)
    if len(shape) == 3:
        return {shape[1], shape[2]}
    if len(shape) not in (4, 5):
        return set()
    channels = {getattr(config, name, None) for name in ("in_channels", "in_visual_dim")}
    axes = [a for a in range(1, len(shape)) if shape[a] in channels] or [1]
    lengths: set[int] = set()
    for axis in axes:
        frames, h, w = ((1,) * 3 + tuple(s for a, s in enumerate(shape[1:], 1) if a != axis))[-3:]
        h, w = h // patch, w // patch
        levels = [(h, w)]
        if getattr(config, "block_out_channels", None):  # a UNet halves the grid from stage to stage
            levels = list(
                itertools.accumulate(
                    config.block_out_channels, lambda g, _: (-(-g[0] // 2), -(-g[1] // 2)), initial=(h, w)
                )
            )
        for high, wide in levels:
            lengths |= {high * wide, high * wide * -(-frames // in_time)}
    return lengths
