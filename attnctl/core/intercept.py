"""Standing between a module's attention processor and the kernel that it calls.

A controlled processor (`hosts.processors`) runs its own code inside `Intercept`, a torch function mode. The mode lets
everything pass but `scaled_dot_product_attention`: that call becomes an `AttnCall`, goes through the wrappers that the
current pass has put on the site's `SiteHook`, and at last to the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attnctl.core.call import AttnCall, CallState, Wrapper, run_wrappers
from attnctl.core.hosts.kinds import shown_site
from attnctl.core.hosts.listing import stage_grid
from attnctl.core.hosts.tokens import parts_of
from attnctl.core.hosts.user_kernel import user_kernel
from attnctl.core.sites import Site
from attnctl.errors import UnsupportedModelError
from attnctl.kernels import attention, sdpa

__all__ = ["Intercept", "SiteHook"]


class SiteHook:
    """What ties one processor to the session: its site and what to do there in the current pass.

    `wrappers` is None while the site is left alone; a tuple (outermost first) while it is controlled. It changes only
    between passes, so that a compiled block sees few distinct values.
    """

    def __init__(self, site: Site, state: CallState, backend: str = "auto") -> None:
        self.site = site
        self.state = state
        self.kernel: Callable[..., torch.Tensor] = attention
        self.open = backend == "auto"
        """Whether the attention that the user set for the model may run; a backend of the session's own goes first."""
        if not self.open:
            self.kernel = functools.partial(attention, backend=backend)
        self.wrappers: tuple[Wrapper, ...] | None = None
        self.reached = self.split = False
        """Whether a controlled pass came by; whether processes share the sequence, so that tokens are not known."""
        self.idle = False
        """Whether the site of an unlisted model has turned out to be of a kind that no control acts on."""
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

    def seen_site(self) -> Site:
        """Return the site with what the calls so far have shown of its tokens."""
        if self.seen is None:
            return self.site
        n, image, text = self.seen
        grid, family = self.state.last_grid, self.state.family
        if grid is not None and family is not None and family.unet:
            grid = stage_grid(self.state.denoiser, self.site.name, grid, n)
        return replace(self.site, grid=grid or self.site.grid, image=image, text=text)

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


class Intercept(TorchFunctionMode):
    """Send scaled_dot_product_attention to a link; everything else passes.

    `backend` is the attention of diffusers that the user set for the model, or None for torch's own.
    """

    def __init__(self, link: SiteHook, hidden: Any, encoder: Any, backend: Any = None) -> None:
        super().__init__()
        self.link, self.hidden, self.encoder, self.backend = link, hidden, encoder, backend
        self.index = self.passed = 0
        self.after: list[Callable[[Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.attend(*args, **kwargs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if dropout_p:
            raise UnsupportedModelError(
                f"{self.link.site.name} drops attention weights (p = {dropout_p}): call model.eval() first."
            )
        state, queries, keys = self.link.state, query.shape[-2], key.shape[-2]
        unseen = self.link.seen is None and not self.link.idle
        if unseen and not self.link.split and state.family is not None and not state.family.classes:
            # What its name says of an unlisted model's site is a hint; later calls find what the first one showed.
            site, acts = shown_site(self.link.site, state, queries, keys, self.hidden, self.encoder)
            self.link.site, self.link.idle = site, not acts
        counts = None if state.tokens is None else state.tokens.counts
        at = self.index + self.passed
        parts: Any = (None, None, None, True)
        if not self.link.split:
            parts = parts_of(self.link.site, state.family, counts, queries, keys, at, self.hidden, self.encoder)
        if self.link.idle or not parts[3]:
            self.passed += 1
            self.link.reached |= self.link.idle
            options: Any = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        if is_causal:
            attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        hidden = self.hidden if isinstance(self.hidden, torch.Tensor) else None
        kernel = self.link.kernel
        if self.backend is not None and not is_causal:
            kernel = user_kernel(self.backend, attn_mask)
        elif self.link.observed:
            kernel = functools.partial(sdpa.as_called, is_causal=is_causal, enable_gqa=enable_gqa)
        elif key.shape[0] != query.shape[0]:  # text that all rows share: SDPA broadcasts it, other kernels do not
            rows = max(query.shape[0], key.shape[0])
            query, key, value = (x.expand(rows, *x.shape[1:]) if x.shape[0] == 1 else x for x in (query, key, value))
        call = AttnCall(query, key, value, attn_mask, scale, self.link, self.index, parts, kernel, hidden, self.after)
        self.index += 1
        return self.link.run(call)
