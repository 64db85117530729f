"""What sparse controls ask of one attention call: whether its mask leaves the image alone, and which text are words."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from attnctl.core.call import AttnCall
from attnctl.core.hosts.readings import version_of

__all__ = ["OnceWarned", "TextMasks", "words_of"]

_MASKS = 1024  # whose verdicts are remembered: one or two for each site of a run


class OnceWarned:
    """Warnings of one attached control, each of which is given once."""

    def __init__(self, label: str) -> None:
        self.label, self._given = label, set[str]()

    def dense(self, why: str) -> None:
        """Say that attention stays dense, and why."""
        if why not in self._given:
            self._given.add(why)
            warnings.warn(f"attnctl: {self.label} leaves attention dense: {why}.", stacklevel=3)


class TextMasks:
    """Which masks leave out nothing but text keys.

    Reading that off a mask waits for the device. Hosts make their masks anew in every call from the masks that the
    pipeline passes to the denoiser, which are the same tensors in every step: what was read holds as long as they do.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], slice, bool] | None = None
        self._by_site: dict[Hashable, tuple[list[weakref.ref[Tensor]], bool]] = {}

    def text_only(self, call: AttnCall, image: slice) -> bool:
        """Return whether a call's mask, if it has one, leaves every image token to every query."""
        mask = call.mask
        if mask is None:
            return True
        if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != 1:
            return False
        given = [x for name, x in call.state.bound.items() if "mask" in name and isinstance(x, Tensor)]
        key = call.site.name, mask.shape, image.start, image.stop, tuple((id(x), version_of(x)) for x in given)
        refs, verdict = self._by_site.get(key, ([], False))
        if not refs or any(ref() is not x for ref, x in zip(refs, given, strict=True)):
            verdict = self._read(mask, image)
            if len(self._by_site) > _MASKS:
                self._by_site.clear()
            self._by_site[key] = [weakref.ref(x) for x in given], verdict
        return verdict

    def _read(self, mask: Tensor, image: slice) -> bool:
        """Read the verdict off a mask, which the sites of one denoiser call share."""
        if self._last is None or self._last[0]() is not mask or self._last[1] != image:
            self._last = weakref.ref(mask), image, bool(mask[..., image].all())
        return self._last[2]


def words_of(call: AttnCall, image: slice) -> Tensor | None:
    """Return which text keys of a call are words, bool [B or 1, T]; None for all.

    Each prompt has words of its own; the padding beside them is left out.
    """
    if call.mask is None:
        return None
    shown = call.mask[:, 0, 0].expand(-1, call.q.shape[2])
    return torch.cat([shown[:, : image.start], shown[:, image.stop :]], 1)
