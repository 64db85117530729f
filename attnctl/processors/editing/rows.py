"""Taking attention from a source's row into an edit's row of the same call, in transformers.

`RowFusion` is what FateZero and prompt-to-prompt share there: which sites are fused in a step, which text tokens
correspond, and the fused outputs of one attention call. Sites of joint attention are fused by `joint`, self- and
cross-attention as in UNets by `fusion`. Rows other than the edit's are computed by the host's own call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed, is_last
from attnctl.core.hosts.tokens import image_keys
from attnctl.core.sites import Grid, Site
from attnctl.errors import UnsupportedModelError
from attnctl.kernels.checks import wide_dtype
from attnctl.processors.editing.exchange import Exchange
from attnctl.processors.editing.fusion import CrossEdit, blend_latents, blend_mask, fold_values
from attnctl.processors.editing.joint import (
    Fusion,
    MapAttention,
    Mass,
    PairAttention,
    RowAttention,
    Tokens,
    fuse_image,
    mask_part,
)

__all__ = ["RowFusion", "SourceRow", "row_of", "word_column"]

SourceRow = dict[str, Tensor]
"""What is kept of a source's attention at one site: q, k and perhaps mask, or map; image queries alone."""


def row_of(call: AttnCall, row: int) -> SourceRow:
    """Return what a source's row attends with at one site: image queries, all keys, the mask."""
    image = call.image or slice(0, call.q.shape[2])
    tensors = {"q": call.q[row : row + 1, :, image], "k": call.k[row : row + 1]}
    mask = mask_part(_four(call.mask), rows=slice(row, row + 1), queries=image)
    return tensors if mask is None else tensors | {"mask": mask}


