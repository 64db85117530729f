"""One denoiser call (its step, its rows, its token grid), and one attention call inside it.

One plain `CallState` per denoiser is written by the handle's hooks and read by controls. It is an ordinary shared
object on purpose: gradient checkpointing recomputes attention in autograd's own threads, where context variables and
thread locals are empty.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from attnctl.core.hosts.families import Family
from attnctl.core.hosts.listing import image_level_grid
from attnctl.core.hosts.prompt import PromptCall
from attnctl.core.sites import Grid

__all__ = ["AttnCall", "CallState", "Proceed", "Rows", "Wrapper", "is_last", "run_wrappers"]


@dataclass(frozen=True)
class Rows:
    """Which rows of a denoiser call carry the prompt.

    Attributes:
        total: Rows of the call.
        cond: Rows with the prompt; empty where the whole call is the negative one.
        uncond: Rows with the negative prompt in the same call, or None.
        role: "all" (every row carries the prompt), "both" (half of the rows are negative), "uncond" (the call is the
            negative half of a sequential pair) or "extra" (a call that guidance must leave alone).
    """

    total: int
    cond: slice
    uncond: slice | None = None
    role: str = "all"

    @property
    def prompts(self) -> int:
        """Count the rows that carry the prompt."""
        return len(range(self.total)[self.cond])

    @classmethod
    def all(cls, total: int) -> Rows:
        """Treat every row as a prompt row."""
        return cls(total, slice(0, total))

    @classmethod
    def halves(cls, total: int, cond_first: bool = False) -> Rows:
        """Treat one half as negative rows and the other, by default the second, as prompt rows."""
        first, second = slice(0, total // 2), slice(total // 2, total)
        return cls(total, first, second, "both") if cond_first else cls(total, second, first, "both")


@dataclass
class CallState:
    """The current denoiser call, as controls see it.

    Attributes:
        step: Index of the scheduler step, from 0; counted by calls of `scheduler.step`, not read off timesteps.
        steps: Steps of the run, or None where nothing tells.
        timestep: The scheduler's timestep, 0 to 1000 (1000 = noise), or None.
        rows: Rows of the call.
        phase: "base" or the name of the guidance branch that is running.
        call: Number of the denoiser call; the same while autograd computes a part of it again.
        prompts: The texts of the pipeline call, where a control asked to hear them and the pipeline was given text.
        scratch: What controls keep from one site to the next; emptied when the call and its perturbed passes are over.
    """

    step: int = 0
    steps: int | None = None
    timestep: float | None = None
    rows: Rows = field(default_factory=lambda: Rows.all(1))
    phase: str = "base"
    call: int = 0
    prompts: PromptCall | None = None
    denoiser: torch.nn.Module | None = None
    family: Family | None = None
    bound: Mapping[str, Any] = field(default_factory=dict)
    scratch: dict[Any, Any] = field(default_factory=dict)
    last_grid: Grid | None = None
    _grid: Grid | None = None
    _grid_known: bool = False
    _image_tokens: int | None = None
    _image_tokens_known: bool = False

    @property
    def progress(self) -> float:
        """Return the fraction of the run that is done, 0 <= i/n < 1."""
        return self.step / self.steps if self.steps else 0.0

    def begin_call(self, denoiser: torch.nn.Module, family: Family, bound: Mapping[str, Any]) -> None:
        """Forget the last call and describe a new one."""
        self.denoiser, self.family, self.bound = denoiser, family, bound
        self._grid, self._grid_known = None, False
        self._image_tokens, self._image_tokens_known = None, False
        self.phase = "base"
        self.call += 1
        _ = self.image_tokens  # here and not at a site, where a compiled block would have to trace it

    def end_call(self) -> None:
        """Drop references to the call's tensors."""
        if self.last_grid is None:  # reading it may wait for the device: once is enough for a report
            self.last_grid = self.grid
        self.bound = {}

    @property
    def grid(self) -> Grid | None:
        """Return frames, rows and columns of the token grid, or None for a family without a rule."""
        if not self._grid_known:
            self._grid_known = True
            if self.family is not None and self.denoiser is not None:
                self._grid = self.family.grid(self.denoiser, self.bound)
        return self._grid

    @property
    def image_tokens(self) -> int | None:
        """Return the number of image tokens in a packed sequence, or None where nothing tells."""
        if self.family is None or self.denoiser is None:
            return None
        if not self._image_tokens_known and self.bound:
            self._image_tokens_known = True
            if self.family.image_tokens is not None:
                self._image_tokens = self.family.image_tokens(self.denoiser, self.bound)
            elif (grid := self.grid) is not None:
                self._image_tokens = grid[0] * grid[1] * grid[2]
        return self._image_tokens


