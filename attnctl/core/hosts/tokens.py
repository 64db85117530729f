"""Which tokens of an attention are the image's and which the text's, and how the image's lie."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_true

from attnctl.core.hosts.families import Bound, Family, Tokens
from attnctl.core.hosts.listing import stage_grid
from attnctl.core.sites import Grid, Site
from attnctl.errors import UnsupportedModelError

__all__ = [
    "PLAIN",
    "CallTokens",
    "Parts",
    "grid_of",
    "has_outer_keys",
    "image_in",
    "image_keys",
    "parts_in",
    "parts_of",
    "placed_on_image",
    "seen_site",
    "sequences",
]


class CallTokens:
    """How the tokens of one denoiser call lie: their counts at once, the grid when it is asked for.

    Counting happens here and not at a site, where a compiled block would have to trace it.
    """

    def __init__(self, denoiser: torch.nn.Module, family: Family, bound: Bound) -> None:
        self._read: Callable[[], Grid | None] | None = functools.partial(family.grid, denoiser, bound)
        self._grid: Grid | None = None
        self.counts: Tokens | None = None
        if not bound:
            self._read = None
        elif family.tokens is not None:
            self.counts = family.tokens(denoiser, bound)
        elif self.grid is not None:
            self.counts = Tokens(math.prod(self.grid))

    @property
    def grid(self) -> Grid | None:
        """Return frames, rows and columns of the token grid, or None for a family without a rule."""
        if self._read is not None:
            self._grid, self._read = self._read(), None
        return self._grid

    def close(self) -> None:
        """Drop references to the call's tensors; a grid that was not read stays unknown."""
        self._read = None


Parts: TypeAlias = tuple[slice | None, slice | None, slice | None, bool]
"""Image, text, image keys, and whether controls act, as `parts_in` says; a plain tuple of slices, since torch.compile
carries nothing else with sizes that it does not know (Mochi cuts its text)."""


PLAIN: Parts = (None, None, None, True)
"""No other tokens are there, or nothing tells."""
_PASSED: Parts = (None, None, None, False)
"""It concerns neither this image nor its text."""


def parts_in(image: slice | None = None, text: slice | None = None, keys: slice | None = None) -> Parts:
    """Say where image and text are in an attention on which controls act.

    Args:
        image: The image's rows among the queries, where others are there too; None where none are, or nothing tells.
        text: The text among the keys, likewise.
        keys: The image among the keys of a call whose keys are other tokens than its queries.
    """
    return image, text, keys, True


def image_keys(call: Any) -> slice:
    """Return the places of the image among the keys of a call; `call.image` has those among the queries."""
    if call.keys is not None:
        return call.keys
    return slice(0, call.k.shape[-2]) if call.image is None else call.image


def has_outer_keys(call: Any) -> bool:
    """Tell whether keys of pictures that were read before stand in front of a sequence whose text asks too."""
    if call.keys is None or call.image is None or call.text is None:
        return False
    return bool(0 <= call.text.start - (call.keys.start - call.image.start) < call.q.shape[-2])