def _four(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None else mask[(None,) * (4 - mask.ndim)]


def word_column(call: AttnCall, row: int, tokens: Sequence[int]) -> Tensor:
    """Return the attention of a row's image tokens to some text tokens, mean over heads: [1, N], float32."""
    part = call.rows(slice(row, row + 1))
    keys = part.text_keys()
    weights = torch.zeros(keys.stop - keys.start, 1)
    weights[list(tokens)] = 1
    return part.text_map(weights)[..., 0].mean(1)


class RowFusion:
    """Puts a source's attention into an edit's row.

    Args:
        control: The edit.
        sites: The sites of the denoiser.
        family: Its family.
    """

    def __init__(self, control: Any, sites: Sequence[Site], family: Any) -> None:
        self.control, self.family = control, family
        fused, masks = control.groups(sites, family)
        self.fused = frozenset(s.name for s in fused)
        self.masking = frozenset(s.name for s in masks)
        self.kinds = {s.kind for s in fused}
        self.begin_run()

    def begin_run(self) -> None:
        """Forget the last run."""
        self.exchange: Exchange | None = None
        self.selves = self.crossing = False
        self.step = self.steps = 0
        self.inside: dict[Grid, Tensor] = {}
        self.columns: Tensor | None = None
        self.region: Tensor | None = None
        self._maps: dict[tuple[int, int], tuple[CrossEdit, Tensor, list[bool]]] = {}

    def wanted_at(self, step: int, steps: int) -> tuple[bool, bool]:
        """Tell whether a step of the edit takes the source's self part, and its cross part."""
        assert self.exchange is not None
        selves = step in self.control.self_window(steps)
        length = max(r.total for r in self.exchange.target)
        crossing = bool(self.exchange.follow(steps, length)[step].any())
        return selves and not self.kinds <= {"cross"}, crossing and not self.kinds <= {"self", "dual"}

    def begin_step(self, step: int, steps: int) -> bool:
        """Note the step; tell whether anything is taken in it."""
        if steps != self.steps:
            self._maps.clear()
        self.step, self.steps = step, steps
        self.selves, self.crossing = self.wanted_at(step, steps)
        self.inside = {}
        return self.selves or self.crossing

    def _tokens(
        self, of_source: int, of_target: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[CrossEdit, Tensor | None, bool]:
        """Return R, this step's w or None, and whether some token keeps a share of the edit's own map."""
        assert self.exchange is not None
        key = of_source, of_target
        if key not in self._maps:
            how = self.exchange.how(*key)
            follow = self.exchange.follow(self.steps, of_target)
            fresh = [bool(((how.new > 0) & (row > 0) | (row < 1)).any()) for row in follow]
            like = torch.zeros(0, device=device, dtype=dtype)
            self._maps[key] = how.to(like), follow.to(device, wide_dtype(dtype)), fresh
        how, follow, fresh = self._maps[key]
        return how, follow[self.step] if self.crossing else None, fresh[self.step] if self.crossing else True

    def mask_at(self, call: AttnCall) -> Tensor | None:
        """Return M for a call, bool [1, N], or None where the source rules everywhere."""
        if self.columns is None and self.region is None:
            return None
        _, grid = call.on_image()
        if grid not in self.inside:
            self.inside[grid] = self.mask(grid, self.columns).flatten()[None]
        return self.inside[grid]

    def mask(self, grid: Grid, columns: Tensor | None) -> Tensor:
        """Return where the edit's attention rules, bool [frames, rows, columns]: a given region, or where words are."""
        if self.region is not None:
            return F.interpolate(self.region[None, None].float(), size=grid, mode="area")[0, 0] >= 0.5
        assert columns is not None
        frames, h, w = grid
        return blend_mask(columns.reshape(frames, h * w), (h, w), (h, w), self.control.blend_threshold)

    # One attention call ----------------------------------------------------------------------------------------

    def fuse(self, call: AttnCall, proceed: Proceed, source_row: SourceRow, edit: int) -> Tensor:
        """Compute a call in which the edit's row takes its source's attention.

        Args:
            call: The call.
            proceed: What computes it.
            source_row: The source's attention at this site.
            edit: The edit's row.
        """
        kind = call.site.kind
        if kind == "joint":
            return self._joint(call, proceed, source_row, edit) if self.selves or self.crossing else proceed(call)
        if kind == "cross":
            return self._cross(call, proceed, source_row, edit) if self.crossing else proceed(call)
        return self._self(call, proceed, source_row, edit) if self.selves else proceed(call)

    def _source(self, call: AttnCall, source_row: SourceRow) -> RowAttention:
        if "map" in source_row:
            return MapAttention(source_row["map"])
        return PairAttention(call, source_row["q"], source_row["k"], source_row.get("mask"))

    def _self(self, call: AttnCall, proceed: Proceed, source_row: SourceRow, edit: int) -> Tensor:
        mask, at, image = self.mask_at(call), slice(edit, edit + 1), call.image or slice(0, call.q.shape[2])
        alone = image.stop - image.start == call.q.shape[2]
        if alone and mask is None and "q" in source_row and call.mask is None:
            return proceed(call.with_(q=_put(call.q, at, source_row["q"]), k=_put(call.k, at, source_row["k"])))
        out, source = proceed(call), self._source(call, source_row).whole(call.v[at])
        row = out[at].clone()  # queries that are no places of the image, such as padding, keep their attention
        row[:, :, image] = source if mask is None else torch.where(mask[:, None, :, None], row[:, :, image], source)
        return _put(out, at, row)

    def _cross(self, call: AttnCall, proceed: Proceed, source_row: SourceRow, edit: int) -> Tensor:
        at, length = slice(edit, edit + 1), call.k.shape[2]
        of_source = source_row["map" if "map" in source_row else "k"].shape[-1 if "map" in source_row else 2]
        how, follow, _ = self._tokens(of_source, length, call.q.device, call.q.dtype)
        assert follow is not None
        from_source, from_edit = fold_values(call.v[at], how, follow)
        out = proceed(call.with_(v=_put(call.v, at, from_edit)))
        return _put(out, at, out[at] + self._source(call, source_row).whole(from_source))

    def _joint(self, call: AttnCall, proceed: Proceed, source_row: SourceRow, edit: int) -> Tensor:
        if call.image is None or call.text is None:
            raise UnsupportedModelError(
                f"{call.site.name}: nothing tells image from text tokens in this call, whose attention is joint."
            )
        at, image, text = slice(edit, edit + 1), call.image, call.text
        n, of_target = image.stop - image.start, text.stop - text.start
        if call.k.shape[2] != n + of_target:
            raise UnsupportedModelError(
                f"{call.site.name} attends to {call.k.shape[2]} keys, of which {n} are the image's and {of_target} the "
                "text's: what the others are worth in an edit is not known."
            )
        keys = source_row["map"].shape[-1] if "map" in source_row else source_row["k"].shape[2]
        how, follow, fresh = self._tokens(keys - n, of_target, call.q.device, call.q.dtype)
        mass: Mass = "edit" if self.control.text_mass == "edit" else "inside"
        fusion = Fusion(self.selves, how, follow, self.mask_at(call), mass, fresh)
        mask = mask_part(_four(call.mask), rows=at)
        pair = PairAttention(call, call.q[at, :, image], call.k[at], mask_part(mask, queries=image))
        first = text.start < image_keys(call).start
        places = _places(first, n, keys - n), Tokens(image_keys(call), text)
        fused = fuse_image(self._source(call, source_row), pair, places, call.v[at], fusion)
        if not (is_last(proceed) and call.own_kernel):  # others may need whole calls
            out = proceed(call).clone()
            out[at, :, image] = fused.to(out.dtype)
            return out
        row = fused.to(call.v.dtype)
        if call.keys is None:  # text queries keep the edit's own attention: they carry the target's words
            text_row = call.with_(q=call.q[at, :, text], k=call.k[at], v=call.v[at], mask=mask_part(mask, queries=text))
            row = torch.cat([text_row.plain(), row] if first else [row, text_row.plain()], 2)
        rest = functools.partial(_rows, call)
        before = [proceed(rest(slice(0, edit)))] if edit else []
        behind = call.q.shape[0] > edit + 1
        return torch.cat([*before, row, *([proceed(rest(slice(edit + 1, call.q.shape[0])))] if behind else [])])

    # Latents ---------------------------------------------------------------------------------------------------

    def blended(self, latents: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """Return latents that are the source's outside a mask [frames, rows, columns] of tokens."""
        if latents.ndim == 3:
            return torch.where(mask.flatten()[None, :, None], latents, source.to(latents))
        if latents.ndim == 4:
            size = (latents.shape[-2], latents.shape[-1])
            whole = F.interpolate(mask[None].float(), size=size)[0].bool()
            return blend_latents(latents, source.to(latents), whole)
        in_front = self.family.frames_first
        frames = latents.shape[1 if in_front else 2]
        whole = F.interpolate(mask[None, None].float(), size=(frames, *latents.shape[-2:]))[0, 0].bool()
        return torch.where(whole[None, :, None] if in_front else whole[None, None], latents, source.to(latents))


def _places(text_first: bool, image: int, text: int) -> Tokens:
    if text_first:
        return Tokens(slice(text, text + image), slice(0, text))
    return Tokens(slice(0, image), slice(image, image + text))


def _rows(call: AttnCall, rows: slice) -> AttnCall:
    return call.with_(q=call.q[rows], k=call.k[rows], v=call.v[rows], mask=mask_part(_four(call.mask), rows=rows))


def _put(x: Tensor, rows: slice, part: Tensor) -> Tensor:
    """Return x with some rows replaced."""
    return torch.cat([x[: rows.start], part.to(x.dtype), x[rows.stop :]])
