"""Where a denoiser attends: the list of its attention sites, in execution order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from attnctl.core.hosts.families import Family, family_of, kind_of
from attnctl.core.hosts.modules import named_below
from attnctl.core.sites import Grid, Site
from attnctl.errors import SiteError, UnsupportedModelError, shown

__all__ = [
    "DENOISERS",
    "blocks_around",
    "denoisers_of",
    "find_sites",
    "halve",
    "image_level_grid",
    "naming_denoisers",
    "sites_of",
    "stage_grid",
    "unet_halvings",
    "unwrapped",
]

Found = TypeVar("Found")

_UNET_STAGES = ("transformer_in", "down_blocks", "mid_block", "up_blocks")


DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder", "prior_prior")
"""Names of the parts of a pipeline that may be its denoisers."""
_PERHAPS = ("prior", "decoder", "prior_prior")  # in some pipelines they decode images or read text


def naming_denoisers(resolve: Callable[..., Found], number: int) -> Callable[..., Found]:
    """Have a function that looks into one of several denoisers say whose sites are not as a control asks."""

    def named(module: torch.nn.Module, *rest: Any) -> Found:
        try:
            return resolve(module, *rest)
        except SiteError as error:
            if number == 1:
                raise
            raise SiteError(
                f"{error} This is said of {type(module).__name__}, one of {number} denoisers of the pipeline: control "
                "each by itself, attnctl.control(pipe.transformer, ...), or name sites of both."
            ) from None

    return named


def denoisers_of(target: Any) -> dict[str, torch.nn.Module]:
    """Name the denoisers of a pipeline ("unet", "transformer", "transformer_2", ...), or of a bare model ("")."""
    if isinstance(target, torch.nn.Module):
        return {"": _inner(target)}
    parts = {n: getattr(target, n, None) for n in DENOISERS}
    modules = {n: _inner(m) for n, m in parts.items() if isinstance(m, torch.nn.Module)}
    modules = {n: m for n, m in modules.items() if n not in _PERHAPS or family_of(unwrapped(m)).classes}
    if not modules:
        raise UnsupportedModelError(
            f"{shown(target, 60)} has no `unet` or `transformer` that is a torch module. {_instead(target)}"
            "Pass a diffusers pipeline that denoises with attention, or the denoiser itself."
        )
    return modules


def _instead(target: Any) -> str:
    """Say what to do about the commonest mistakes; "" where there is nothing to add."""
    if isinstance(target, str):
        return "Load the model first, with DiffusionPipeline.from_pretrained(...). "
    if isinstance(target, type):
        return f"Make an object of it first, with {target.__name__}.from_pretrained(...). "
    if isinstance(target, (list, tuple)):
        return "Control one pipeline per call. "
    if hasattr(target, "resolve") and hasattr(target, "sites"):
        return "The pipeline comes first, the controls after it. "
    return ""


def _inner(module: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside wrappers for data parallelism, which put "module." in front of every name."""
    while type(module).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        module = module.module  # type: ignore[assignment]
    return module


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside wrappers for data parallelism and compilation."""
    inner = _inner(module)
    return _inner(getattr(inner, "_orig_mod", inner))


def find_sites(target: Any) -> tuple[Site, ...]:
    """List the attention sites of a pipeline or denoiser in execution order: `attnctl.find_sites` without backbones.

    Raises:
        UnsupportedModelError: The object holds no denoiser, or the denoiser no attention with a processor.
    """
    return sites_of(next(iter(denoisers_of(target).values())))


def blocks_around(sites: Iterable[Site], denoiser: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """Return the transformer block around each site, and its name."""
    names = dict.fromkeys(s.name.rpartition(".")[0] for s in sites)
    return {denoiser.get_submodule(name): name for name in names}


def sites_of(denoiser: torch.nn.Module) -> tuple[Site, ...]:
    """List the attention sites of a denoiser in execution order; raise UnsupportedModelError where there are none."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # a compiled module lists the sites of what it compiled
    family = family_of(denoiser)
    if family.refusal is not None:
        raise UnsupportedModelError(f"{type(denoiser).__name__} cannot be controlled: {family.refusal}.")
    # Read off the modules' own tables: of most modules, which have no processor, `getattr` would make an error.
    processed = {n: m for m, n in named_below(denoiser).items() if "processor" in vars(m) or "processor" in m._modules}
    attentions = [(n, m) for n, m in processed.items() if callable(m.processor) and _queries(m)]
    kinds = {n: kind for n, m in attentions if (kind := kind_of(family, denoiser, n, m))}
    modules = [(n, m) for n, m in attentions if n in kinds]
    if not modules:
        raise UnsupportedModelError(_nothing(denoiser))
    order = [_execution_key(n, i, family.first) for i, (n, _) in enumerate(modules)]
    sites: list[Site] = []
    for _, (name, module) in sorted(zip(order, modules, strict=True)):
        kind = kinds[name]
        parallel = kind == "dual" and sites and sites[-1].kind == "joint"
        depth = (sites[-1].depth if parallel else sites[-1].depth + 1) if sites else 0
        grid = _default_grid(family, denoiser, name) if kind in ("self", "cross") else None
        sites.append(Site(name, kind, *_size(module), depth, grid, module=module))
    return tuple(sites)


