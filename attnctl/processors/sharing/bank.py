"""The bank of StoryDiffusion: keys of identity pictures, kept by step and site, that the pictures of later runs see.

    first run     Consistent; k and v of the tokens S that it draws of each identity picture are kept
    later runs    softmax(q [k, S]^T / sqrt(d)) [v, S]

"StoryDiffusion", arXiv 2405.01434, section 3.1. What a step and site draw depends on the control's seed alone, so that
only the drawn tokens need to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.arguments import Rows
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.errors import ConfigError, UnsupportedModelError, unboxed, whole
from attnctl.processors.editing.source import check_room
from attnctl.processors.sharing.lent import Lent, lengthened, lent_by
from attnctl.processors.sharing.share_attention import ShareAttention

__all__ = ["Banked", "IdentityBank", "LiveBank"]

Where = Literal["cpu", "model"]


class IdentityBank:
    """Keys and values of identity pictures, for pictures of later runs.

    Args:
        ids: The pictures of the first run's batch that are kept, from 0; None for all of them.
        where: "cpu", or "model" for the model's own device.
        budget: Most bytes that may be kept; None for what is free.

    Attributes:
        complete: Whether a run has written it, which later runs read.
        expected: Bytes that it takes, known from the first step of the run that writes it.
        nbytes: Bytes kept now.
        pictures: Identity pictures kept.
        steps: Steps of the run that has written it.
    """

    def __init__(self, ids: Sequence[int] | None = None, where: Where = "cpu", budget: int | None = None) -> None:
        if where not in get_args(Where):
            raise ConfigError(f"IdentityBank: where={where!r} is unknown. Choose one of {', '.join(get_args(Where))}.")
        if ids is not None and (not isinstance(ids, (list, tuple)) or not ids):
            raise ConfigError(
                f"IdentityBank: ids={ids!r:.60}: give the numbers of one picture or more, such as (0, 1)."
            )
        self.ids = None if ids is None else tuple(whole(unboxed(i), "IdentityBank: ids", 0, of="pictures") for i in ids)
        if self.ids is not None and len(set(self.ids)) < len(self.ids):
            raise ConfigError(f"IdentityBank: ids={self.ids} names a picture twice.")
        self.where = where
        self.budget = None if budget is None else whole(unboxed(budget), "IdentityBank: budget", 0, of="bytes")
        self.clear()

    def clear(self) -> None:
        """Forget everything: the next run writes the bank."""
        self.complete = False
        self.expected = self.nbytes = self.pictures = 0
        self.steps: int | None = None
        self.sites: frozenset[str] = frozenset()
        self._kept: dict[tuple[int, str, str], Lent] = {}

    def put(self, step: int, site: str, half: str, lent: Lent) -> None:
        """Keep what identity pictures lend, [ids, frames, H, M, D]."""
        device = torch.device("cpu") if self.where == "cpu" else lent.k.device
        k, v, mask = (None if x is None else x.detach().to(device, copy=True) for x in lent)
        assert k is not None
        assert v is not None
        self._kept[step, site, half] = Lent(k, v, mask)
        self.nbytes += sum(x.numel() * x.element_size() for x in (k, v, mask) if x is not None)

    def get(self, step: int, site: str, half: str) -> Lent | None:
        """Return what was kept, or None where the first run did not share."""
        return self._kept.get((step, site, half))

    @property
    def halves(self) -> set[str]:
        """Return which rows were kept: "cond", and "uncond" where the run had negative ones."""
        return {half for _, _, half in self._kept}

    def describe(self) -> str:
        """Say what is kept, in a line."""
        state = "read" if self.complete else "not complete" if self.nbytes else "empty"
        return f"bank ({state}): {self.pictures} pictures, {self.nbytes / 2**20:.1f} of {self.expected / 2**20:.1f} MiB"


@dataclass(frozen=True, kw_only=True)
class Banked(ShareAttention, abstract=True):
    """Shared attention whose later runs may see what a first run has kept.

    Attributes:
        bank: Keeps the keys of a first run's pictures; the pictures of later runs attend to these instead of to each
            other's.
    """

    bank: IdentityBank | None = knob(None, kind="free", values="an IdentityBank", compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bank is None:
            return
        if not isinstance(self.bank, IdentityBank):
            raise ConfigError(
                f"{self._label}: bank={self.bank!r:.60} is no bank: give an attnctl.processors.IdentityBank()."
            )
        plain = {"sources": "others", "take": "append", "adain": (), "halves": "both"}
        if changed := [n for n, value in plain.items() if getattr(self, n) != value]:
            raise ConfigError(
                f"{self._label}: a bank keeps what each picture appends of all the others: leave out "
                f"{', '.join(changed)}, or the bank."
            )

    @property
    def several(self) -> bool:
        return self.bank is None or not self.bank.complete

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveBank | None:
        return None if self.bank is None else LiveBank(self, self.bank, sites)


class LiveBank(LiveControl):
    """A bank at work on one denoiser: the first run writes it, later runs read it."""

    def __init__(self, control: Banked, bank: IdentityBank, sites: tuple[Site, ...]) -> None:
        self.control, self.bank, self.sites = control, bank, sites
        self.share = control.wrapper(sites)
        self.begin_run()

    def begin_run(self) -> None:
        self.reading = self.bank.complete
        if not self.reading:
            self.bank.clear()
        self.sizes: dict[tuple[str, str], int] = {}
        """Bytes that each site and half of the rows keeps in a step in which it shares."""

    def before_call(self, passes: LiveDenoiser) -> dict[str, Any] | None:
        state, bank = passes.state, self.bank
        if state.steps is None:
            raise ConfigError(
                "Consistent: a bank is kept by step, and nothing tells the steps of this run. Control the pipeline, or "
                "call handle.set_step(i, n) before each call."
            )
        names = {site.name for site in self.sites}
        if not self.reading:
            bank.steps, bank.sites = state.steps, frozenset(names)
        elif bank.steps != state.steps or not names <= bank.sites:
            other = sorted(names - bank.sites)
            raise ConfigError(
                f"Consistent: the bank was written in {bank.steps} steps at {len(bank.sites)} attentions; this run has "
                f"{state.steps} steps"
                + (f" and {len(other)} attentions that the bank lacks, such as {other[0]}" if other else "")
                + ". Give the same steps, model and sites, or call bank.clear() and write it again."
            )
        return None

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        rows = call.state.rows
        if call.index > 0 or rows.role == "extra":
            return proceed(call)
        if self.reading:
            return self._read(call, proceed)
        if call.state.phase == "base":
            self._write(call)
        return self.share(call, proceed)

    def _write(self, call: AttnCall) -> None:
        """Keep what the identity pictures lend at a site in this step; refuse a run that keeps too much, at first."""
        control, bank, site = self.control, self.bank, call.site
        steps, step = call.state.steps or 1, call.state.step
        image, frames = control.image_keys(call), call.folded
        tokens = control.drawn_tokens(call, image)
        for half, cut in _halves(call.state.rows).items():
            pictures = cut.stop - cut.start
            ids = list(range(pictures)) if bank.ids is None else list(bank.ids)
            if max(ids) >= pictures:
                raise ConfigError(
                    f"IdentityBank: ids={bank.ids} were given for a batch of {pictures} pictures: give numbers from 0 "
                    f"to {pictures - 1}."
                )
            bank.pictures = len(ids)
            if (site.name, half) not in self.sizes:
                self._tell(call, image, half, len(ids) * frames, steps)
            if tokens is not None:
                lent = lent_by(call.rows(cut), tokens)
                mask = None if lent.mask is None else _of_pictures(lent.mask, ids, frames)
                k, v = (_of_pictures(x, ids, frames) for x in (lent.k, lent.v))
                bank.put(step, site.name, half, Lent(k, v, mask))
        last = max(i for i in range(steps) if control.in_window_at(i, steps))
        bank.complete = step >= last

    def _tell(self, call: AttnCall, image: slice, half: str, rows: int, steps: int) -> None:
        """Add a site's bytes over the whole run to those expected; raise MemoryBudgetError before they are kept."""
        control, bank, site = self.control, self.bank, call.site
        n = max(1, round(control.share * (image.stop - image.start)))
        per_token = call.k.shape[1] * (call.k.shape[3] + call.v.shape[3]) * call.k.element_size()
        acting = sum(control.acts_at(i, steps, site.depth) for i in range(steps))
        self.sizes[site.name, half] = rows * n * per_token
        bank.expected += acting * rows * n * per_token
        check_room(
            bank.expected - bank.nbytes,
            "cpu" if bank.where == "cpu" else "none",
            call.k.device,
            bank.budget,
            what=f"The bank of {bank.pictures} pictures",
            remedy="fewer identity pictures (ids), a lower share, fewer sites or steps",
        )

    def _read(self, call: AttnCall, proceed: Proceed) -> Tensor:
        state, frames = call.state, call.folded
        halves = {"cond": slice(0, state.rows.total)} if state.phase != "base" else _halves(state.rows)
        parts: dict[str, Lent] = {}
        for half, cut in halves.items():
            if half not in self.bank.halves:
                raise ConfigError(
                    "Consistent: the bank was written without negative rows, and this run has them: give the guidance "
                    "scale of the run that wrote it, or call bank.clear() and write it again."
                )
            entry = self.bank.get(state.step, call.site.name, half)
            if entry is None:
                return proceed(call)
            parts[half] = self._fitted(entry, call, cut.stop - cut.start, frames)
        ordered = [parts[half] for half in sorted(parts, key=lambda h: halves[h].start)]
        k, v = (torch.cat([getattr(part, name) for part in ordered]) for name in ("k", "v"))
        masks = [part.mask for part in ordered if part.mask is not None]
        lent = Lent(k, v, torch.cat(masks) if masks else None)
        return proceed(lengthened(call, lent, self.control.bias, self.control.factor))

    def _fitted(self, entry: Lent, call: AttnCall, pictures: int, frames: int) -> Lent:
        """Give what was kept to each picture's rows: [pictures * frames, H, ids * M, D]."""
        k = entry.k
        if k.shape[1] != frames or k.shape[2] != call.k.shape[1] or k.shape[4] != call.k.shape[3]:
            raise ConfigError(
                f"Consistent: the bank holds {k.shape[2]} heads of {k.shape[4]} channels and {k.shape[1]} frames at "
                f"{call.site.name}, where this run has {call.k.shape[1]} of {call.k.shape[3]} and {frames}: it was "
                "written with another model or another length. Call bank.clear() and write it again."
            )

        def spread(x: Tensor) -> Tensor:
            x = x.to(call.k.device, call.k.dtype if x.is_floating_point() else None, non_blocking=True)
            return x.permute(1, 2, 0, 3, 4).flatten(2, 3).repeat(pictures, 1, 1, 1)

        mask = entry.mask
        if mask is not None:  # [ids, frames, H, 1, M]
            mask = mask.to(call.q).permute(1, 2, 3, 0, 4).flatten(3).repeat(pictures, 1, 1, 1)
        return Lent(spread(k), spread(entry.v), mask)

    def describe(self) -> str | None:
        return f"  {self.bank.describe()}"


def _halves(rows: Rows) -> dict[str, slice]:
    """Return the rows of each half of a call."""
    if rows.role == "both" and rows.uncond is not None:
        return {"cond": rows.cond, "uncond": rows.uncond}
    if rows.role == "thirds":
        raise UnsupportedModelError(
            "A bank keeps what prompt and negative prompt have seen, and this pipeline has three rows for a picture, "
            "with text and picture, with the picture alone and with neither: share within one batch instead."
        )
    return {"uncond" if rows.role == "uncond" else "cond": slice(0, rows.total)}


def _of_pictures(x: Tensor, ids: list[int], frames: int) -> Tensor:
    """Take some pictures' rows [pictures * frames, ...], or [1, ...] of all, as [ids, frames, ...]."""
    if x.shape[0] == 1:
        return x[None].expand(len(ids), frames, *x.shape[1:])
    return x.unflatten(0, (-1, frames))[ids]
