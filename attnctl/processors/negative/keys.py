"""The negative prompt's keys and values at a site, and the attention of the positive's queries to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnctl.core.call import AttnCall
from attnctl.errors import UnsupportedModelError
from attnctl.kernels.text_swap import joined, joined_mask

__all__ = ["NegativeKeys", "attend_beside", "image_queries_only", "same_keys", "text_first", "text_keys"]


def text_first(call: AttnCall) -> bool:
    """Tell whether the text stands before the image in a joint sequence.

    Raises:
        UnsupportedModelError: The family has no rule.
    """
    family = call.state.family
    if family is None or family.text is None or call.image is None:
        raise UnsupportedModelError(
            f"{call.site.name}: nothing tells image from text tokens in this call, whose attention is joint, so that a "
            "negative prompt cannot take the text's place. Choose other sites (sites=...)."
        )
    return family.text == "first"


def image_queries_only(call: AttnCall) -> bool:
    """Tell whether image tokens alone ask, and image and text answer: the text is never updated."""
    return call.site.kind == "joint" and call.k.shape[2] > call.q.shape[2]


def text_keys(call: AttnCall) -> tuple[slice, slice]:
    """Return the places of the image and of the text among the keys of a joint attention."""
    n, keys = call.q.shape[2], call.k.shape[2]
    if not image_queries_only(call):
        first = text_first(call)
        assert call.image is not None
        image = call.image
        return image, slice(0, image.start) if first else slice(image.stop, keys)
    return (slice(keys - n, keys), slice(0, keys - n)) if text_first(call) else (slice(0, n), slice(n, keys))


@dataclass
class NegativeKeys:
    """Keys and values of the negative prompt at one site.

    Attributes:
        k: Keys [b, H, T, D].
        v: Values [b, H, T, D].
        mask: The mask of the call that they were read off, or None.
        text: Places of the text among that call's keys.
        other: An image token of that call among its queries and its keys.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    text: slice
    other: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, call: AttnCall) -> NegativeKeys:
        """Read the text's keys off a call that was made with the negative prompt."""
        if call.site.kind != "joint":
            return cls(call.k, call.v, call.mask, slice(0, call.k.shape[2]))
        image, text = text_keys(call)
        query = 0 if image_queries_only(call) else image.start
        return cls(call.k[:, :, text], call.v[:, :, text], call.mask, text, (query, image.start))

    def attended(self, part: AttnCall) -> AttnCall:
        """Return the call of the prompt's image queries to the negative prompt in place of the prompt.

        Args:
            part: The prompt's rows of a call.
        """
        k, v = (_rows(x, part.q.shape[0]) for x in (self.k, self.v))
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else _rows(self.mask, part.q.shape[0])
        if part.site.kind != "joint":
            return part.with_(k=k, v=v, mask=mask)
        first, (image, _) = text_first(part), text_keys(part)
        queries = slice(0, part.q.shape[2]) if image_queries_only(part) else image
        mask = joined_mask(
            part.mask,
            mask,
            image=(queries, image),
            text=(slice(0, 0), self.text),
            other=self.other,
            tokens=image.stop - image.start,
            text_first=first,
        )
        k, v = (joined(x, y[:, :, image], first) for x, y in ((k, part.k), (v, part.v)))
        return part.with_(q=part.q[:, :, queries], k=k, v=v, mask=mask)


def _rows(x: Tensor, rows: int) -> Tensor:
    """Repeat rows that several frames share."""
    if x.shape[0] == rows:
        return x
    if rows % x.shape[0]:
        raise UnsupportedModelError(f"{x.shape[0]} rows of a negative prompt do not fit the prompt's {rows}.")
    return x.repeat_interleave(rows // x.shape[0], 0)


def attend_beside(part: AttnCall, negative: AttnCall) -> tuple[Tensor, Tensor]:
    """Attend with the image's and the negative text's queries to the image and the negative text, in one call.

    Args:
        part: The prompt's rows of a joint attention, whose image counts.
        negative: The same attention with the negative prompt, whose text counts.

    Returns:
        What the image's queries see [b, H, N, D], and what the text's queries see [b, H, T, D].
    """
    first, (image, _), (small, text) = text_first(part), text_keys(part), text_keys(negative)
    tokens, length = image.stop - image.start, text.stop - text.start
    q, k, v = (
        joined(x[:, :, text], y[:, :, image], first)
        for x, y in ((negative.q, part.q), (negative.k, part.k), (negative.v, part.v))
    )
    mask = joined_mask(
        part.mask,
        negative.mask,
        image=(image, image),
        text=(text, text),
        other=(small.start, small.start),
        tokens=tokens,
        text_first=first,
    )
    out = part.with_(q=q, k=k, v=v, mask=mask).plain()
    return (out[:, :, length:], out[:, :, :length]) if first else (out[:, :, :tokens], out[:, :, tokens:])


def same_keys(keys: NegativeKeys, part: AttnCall) -> bool:
    """Tell whether a negative prompt's keys are the prompt's own, as those of an image prompt are."""
    if keys.k.shape[1:] != part.k.shape[1:] or part.k.is_meta:
        return False
    return torch.equal(_rows(keys.k, part.k.shape[0]), part.k)
