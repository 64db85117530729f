"""diffusers' attention processors: which of them call SDPA, and how its dispatcher is made to call it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from attnctl.errors import UnsupportedModelError

__all__ = ["interceptable", "native", "native_backend"]


@contextlib.contextmanager
def native_backend(processor: Any, native: Any) -> Iterator[None]:
    """Have diffusers' dispatcher call SDPA, where it can be seen, whatever backend is set."""
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    held = vars(processor).get("_attention_backend", _MISSING)
    processor._attention_backend = native
    try:
        yield
    finally:
        if held is _MISSING:
            del processor._attention_backend
        else:
            processor._attention_backend = held


_MISSING = object()


@functools.cache
def native() -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


def interceptable(site: Any, processor: Any) -> Any:
    """Return a processor that calls SDPA and computes the same as this one."""
    from diffusers.models import attention_processor as ap

    name = type(processor).__name__
    siblings = {
        "AttnProcessor": "AttnProcessor2_0",
        "SlicedAttnProcessor": "AttnProcessor2_0",
        "XFormersAttnProcessor": "AttnProcessor2_0",
        "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
        "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
        "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
        "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
    }
    if name in siblings:
        if not getattr(site.module, "scale_qk", True):
            raise UnsupportedModelError(
                f"{site.name} does not scale its logits (scale_qk=False), which only {name} honours, and {name} "
                "does not call scaled_dot_product_attention: its attention cannot be intercepted."
            )
        return getattr(ap, siblings[name])()
    if name == "IPAdapterAttnProcessor":
        new = ap.IPAdapterAttnProcessor2_0(
            processor.hidden_size, processor.cross_attention_dim, processor.num_tokens, processor.scale
        )
        new.load_state_dict(processor.state_dict())
        weight = next(processor.parameters())
        return new.to(device=weight.device, dtype=weight.dtype)
    if "PAG" in name:
        raise UnsupportedModelError(
            f"{site.name} holds {name}, left there by a diffusers PAG pipeline: load the plain pipeline class, or "
            "restore the processors with set_attn_processor, then attach attnctl's PAG instead."
        )
    if "XFormers" in name or "Flex" in name:
        raise UnsupportedModelError(
            f"{site.name} holds {name}, which does not call scaled_dot_product_attention: its attention cannot be "
            "intercepted. Restore the default processor (model.set_attn_processor) before attaching."
        )
    return processor
