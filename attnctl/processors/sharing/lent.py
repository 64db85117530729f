"""Keys and values that one attention call lends to another, of a later pass or a later run."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attnctl.core.call import AttnCall
from attnctl.kernels.checks import as_bias, check_mask
from attnctl.kernels.sharing import joined_keys

__all__ = ["Lent", "lengthened", "lent_by"]


class Lent(NamedTuple):
    """What rows of a call lend.

    Attributes:
        k: Keys [b, H, M, D].
        v: Values [b, H, M, D].
        mask: What is added to their logits [b or 1, H or 1, 1, M], or None.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None

    def rows(self, cut: slice) -> Lent:
        """Return what some of the rows lend."""
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[cut]
        return Lent(self.k[cut], self.v[cut], mask)

    def tokens(self, at: Tensor) -> Lent:
        """Return some of the keys [m]."""
        return Lent(self.k[:, :, at], self.v[:, :, at], None if self.mask is None else self.mask[..., at])


def lent_by(call: AttnCall, tokens: Tensor) -> Lent:
    """Read keys, values and their mask as an image token sees them.

    Args:
        call: The call.
        tokens: The keys that are lent [M].
    """
    mask, asking = None, 0 if call.image is None else call.image.start
    if call.mask is not None:
        mask = check_mask(call.mask, (*call.q.shape[:3], call.k.shape[2]))
        mask = mask.expand(*mask.shape[:3], call.k.shape[2])
        mask = mask if mask.shape[2] == 1 else mask[:, :, asking : asking + 1]
        mask = as_bias(mask[..., tokens], call.q.dtype)
    return Lent(call.k[:, :, tokens], call.v[:, :, tokens], mask)


def lengthened(call: AttnCall, lent: Lent, bias: float = 0.0, factor: float = 1.0) -> AttnCall:
    """Put lent keys and values behind a call's own.

    Args:
        call: The call, [B, H, Nq, Nk].
        lent: As many rows.
        bias: What is added to the logits of the lent keys.
        factor: What they are multiplied by.
    """
    call_mask = call.mask
    if call_mask is not None:
        call_mask = check_mask(call_mask, (*call.q.shape[:3], call.k.shape[2]))
        call_mask = as_bias(call_mask.expand(*call_mask.shape[:3], call.k.shape[2]), call.q.dtype)
    added = lent.mask
    if bias != 0:
        added = bias + (call.q.new_zeros(1, 1, 1, lent.k.shape[2]) if added is None else added)
    k = lent.k if factor == 1 else lent.k * factor
    k, v, mask = joined_keys([(call.k, call.v, call_mask), (k, lent.v, added)], call.q)
    return call.with_(k=k, v=v, mask=mask, wants_sums=False)
