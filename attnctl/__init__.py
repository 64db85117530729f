"""Attention control for diffusers pipelines and timm backbones.

    with attnctl.control(pipe, PAG(scale=3.0)):
        image = pipe("a prompt").images[0]

Public names are looked up on first use, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnctl.data.controls import provide
from attnctl.data.quiet import hush_xformers
from attnctl.errors import ConfigError, missing_package, shown

if TYPE_CHECKING:
    from attnctl.backbones.swap import swap, swap_report, unswap
    from attnctl.core.control import Control
    from attnctl.core.handle import Handle, handle_of
    from attnctl.core.hosts.plug import attn_processors
    from attnctl.core.hosts.rows import Layout
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

__version__ = "0.2.0"

_HOMES = {
    "AttnctlError": "errors",
    "Handle": "core.handle",
    "HeadSet": "plans",
    "Site": "core.sites",
    "attention": "kernels",
    "attn_processors": "core.hosts.plug",
    "handle_of": "core.handle",
    "load_shapes": "shapes.load",
    "swap": "backbones.swap",
    "swap_report": "backbones.swap",
    "unswap": "backbones.swap",
}

provide("attnctl.processors")  # its controls are imported at the first look-up


def control(
    pipe: Any, *controls: Control, backend: str = "auto", layout: Layout = "auto", replay: bool = True
) -> Handle:
    """Put controls on a diffusers pipeline, or on a bare denoiser, until `detach()` or the end of the with block.

    Args:
        pipe: A diffusers pipeline, or its denoiser; or an image backbone of timm, which takes a `Capture`.
        controls: What to do, in order.
        backend: Attention kernel by name ("sdpa", "xformers", "math"), or "auto" for the fastest that runs.
        layout: How the rows of a call are laid out, if attnctl cannot tell: "cond" (all rows carry the prompt),
            "uncond_first" (first half negative), "sequential" (a prompt call, then a negative call).
        replay: Let perturbed passes reuse the part of the base pass that is the same (exact; off for debugging).

    Returns:
        The handle, already attached.

    Raises:
        ConfigError: No control is given, or one of its fields is out of range.
        ConflictError: The denoiser is under control already.
        SiteError: A control selects sites that do not exist or that it cannot act on.
        UnsupportedModelError: The model cannot be controlled exactly; the message says why.

    Example:
        >>> from attnctl.processors import PAG
        >>> with control(pipe, PAG(scale=3.0)):  # doctest: +SKIP
        ...     image = pipe("an astronaut").images[0]
    """
    if not isinstance(replay, bool):
        raise ConfigError(f"replay={shown(replay)} was given; expected True or False.")
    if _is_backbone(pipe):
        from attnctl.backbones.look.capture import BackboneHandle

        return BackboneHandle(pipe, controls, backend=backend, layout=layout).attach()
    from attnctl.core.attach import attach

    return attach(pipe, *controls, backend=backend, layout=layout, replay=replay)


def find_sites(target: Any) -> tuple[Site, ...]:
    """List the attention sites of a pipeline, denoiser or timm backbone in execution order.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1,
        ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
        ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4)
        >>> [site.kind for site in find_sites(unet)][:2]
        ['self', 'cross']

    Raises:
        UnsupportedModelError: The object holds no denoiser, or the denoiser no attention with a processor.
    """
    if _is_backbone(target):
        from attnctl.backbones.look.sites import sites_of

        return sites_of(target)
    from attnctl.core.hosts import listing

    return listing.find_sites(target)


def _is_backbone(target: Any) -> bool:
    """Tell whether a target is an image model of timm, or holds one."""
    homes = ("timm.models.", "timm.layers.", "attnctl.backbones.")
    modules = target.modules() if callable(getattr(target, "modules", None)) else ()
    return any(type(m).__module__.startswith(homes) for m in modules)


hush_xformers()  # before anything imports diffusers, which imports xformers


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"attnctl.{_HOMES[name]}"), name)
    except ImportError as error:
        needed = missing_package(error)
        if needed is None:
            raise
        raise ImportError(f"attnctl.{name}: {needed}", name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
