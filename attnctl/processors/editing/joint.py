"""Fusing a source's attention into an edit's inside one joint softmax, without its map.

Image queries of a joint transformer attend to image keys I and text keys X in one softmax. For any of them

    O = (1 - g) a_I v_I + g a_X v_X           a_I, a_X: the map's parts, rows scaled to 1;  g: its mass on the text

so that beside the self part and the cross part of FateZero (arXiv 2303.09535) and prompt-to-prompt (arXiv 2208.01626)
there is a third thing to choose, the text mass. With s of the source and e of the edit, always with the edit's values:

    a_I = M a_I^e + (1 - M) a_I^s      a_X = w R + (1 - w) a_X^e      g = M g^e + (1 - M) g^s

R takes columns of the source's cross part, as in `fusion.cross_edit`. By linearity every term is an attention over one
part of the keys; no map of queries by keys is made. With M = 0 the source's terms are one attention over all its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from attnctl.core.call import AttnCall
from attnctl.kernels import attention, columns
from attnctl.kernels.dispatch import attention_and_sums
from attnctl.kernels.maps import key_columns, softmax_map
from attnctl.processors.editing.fusion import CrossEdit, fold_values

__all__ = ["Fusion", "MapAttention", "Mass", "PairAttention", "RowAttention", "Tokens", "fuse_image", "mask_part"]

Mass = Literal["source", "edit", "inside"]


@dataclass(frozen=True)
class Tokens:
    """Where image and text lie among the tokens of a call; no text in self-attention, no image in cross-attention."""

    image: slice | None
    text: slice | None


class RowAttention(Protocol):
    """The attention of one row's image queries, in parts."""

    def whole(self, v: Tensor) -> Tensor:
        """Attend to all keys with values v [1, H, Nk, D]."""

    def part(self, keys: slice, v: Tensor) -> Tensor:
        """Attend to some keys alone, with values v [1, H, n, D]: the map's part, rows scaled to a sum of 1."""

    def mass(self, keys: slice) -> Tensor:
        """Return the map's mass on some keys, [1, H, N, 1]."""

    def whole_and_mass(self, v: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        """Attend to all keys, and return the map's mass on some of them, [1, H, N, 1]."""


@dataclass(frozen=True)
class PairAttention:
    """The attention of queries and keys, by the kernel of a call.

    Attributes:
        call: The call whose kernel computes; its own q, k and v are not read.
        q: Image queries [1, H, N, D].
        k: All keys [1, Hk, Nk, D].
        mask: None, or four-dimensional, broadcastable to [1, H, N, Nk].
    """

    call: AttnCall
    q: Tensor
    k: Tensor
    mask: Tensor | None = None

    def whole(self, v: Tensor) -> Tensor:
        return self.call.with_(q=self.q, k=self.k, v=v, mask=self.mask).plain()

    def part(self, keys: slice, v: Tensor) -> Tensor:
        mask = mask_part(self.mask, keys=keys)
        return self.call.with_(q=self.q, k=self.k[:, :, keys], v=v, mask=mask).plain()

    def mass(self, keys: slice) -> Tensor:
        ones = torch.zeros(self.k.shape[2], 1, device=self.k.device)
        ones[keys] = 1
        return columns(self.q, self.k, ones, mask=self.mask, scale=self.call.scale)

    def whole_and_mass(self, v: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        if self.call.kernel is not attention:
            return self.whole(v), self.mass(keys)
        out, sums = attention_and_sums(self.q, self.k, v, mask=self.mask, scale=self.call.scale)
        if sums is None:
            return out, self.mass(keys)
        # The kernel has summed over all keys already: the mass on some needs no second pass over the others.
        ones = torch.ones(keys.stop - keys.start, 1, device=self.k.device)
        mask = mask_part(self.mask, keys=keys)
        return out, key_columns(self.q, self.k[:, :, keys], ones, sums, mask=mask, scale=self.call.scale)


@dataclass(frozen=True)
class MapAttention:
    """The attention of a map that is at hand, [1, H, N, Nk]."""

    map: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None = None) -> MapAttention:
        """Write the map of queries and keys out."""
        return cls(softmax_map(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), scale, mask))

    def _times(self, a: Tensor, v: Tensor) -> Tensor:
        return a.to(v.dtype) @ v.repeat_interleave(a.shape[1] // v.shape[1], 1)

    def whole(self, v: Tensor) -> Tensor:
        return self._times(self.map, v)

    def part(self, keys: slice, v: Tensor) -> Tensor:
        a = self.map[..., keys]
        return self._times(a / a.sum(-1, keepdim=True).clamp_min(1e-30), v)

    def mass(self, keys: slice) -> Tensor:
        return self.map[..., keys].sum(-1, keepdim=True)

    def whole_and_mass(self, v: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        return self.whole(v), self.mass(keys)


@dataclass(frozen=True)
class Fusion:
    """What one step of an edit takes from its source, at one site.

    Attributes:
        selves: Whether the self part is fused.
        how: How the target's text columns are made of the source's [Ts, Te].
        follow: w, the share of the source in each text token of the target [Te]; None where no cross part is fused.
        inside: M, where the edit keeps its own attention: bool [1, N], or None for nowhere.
        mass: Whose text mass is taken: "source", "edit", or "inside" for the edit's inside M and the source's outside.
        fresh: Whether some text token keeps a share of the edit's own map.
    """

    selves: bool
    how: CrossEdit
    follow: Tensor | None
    inside: Tensor | None = None
    mass: Mass = "inside"
    fresh: bool = True

    def values(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Fold the cross part into the edit's text values: those for the source's part [.., Ts, ..], for the edit's."""
        if self.follow is None:
            length = self.how.take.shape[0]
            return v.new_zeros(*v.shape[:2], length, v.shape[3]), v
        return fold_values(v, self.how, self.follow)


def fuse_image(
    source: RowAttention, edit: RowAttention, at: tuple[Tokens, Tokens], v: Tensor, fusion: Fusion
) -> Tensor:
    """Compute the fused output of an edit's image queries, [1, H, N, D].

    Args:
        source: The source's attention.
        edit: The edit's attention.
        at: Where image and text lie among the source's keys, and among the edit's.
        v: The edit's values [1, Hk, Nk, D].
        fusion: What is taken.
    """
    s, e = at
    assert s.image is not None and s.text is not None and e.image is not None and e.text is not None  # noqa: PT018
    v_image = v[:, :, e.image]
    of_source, of_edit = fusion.values(v[:, :, e.text])
    inside = None if fusion.inside is None else fusion.inside[:, None, :, None]
    if fusion.selves and inside is None and fusion.mass != "edit":
        length = v_image.shape[2] + of_source.shape[2]
        whole = v.new_zeros(v.shape[0], v.shape[1], length, v.shape[3])
        whole[:, :, s.image], whole[:, :, s.text] = v_image, of_source
        if not fusion.fresh:
            return source.whole(whole)
        out, mass = source.whole_and_mass(whole, s.text)
        return out + mass.to(out.dtype) * edit.part(e.text, of_edit)
    g = edit.mass(e.text) if fusion.mass == "edit" else source.mass(s.text)
    if inside is not None and fusion.mass == "inside":
        g = torch.where(inside, edit.mass(e.text), g)
    image = edit.part(e.image, v_image)
    if fusion.selves:
        taken = source.part(s.image, v_image)
        image = taken if inside is None else torch.where(inside, image, taken)
    text = edit.part(e.text, of_edit)
    if fusion.follow is not None:
        text = text + source.part(s.text, of_source)
    g = g.to(image.dtype)
    return (1 - g) * image + g * text


def mask_part(
    mask: Tensor | None, *, rows: slice | None = None, queries: slice | None = None, keys: slice | None = None
) -> Tensor | None:
    """Cut a mask of four axes to some rows, queries and keys; axes of one stay."""
    if mask is None:
        return None
    for axis, part in ((0, rows), (2, queries), (3, keys)):
        if part is not None and mask.shape[axis] > 1:
            mask = mask[(slice(None),) * axis + (part,)]
    return mask
