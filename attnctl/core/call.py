"""One denoiser call (its step, its rows, its token grid), one attention call inside it, and what acts at its site.

One plain `CallState` per denoiser is written by the handle's hooks and read by controls. It is an ordinary shared
object on purpose: gradient checkpointing recomputes attention in autograd's own threads, where context variables and
thread locals are empty.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from attnctl.core.hosts.arguments import Rows
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.linear import linear_attention
from attnctl.core.hosts.prompt import PromptCall
from attnctl.core.hosts.tokens import CallTokens, Parts, grid_of, placed_on_image
from attnctl.core.sites import Grid, Site
from attnctl.errors import UnsupportedModelError
from attnctl.kernels import attention, sdpa
from attnctl.kernels.checks import part_of
from attnctl.kernels.maps import FEW_KEYS, SelfMap, text_columns

__all__ = ["AttnCall", "CallState", "Proceed", "SiteHook", "Wrapper", "is_last", "run_wrappers"]

_FIELDS = "q k v mask scale site state image text keys index kernel hidden place wants_sums sums after _link"
_ONE_ROW = Rows(1, slice(0, 1))


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
    rows: Rows = _ONE_ROW
    phase: str = "base"
    call: int = 0
    prompts: PromptCall | None = None
    denoiser: torch.nn.Module | None = None
    family: Family | None = None
    bound: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments and variables of the pipeline call that is under way, by name; see `core.hosts.running`."""
    scratch: dict[Any, Any] = field(default_factory=dict)
    last_grid: Grid | None = None
    tokens: CallTokens | None = None
    """How the tokens of the call lie."""

    @property
    def progress(self) -> float:
        """Return the fraction of the run that is done, 0 <= i/n < 1."""
        return self.step / self.steps if self.steps else 0.0

    def begin_call(self, denoiser: torch.nn.Module, family: Family, bound: Mapping[str, Any]) -> None:
        """Forget the last call and describe a new one."""
        self.denoiser, self.family, self.bound = denoiser, family, bound
        self.tokens = CallTokens(denoiser, family, bound)
        self.phase, self.call = "base", self.call + 1

    def end_call(self) -> None:
        """Drop references to the call's tensors."""
        self.last_grid = self.last_grid or self.grid  # reading it may wait for the device: once is enough for a report
        self.bound = {}
        if self.tokens is not None:
            self.tokens.close()

    @property
    def grid(self) -> Grid | None:
        """Return frames, rows and columns of the token grid, or None for a family without a rule."""
        return None if self.tokens is None else self.tokens.grid


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
        image: Image tokens among the queries, or None where there are no others or the family has no rule.
        text: Text tokens among the keys of a joint sequence, or None.
        keys: Image tokens among the keys where these are other tokens than the queries; else None.
        index: 0 for the first attention of the processor; IP-Adapters compute a second one.
        kernel: What computes the plain attention.
        hidden: What the processor was called with, before its projections; None where it is no tensor.
        place: What `on_image` is to tell, where a control reads other tokens than the image's; else None.
        wants_sums: Whether a control will read columns of the map, for which the kernel's sums are kept.
        sums: Log-sum-exp of each query's logits [B, H, Nq], where it is wanted and the kernel gives it.
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
        link: SiteHook,
        index: int,
        parts: Parts,
        kernel: Callable[..., torch.Tensor],
        hidden: torch.Tensor | None = None,
        after: list[Callable[[Any], Any]] | None = None,
    ) -> None:
        self.q, self.k, self.v, self.mask, self.scale = q, k, v, mask, scale
        self.site, self.state, self.index = link.site, link.state, index
        self.image, self.text, self.keys, _ = parts
        self.kernel, self.hidden = kernel, hidden
        self.place: tuple[slice, Grid] | None = None
        self.after = [] if after is None else after
        self._link, self.wants_sums = link, False
        self.sums: torch.Tensor | None = None

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
        return grid_of(self.state, self.site.name, n)

    @property
    def own_kernel(self) -> bool:
        """Tell whether the site's kernel computes this call, and none that a control has put there."""
        return self.kernel is self._link.kernel

    def with_(self, **changes: Any) -> AttnCall:
        """Return a copy with some fields replaced."""
        other, fields = object.__new__(type(self)), _FIELDS.split()  # torch 2.10 does not trace copy.copy
        for name, value in {**{f: getattr(self, f) for f in fields}, **changes}.items():
            setattr(other, name, value)
        return other

    def plain(self) -> torch.Tensor:
        """Compute the unchanged attention of this call, [B, H, Nq, D]."""
        kernel: Any = self.kernel
        many = self.k.shape[-2] > FEW_KEYS  # the map of few keys is written out sooner than its sums are used
        if self.wants_sums and many and getattr(kernel, "func", None) is sdpa.as_called:
            out, self.sums = sdpa.with_sums(self.q, self.k, self.v, mask=self.mask, scale=self.scale, **kernel.keywords)
            return out
        return self.kernel(self.q, self.k, self.v, mask=self.mask, scale=self.scale)

    # Reading the map: what several controls want to see of one call ----------------------------------------------

    @property
    def folded(self) -> int:
        """Return how many rows of this call one row of the denoiser's makes: frames, in UNets for videos."""
        total = self.state.rows.total
        if self.q.shape[0] % total:
            raise UnsupportedModelError(
                f"{self.site.name} attends with {self.q.shape[0]} rows where the denoiser was called with {total}: its "
                "rows cannot be told apart."
            )
        return self.q.shape[0] // total

    def rows(self, rows: slice) -> AttnCall:
        """Return the part of this call that belongs to some rows of the denoiser's call."""
        m = self.folded
        cut = slice(rows.start * m, rows.stop * m)
        mask = self.mask
        if mask is not None and mask.ndim == 4 and mask.shape[0] > 1:
            mask = mask[cut]
        sums = None if self.sums is None else self.sums[cut]
        k, v = (x.expand(self.q.shape[0], *x.shape[1:])[cut] for x in (self.k, self.v))  # all rows may share one text
        return self.with_(q=self.q[cut], k=k, v=v, mask=mask, sums=sums)

    def on_image(self) -> tuple[slice, Grid]:
        """Return the query tokens that lie on the image, and how they lie on it."""
        if self.place is not None:
            return self.place
        self._check_told(self.image)
        image = slice(0, self.q.shape[-2]) if self.image is None else self.image
        return placed_on_image(self.state, self.site.name, image, self.grid)

    def text_keys(self) -> slice:
        """Return the places of the text among the keys of a cross- or joint attention."""
        self._check_told(self.text)
        return self.text or slice(0, self.k.shape[-2])

    def _check_told(self, part: slice | None) -> None:
        if part is None and self.site.kind == "joint":
            raise UnsupportedModelError(
                f"{self.site.name}: nothing tells image from text tokens in this call, whose attention is joint."
            )

    def text_map(self, weights: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Compute how much image tokens attend to weighted text tokens: softmax(q k^T scale + mask) @ weights.

        Args:
            weights: [T, C], or [r, T, C] with weights for each of r rows, of which the call has a multiple.
            tokens: The text tokens that the T weights belong to, [T]; None for all of them in order.

        Returns:
            [B, H, N, C] in float32 (float64 stays), N the tokens of `on_image`.
        """
        text, image = self.text_keys(), self.on_image()[0]
        w = weights.to(self.q.device)
        if w.ndim == 3 and w.shape[0] not in (1, self.q.shape[0]):
            w = w.repeat_interleave(self.q.shape[0] // w.shape[0], 0)
        at = text if tokens is None else tokens.to(self.q.device) + text.start
        return text_columns(self.q, self.k, w, image, at, mask=self.mask, scale=self.scale, sums=self.sums)

    def self_map(self) -> SelfMap:
        """Return how image tokens attend to each other, each row scaled to a sum of 1."""
        image, keys = self.on_image()[0], slice(None)
        if self.image is not None:
            start = 0 if self.keys is None else self.keys.start - self.image.start  # `image` is without padding
            keys = slice(image.start + start, image.stop + start)
        q, k, mask = self.q[:, :, image], self.k[:, :, keys], part_of(self.mask, self.q, self.k, image, keys)
        if k.shape[2] != q.shape[2]:
            raise UnsupportedModelError(
                f"{self.site.name} attends with {q.shape[2]} image tokens to {k.shape[2]} tokens: not to each other "
                "alone."
            )
        return SelfMap(q, k, mask, self.scale, self.kernel is linear_attention)


class SiteHook:
    """What ties one processor to the session: its site and what to do there in the current pass.

    `wrappers` is None while the site is left alone; a tuple (outermost first) while it is controlled. It changes only
    between passes, so that a compiled block sees few distinct values.
    """

    def __init__(self, site: Site, state: CallState, backend: str = "auto") -> None:
        self.site = self.named = site
        self.state = state
        self.open = backend == "auto"
        """Whether the attention that the user set for the model may run; a backend of the session's own goes first."""
        self.kernel = attention if self.open else functools.partial(attention, backend=backend)
        self.wrappers: tuple[Wrapper, ...] | None = None
        self.reached = self.split = False
        """Whether a controlled pass came by; whether processes share the sequence, so that tokens are not known."""
        self.shown: dict[int, tuple[Site, bool]] = {}
        """What the first call has shown of each attention of an unlisted model's module, and whether controls act."""
        self.seen: tuple[int, slice | None, slice | None] | None = None
        """Query tokens, image range and text range of the first intercepted call."""
        self.block_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.reader: Any = None
        """What reads the call for a processor that was handed out, which belongs to no session."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteHook:
        # No session writes to the links of a copied pipeline: they must not act while the original's do.
        return SiteHook(replace(self.site, module=None), CallState()) if self.reader is None else self

    @property
    def observed(self) -> bool:
        """Tell whether all wrappers only look at the call."""
        return all(getattr(getattr(w, "__self__", None), "observes", False) for w in self.wrappers or ())

    def hear(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what the transformer block around the site was called with: a hook of the block."""
        self.block_call = args, kwargs

    def run(self, call: AttnCall) -> torch.Tensor:
        """Send a call through the wrappers to its kernel."""
        self.reached = True
        # A compiled block would be compiled again once this is no longer None.
        if not torch.compiler.is_compiling() and self.seen is None:
            self.seen = (call.q.shape[-2], call.image, call.text)
        return run_wrappers(self.wrappers or (), call)


def run_wrappers(wrappers: tuple[Wrapper, ...], call: AttnCall) -> torch.Tensor:
    """Send a call through wrappers, the outermost first, to its kernel."""
    if not wrappers:
        return call.plain()
    return wrappers[0](call, functools.partial(run_wrappers, wrappers[1:]))


def is_last(proceed: Proceed) -> bool:
    """Tell whether a wrapper has nothing but the kernel behind it, so that it may compute in another way."""
    return isinstance(proceed, functools.partial) and proceed.func is run_wrappers and not proceed.args[0]