Proceed: TypeAlias = Callable[["AttnCall"], torch.Tensor]
Wrapper: TypeAlias = Callable[["AttnCall", Proceed], torch.Tensor]


class AttnCall:
    """One attention as the kernel sees it: after projections, q/k norms and rotary embedding.

    Attributes:
        q: Queries [B, H, Nq, D].
        k: Keys [B, Hk, Nk, D]; Hk divides H.
        v: Values [B, Hk, Nk, D].
        mask: None, bool (True = attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: Logit scale, or None for 1 / sqrt(D).
        site: Where the call happens.
        state: The denoiser call that it belongs to.
        image: Image tokens of a joint sequence, or None where there is no text in it or the family has no rule.
        text: Text tokens of a joint sequence, or None.
        index: 0 for the first attention of the processor; IP-Adapters and Wan i2v compute a second one.
        kernel: What computes the plain attention.
        hidden: What the processor was called with, before its projections; None where it is no tensor.
        after: Functions that a wrapper appends, to be applied in order to what the processor returns (the output
            after its last projection, or a tuple with the text's).
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        link: Any,
        index: int,
        tokens: tuple[slice | None, slice | None],
        kernel: Callable[..., torch.Tensor],
        hidden: torch.Tensor | None = None,
        after: list[Callable[[Any], Any]] | None = None,
    ) -> None:
        self.q, self.k, self.v, self.mask, self.scale = q, k, v, mask, scale
        self.site, self.state, self.index = link.site, link.state, index
        self.image, self.text = tokens
        self.kernel = kernel
        self.hidden = hidden
        self.after = [] if after is None else after
        self._link = link

    @property
    def block_call(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of the transformer block around the site, if a control asked to see them."""
        return self._link.block_call

    @property
    def block_input(self) -> torch.Tensor | None:
        """Return the hidden states that the transformer block around the site was called with, likewise."""
        if self._link.block_call is None:
            return None
        args, kwargs = self._link.block_call
        return args[0] if args else kwargs.get("hidden_states")

    @property
    def grid(self) -> Grid | None:
        """Return frames, rows and columns of the image tokens that this call attends over, or None if unknown."""
        n = self.q.shape[-2] if self.image is None else self.image.stop - self.image.start
        grid, family = self.state.grid, self.state.family
        if grid is None or family is None:
            return None
        if family.unet:
            level = image_level_grid(grid, n)
            return None if level is None else (1, *level[1:])  # UNets fold frames into the batch
        frames, h, w = grid
        return next((g for g in ((frames, h, w), (1, h, w)) if g[0] * h * w == n), None)

    @property
    def own_kernel(self) -> bool:
        """Tell whether the site's kernel computes this call, and none that a control has put there."""
        return self.kernel is self._link.kernel

    def with_(self, **changes: Any) -> AttnCall:
        """Return a copy with some fields replaced."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    def plain(self) -> torch.Tensor:
        """Compute the unchanged attention of this call, [B, H, Nq, D]."""
        return self.kernel(self.q, self.k, self.v, mask=self.mask, scale=self.scale)


def run_wrappers(wrappers: tuple[Wrapper, ...], call: AttnCall) -> torch.Tensor:
    """Send a call through wrappers, the outermost first, to its kernel."""
    if not wrappers:
        return call.plain()
    return wrappers[0](call, functools.partial(run_wrappers, wrappers[1:]))


def is_last(proceed: Proceed) -> bool:
    """Tell whether a wrapper has nothing but the kernel behind it, so that it may compute in another way."""
    return isinstance(proceed, functools.partial) and proceed.func is run_wrappers and not proceed.args[0]
