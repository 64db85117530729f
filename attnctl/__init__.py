"""Attention control for diffusers pipelines and timm backbones.

with attnctl.control(pipe, PAG(scale=3.0)):
    image = pipe("a prompt").images[0]
"""

from attnctl._quiet import hush_xformers

hush_xformers()  # before diffusers is imported, which imports xformers

from attnctl.errors import AttnctlError  # noqa: E402
from attnctl.kernels import attention  # noqa: E402
from attnctl.plans import HeadSet  # noqa: E402
from attnctl.session import Handle, attn_processors, control, handle_of  # noqa: E402
from attnctl.shapes.load import load_shapes  # noqa: E402
from attnctl.sites import Site, find_sites  # noqa: E402

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
