"""Standing between a module's attention processor and the kernel that it calls.

A controlled processor (`hosts.processors`) runs its own code inside `Intercept`, a torch function mode. The mode lets
everything pass but `scaled_dot_product_attention`: that call becomes an `AttnCall`, goes through the wrappers that the
current pass has put on the site's `SiteHook`, and at last to the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attnctl.core.call import AttnCall, SiteHook
from attnctl.core.hosts.kinds import shown_site
from attnctl.core.hosts.tokens import PLAIN, parts_of
from attnctl.core.hosts.user_kernel import user_kernel
from attnctl.errors import UnsupportedModelError
from attnctl.kernels import sdpa

__all__ = ["Intercept"]


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
        if func is torch.Tensor.unflatten:  # which torch 2.10 does not trace inside of a mode
            func = torch.unflatten
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
        at, acts = self.index + self.passed, True
        if not self.link.split and state.family is not None and not state.family.classes:
            if at not in self.link.shown:
                self.link.shown[at] = shown_site(self.link.named, state, queries, keys, self.hidden, self.encoder)
            self.link.site, acts = self.link.shown[at]
        counts = None if state.tokens is None else state.tokens.counts
        parts = PLAIN
        if not self.link.split:
            parts = parts_of(self.link.site, state.family, counts, queries, keys, at, self.hidden, self.encoder)
        if not acts or not parts[3]:
            self.passed += 1
            self.link.reached |= not acts
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
