"""The attention that the user set for a model: diffusers' backends (flash, sage, cuDNN, flex ...).

A controlled processor calls SDPA, where the call can be seen. What a control then computes plainly, with the mask that
the host gave, runs on the user's backend again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from attnctl.core.sites import Site
from attnctl.kernels import attention

__all__ = ["native", "set_backend", "set_backends", "user_kernel"]


@functools.cache
def native() -> Any:
    """Return diffusers' name of torch's own attention."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


def set_backend(processor: Any) -> Any:
    """Return the backend that a processor's calls go to, or None where it is torch's own or diffusers chooses none."""
    if not hasattr(processor, "_attention_backend"):
        return None
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    name = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return None if name in (native(), native().value) else name


def set_backends(sites: Iterable[Site]) -> list[str]:
    """Name the backends that are set for the processors of some sites."""
    names = (set_backend(getattr(site.module, "processor", None)) for site in sites)
    return sorted({str(getattr(name, "value", name)) for name in names if name is not None})


def user_kernel(backend: Any, given: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """Return a kernel that runs on a backend of diffusers.

    Args:
        backend: Its name.
        given: The mask of the host. A call with another one is a control's own, for which the backend was not chosen:
            it runs on `attnctl.attention`.
    """

    def kernel(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        if mask is not given:
            return attention(q, k, v, mask=mask, scale=scale)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        laid = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out: torch.Tensor = dispatch_attention_fn(
            *laid, attn_mask=mask, scale=scale, enable_gqa=grouped, backend=backend
        )
        return out.transpose(1, 2)

    return kernel