def sequences(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return what a processor was called with: its own tokens, and those of a second sequence or None.

    Args:
        names: The names of its parameters, without itself and the attention module.
        args: Its arguments by position, without the attention module.
        kwargs: Its arguments by name.
    """
    given = dict(zip(names, args, strict=False)) | kwargs
    hidden = given.get(names[0]) if names else None
    second = next((given[n] for n in _SECOND if given.get(n) is not None), None)
    return hidden, None if second is hidden else second


_SECOND = ("encoder_hidden_states", "context", "gen_seq")


def parts_of(
    site: Site,
    family: Family | None,
    counts: Tokens | None,
    queries: int,
    keys: int,
    index: int,
    hidden: Any,
    second: Any,
) -> Parts:
    """Say where image and text are in an attention of some queries to some keys.

    Args:
        site: Where it is computed.
        family: The denoiser's family.
        counts: Tokens of the denoiser call, if they are known.
        queries: Tokens of q.
        keys: Tokens of k.
        index: How many attentions the same module has computed before, in this call of it.
        hidden: What the processor was called with.
        second: The second sequence that it was called with, or None in a packed sequence.
    """
    h, e, kind = _count(hidden), _count(second), site.kind
    if family is not None and family.calls is not None and site.module is not None:
        calls = family.calls(site.name, site.module)
        if index < len(calls) and calls[index] != kind:
            return _PASSED
    if kind == "joint" and family is not None and family.text is not None:
        return _joint((counts and counts.side) or family.text, counts, queries, keys, index, h, e)
    if kind == "cross" and counts is not None and counts.led and keys > counts.led:
        return parts_in(text=slice(counts.led, keys))
    if kind == "self" and queries == keys:
        if h is not None and e is not None and queries == h + e:  # the second sequence is another state of the image
            return parts_in(image=slice(0, h))
        if counts is not None and counts.image < counts.stream == queries:
            return parts_in(image=slice(counts.before, counts.before + counts.image))
    return PLAIN


def _joint(
    text: str, counts: Tokens | None, queries: int, keys: int, index: int, h: int | None, e: int | None
) -> Parts:
    """Divide a joint sequence: two streams bring both parts, one stream the packed sequence."""
    turned = counts is not None and e is not None and counts.stream == e != h  # Cosmos 3 names its text first
    if e is not None and not turned and h is not None and (counts is None or counts.stream != h):
        counts = Tokens(h)
    if counts is None or h is None:
        return PLAIN
    both = h + (e or 0)
    if counts.led and queries == both and keys == both + counts.led:  # keys of references, read before, lead
        return parts_in(_placed(text, replace(counts, led=0), queries)[0], *_placed(text, counts, keys)[1::-1])
    if queries == keys:
        # Mochi cuts each row's text to its valid length, which a graph does not know: no other length is unknown there.
        if guard_or_true(queries == both) or (e is not None and not turned and h < queries < both):
            return _placed(text, counts, queries) if counts.stream + counts.last <= queries else PLAIN
        return _PASSED  # a segment of the sequence that is attended by itself: the text's
    if keys > queries and queries in (counts.stream, h) and (keys in (both, e) or (e is None and h == queries)):
        counts = counts if queries == counts.stream else Tokens(queries, text=counts.text)
        placed = _placed(text, counts, keys)
        return parts_in(slice(counts.before, counts.before + counts.image), placed[1], placed[0])
    return PLAIN if index == 0 or e is None else _PASSED  # image prompts are attended by themselves


def _placed(text: str, counts: Tokens, n: int) -> Parts:
    """Place the parts of n tokens in which the text stands first or last."""
    rest = n - counts.last - counts.stream
    length = rest - counts.led if counts.text is None else min(counts.text, rest)
    start = rest if text == "first" else 0
    image = slice(start + counts.before, start + counts.before + counts.image)
    if counts.text == 0:
        return parts_in(image)
    if text == "first":
        return parts_in(image, slice(rest - length, rest))
    start = counts.stream + counts.led
    # All the rest ends where the sequence does: a number that a graph need not compute.
    return parts_in(image, slice(start, n if counts.text is None else start + length))


def image_in(state: Any, n: int) -> slice | None:
    """Return where the image lies in a block's own n tokens, or None if these cannot be an image's tokens.

    All of them are where nothing counts the tokens of the call, in UNets, and where blocks attend within a frame.
    """
    counts, family = None if state.tokens is None else state.tokens.counts, state.family
    if counts is None or family is None or family.unet:
        return slice(0, n)
    if n < counts.image:
        return slice(0, n) if state.grid is not None and n in (state.grid[0], math.prod(state.grid[1:])) else None
    if n < counts.stream:
        return slice(0, n)
    if n == counts.stream or family.text is None:
        return slice(counts.before, counts.before + counts.image) if n == counts.stream else slice(0, n)
    return _placed(counts.side or family.text, counts, n)[0] or slice(0, n)


def _count(value: Any) -> int | None:
    """Count the tokens of [B, N, C], of one row [N, C], or of a map [B, C, H, W]."""
    if not isinstance(value, torch.Tensor) or value.ndim not in (2, 3, 4):
        return None
    if value.ndim == 4:
        return int(value.shape[2] * value.shape[3])
    return int(value.shape[value.ndim - 2])


def grid_of(state: Any, site: str, n: int) -> Grid | None:
    """Return frames, rows and columns of the n image tokens that one call attends over, or None if unknown.

    A UNet's site has the grid of its stage alone: as many tokens as another stage has may be merged ones.

    Args:
        state: The denoiser call.
        site: Name of the site.
        n: Image tokens of the attention call.
    """
    grid, family = state.grid, state.family
    if grid is None or family is None:
        return None
    if family.unet:
        level = stage_grid(state.denoiser, site, grid, n)
        return None if level is None else (1, *level[1:])  # UNets fold frames into the batch
    frames, h, w = grid
    return next((g for g in ((frames, h, w), (1, h, w)) if g[0] * h * w == n), None)


def seen_site(link: Any) -> Site:
    """Return the site of a hook with what the calls so far have shown of its tokens."""
    site: Site = link.site
    if link.seen is None:
        return site
    n, image, text = link.seen
    grid, family = link.state.last_grid, link.state.family
    if grid is not None and family is not None and family.unet:
        grid = stage_grid(link.state.denoiser, site.name, grid, n)
    return replace(site, grid=grid or site.grid, image=image, text=text)


def placed_on_image(state: Any, site: str, image: slice, grid: Grid | None) -> tuple[slice, Grid]:
    """Return which of a call's image tokens lie on the image, and how.

    Args:
        state: The denoiser call.
        site: Name of the site.
        image: The image tokens among the queries.
        grid: Their grid, or None where no grid of the denoiser's holds as many.

    Raises:
        UnsupportedModelError: Nothing tells.
    """
    n, whole = image.stop - image.start, state.grid
    padded = state.family is not None and not state.family.unet
    if grid is None and padded and whole is not None and math.prod(whole) < n:
        grid, image = whole, slice(image.start, image.start + math.prod(whole))  # padding tokens stand behind
    if grid is None:
        raise UnsupportedModelError(
            f"{site}: nothing tells how its {n} image tokens lie on the image"
            + ("." if whole is None else f" of {' x '.join(map(str, whole[-2:]))} tokens. Token merging")
            + ("" if whole is None else " (tomesd and its like) does that: switch it off for this run.")
        )
    return image, grid
