"""Attention control for diffusers pipelines and timm backbones.

    with attnctl.control(pipe, PAG(scale=3.0)):
        image = pipe("a prompt").images[0]

Public names are looked up on first use, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnctl.core.registry import provide
from attnctl.data.quiet import hush_xformers

if TYPE_CHECKING:
    from attnctl.backbones.swap import swap, swap_report, unswap
    from attnctl.core.handle import Handle, control, handle_of
    from attnctl.core.hosts.listing import find_sites
    from attnctl.core.plug import attn_processors
    from attnctl.core.sites import Site
    from attnctl.errors import AttnctlError
    from attnctl.kernels import attention
    from attnctl.plans import HeadSet
    from attnctl.shapes.load import load_shapes

__all__ = [
    "AttnctlError",
    "Handle",
    "HeadSet",
    "Site",
    "__version__",
    "attention",
    "attn_processors",
    "control",
    "find_sites",
    "handle_of",
    "load_shapes",
    "swap",
    "swap_report",
    "unswap",
]

__version__ = "0.1.0"

_HOMES = {
    "AttnctlError": "errors",
    "Handle": "core.handle",
    "HeadSet": "plans",
    "Site": "core.sites",
    "attention": "kernels",
    "attn_processors": "core.plug",
    "control": "core.handle",
    "find_sites": "core.hosts.listing",
    "handle_of": "core.handle",
    "load_shapes": "shapes.load",
    "swap": "backbones.swap",
    "swap_report": "backbones.swap",
    "unswap": "backbones.swap",
}

provide("attnctl.processors")  # its controls are imported at the first look-up
hush_xformers()  # before anything imports diffusers, which imports xformers


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attnctl.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