def _nothing(denoiser: torch.nn.Module) -> str:
    """Say why a denoiser has no sites: which of its modules attend where nothing can be hooked."""
    hidden = {type(m).__name__: n for m, n in named_below(denoiser).items() if "attention" in type(m).__name__.lower()}
    shown = ", ".join(f"{name} ({cls})" for cls, name in list(hidden.items())[:3])
    return f"{type(denoiser).__name__} has no attention module with a `processor`: nothing to control." + (
        f" It attends in {shown}, which compute attention by themselves: control a denoiser of diffusers whose "
        "attention has processors."
        if hidden
        else ""
    )


_PROJECTION = re.compile(r"(?:^|_)(?:q|qkv|query)(?:_|$)")


def _queries(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """List the projections of a module that make queries, by name."""
    return [(n, m) for n, m in module.named_children() if _PROJECTION.search(n)]


def _size(module: torch.nn.Module) -> tuple[int, int]:
    """Return the number of heads, and the channels of each."""
    names = ("heads", "num_heads", "n_heads", "num_attention_heads")
    heads: Any = next((h for n in names if (h := getattr(module, n, None))), 1)
    inner: Any = getattr(module, "inner_dim", None)
    if inner is None and (queries := _queries(module)):
        name, projection = queries[0]
        inner = getattr(projection, "out_features", None)
        inner = inner // 3 if inner is not None and "qkv" in name and "mlp" not in name else inner
    return int(heads), 1 if inner is None else int(inner) // int(heads)


def _execution_key(name: str, registered: int, first: str | None) -> tuple[Any, ...]:
    """Order sites as they run: UNets register their mid block last, Latte its temporal blocks after the spatial.

    Args:
        name: Name of the site.
        registered: Its place among the sites as the modules are registered.
        first: Pattern of the sites that run before all others.
    """
    late = first is not None and re.search(first, name) is None
    parts = name.split(".")
    if parts[0] in _UNET_STAGES:
        stage = _UNET_STAGES.index(parts[0])
        numbers = [int(p) for p in parts if p.isdigit()]
        if parts[0] in ("down_blocks", "up_blocks"):
            block, *numbers = numbers
        else:
            block = 0
        layer = numbers[0] if numbers else 0
        # In one layer of a video UNet the spatial attention runs before the temporal one.
        temporal = any(p in ("temp_attentions", "motion_modules") for p in parts)
        return (late, stage, block, layer, temporal, registered)
    if parts[0] in ("transformer_blocks", "temporal_transformer_blocks") and len(parts) > 1:
        return (late, 0, int(parts[1]), int(parts[0].startswith("temporal")), 0, registered)
    return (late, 0 if parts[0] != "single_transformer_blocks" else 1, registered, 0, 0, registered)


def image_level_grid(grid: Grid, tokens: int) -> Grid | None:
    """Halve a UNet's grid (rounding up, as its stride-2 convolutions do) until it holds `tokens` tokens."""
    frames, h, w = grid
    while h * w > tokens and (h > 1 or w > 1):
        h, w = (h + 1) // 2, (w + 1) // 2
    return (frames, h, w) if h * w == tokens else None


def unet_halvings(name: str, levels: int) -> int | None:
    """Count how often the grid is halved at a UNet's site; None outside its stages."""
    stage, *rest = name.split(".")
    if stage in ("transformer_in", "image_latents_temporal_encoder"):
        return 0
    if stage == "mid_block":
        return levels - 1
    if stage not in ("down_blocks", "up_blocks"):
        return None
    index = int(rest[0])
    return index if stage == "down_blocks" else levels - 1 - index


def stage_grid(denoiser: torch.nn.Module | None, name: str, grid: Grid, tokens: int) -> Grid | None:
    """Return the grid of a UNet's site, if it holds as many tokens as the site was seen with; else None.

    The stage of a site says how often the grid of the latents was halved on the way. Other modules' stages are not
    known: there the number of tokens decides.
    """
    config: Any = getattr(denoiser, "config", None)
    levels = getattr(config, "block_out_channels", None)
    # Stable Cascade does not halve from stage to stage unless its `switch_level` says so.
    halvings = None if levels is None or hasattr(config, "switch_level") else unet_halvings(name, len(levels))
    if halvings is None:
        return image_level_grid(grid, tokens)
    h, w = halve(grid[1], grid[2], halvings)
    return (grid[0], h, w) if h * w == tokens else None


def halve(h: int, w: int, times: int) -> tuple[int, int]:
    """Halve a grid, rounding up."""
    for _ in range(times):
        h, w = (h + 1) // 2, (w + 1) // 2
    return h, w


def _default_grid(family: Family, denoiser: torch.nn.Module, name: str) -> Grid | None:
    config: Any = getattr(denoiser, "config", None)
    size = getattr(config, "sample_size", None)
    if size is None or len(family.classes) == 0:
        return None
    h, w = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    if family.unet:
        halvings = unet_halvings(name, len(config.block_out_channels))
        return None if halvings is None else (1, *halve(h, w, halvings))
    p = getattr(config, "patch_size", 1)
    return (1, h // p, w // p) if isinstance(p, int) else None
