"""The negative prompt's keys and values at a site, and the attention of the prompt's queries to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import AttnCall
from attnctl.core.hosts.tokens import has_outer_keys
from attnctl.errors import UnsupportedModelError
from attnctl.kernels.text_swap import swapped, swapped_mask

__all__ = ["NegativeKeys", "TimeProbe", "attend_beside", "has_text_stream", "image_queries", "same_keys", "text_keys"]


def text_keys(call: AttnCall) -> slice:
    """Return the places of the text among the keys of a cross- or joint attention.

    Raises:
        UnsupportedModelError: Nothing tells.
    """
    if call.site.kind != "joint":
        return slice(0, call.k.shape[2]) if call.text is None else call.text
    if call.image is None or call.text is None:
        raise UnsupportedModelError(
            f"{call.site.name}: nothing tells image from text tokens in this call, whose attention is joint, so that "
            "no other text can take the prompt's place. Choose other sites (sites=...)."
        )
    if has_outer_keys(call):
        raise UnsupportedModelError(
            f"{call.site.name} attends to keys of reference images too: what another text is worth beside them is not "
            "known. Take the references out, or this control."
        )
    return call.text


def image_queries(call: AttnCall) -> slice:
    """Return the places of the image among the queries."""
    return slice(0, call.q.shape[2]) if call.image is None else call.image


def has_text_stream(call: AttnCall) -> bool:
    """Tell whether the text asks, too, and is updated by the image from block to block."""
    return call.site.kind == "joint" and call.keys is None


@dataclass
class NegativeKeys:
    """Keys and values of the negative prompt at one site.

    Attributes:
        k: Keys [b, H, T, D].
        v: Values [b, H, T, D].
        mask: The mask of the call that they were read off, or None.
        text: Places of the text among that call's keys.
        seen: A token of that call that is no text, among its queries and its keys.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    text: slice
    seen: tuple[int, int]

    @classmethod
    def of(cls, call: AttnCall) -> NegativeKeys:
        """Read the text's keys off a call that was made with the negative prompt."""
        text = text_keys(call)
        key = text.stop if text.start == 0 else 0
        return cls(call.k[:, :, text], call.v[:, :, text], call.mask, text, (image_queries(call).start, key))

    def attended(self, part: AttnCall) -> AttnCall:
        """Return the call of the prompt's image queries to the negative prompt in place of the prompt.

        Args:
            part: The prompt's rows of a call.
        """
        rows, at, queries = part.q.shape[0], text_keys(part), image_queries(part)
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else _repeated(self.mask, rows)
        k, v = (swapped(y, _repeated(x, rows), at) for x, y in ((self.k, part.k), (self.v, part.v)))
        mask = swapped_mask(
            part.mask,
            mask,
            at=at,
            text=self.text,
            seen=self.seen,
            keys=part.k.shape[2],
            asks=queries.start,
            queries=queries,
        )
        return part.with_(q=part.q[:, :, queries], k=k, v=v, mask=mask)


class TimeProbe:
    """Sees by the prompt's own keys whether those of a text move with the time.

    Attributes:
        timeless: Whether they stay the same from step to step; None until a second call of the denoiser has shown it.
    """

    def __init__(self) -> None:
        self.timeless: bool | None = None
        self.begin_run()

    def begin_run(self) -> None:
        """Forget the keys of the last run; what they have shown stays known."""
        self._seen: dict[Any, tuple[int, Tensor]] = {}
        self._proven: set[Any] = set()

    def moved(self, key: Any, part: AttnCall) -> bool:
        """Tell whether keys that were recorded in an earlier call are out of date, as of now.

        Args:
            key: The attention call's name.
            part: The prompt's rows of it.
        """
        if self.timeless is not None or part.k.is_meta or torch.compiler.is_compiling():
            return False
        call, keys = self._seen.setdefault(key, (part.state.call, part.k[:, :, :4].detach().clone()))
        if call == part.state.call:
            return False
        if not torch.equal(keys, part.k[:, :, :4]):
            self.timeless, self._seen = False, {}
            return True
        self._proven.add(key)
        if self._proven >= set(self._seen):
            self.timeless, self._seen = True, {}
        return False


def attend_beside(part: AttnCall, negative: AttnCall) -> tuple[Tensor, Tensor]:
    """Attend from and to a joint sequence with the negative text in place of the text, in one call.

    Args:
        part: The prompt's rows of a joint attention, of which all but the text counts.
        negative: The same attention with the negative prompt, of which the text counts.

    Returns:
        What the image's queries see [b, H, N, D], and what the text's queries see [b, H, T, D].
    """
    at, text, image = text_keys(part), text_keys(negative), image_queries(part)
    length = text.stop - text.start
    q, k, v = (
        swapped(y, x[:, :, text], at) for x, y in ((negative.q, part.q), (negative.k, part.k), (negative.v, part.v))
    )
    other = image_queries(negative).start
    mask = swapped_mask(
        part.mask, negative.mask, at=at, text=text, seen=(other, other), keys=part.k.shape[2], asks=image.start
    )
    out = part.with_(q=q, k=k, v=v, mask=mask).plain()
    moved = 0 if image.start < at.start else length - (at.stop - at.start)
    return out[:, :, image.start + moved : image.stop + moved], out[:, :, at.start : at.start + length]


def same_keys(keys: NegativeKeys, part: AttnCall) -> bool:
    """Tell whether a negative prompt's keys are the prompt's own, as those of an image prompt are."""
    prompt_k = part.k[:, :, text_keys(part)]
    if keys.k.shape[1:] != prompt_k.shape[1:] or prompt_k.is_meta:
        return False
    return torch.equal(_repeated(keys.k, prompt_k.shape[0]), prompt_k)


def _repeated(x: Tensor, rows: int) -> Tensor:
    """Repeat rows that several frames share."""
    if x.shape[0] == rows:
        return x
    if rows % x.shape[0]:
        raise UnsupportedModelError(f"{x.shape[0]} rows of another text do not fit the prompt's {rows}.")
    return x.repeat_interleave(rows // x.shape[0], 0)
