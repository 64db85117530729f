"""Attention control for diffusers pipelines and timm backbones.

with attnctl.control(pipe, PAG(scale=3.0)):
    image = pipe("a prompt").images[0]
"""

# ruff: noqa: E402
from typing import TYPE_CHECKING, Any

from attnctl._quiet import hush_xformers

hush_xformers()  # before diffusers is imported, which imports xformers

from attnctl.errors import AttnctlError
from attnctl.kernels import attention
from attnctl.plans import HeadSet
from attnctl.session import Handle, attn_processors, control, handle_of
from attnctl.sites import Site, find_sites

if TYPE_CHECKING:
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
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_shapes":  # the shapes world imports OpenCV, which most sessions do not need
        from attnctl.shapes.load import load_shapes

        return load_shapes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
