"""Where attention sits in a backbone, in whatever form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from attnctl.backbones.look.frames import Frame, class_tokens, frame_of, prefix_of
from attnctl.backbones.look.readings import READABLE, Reading, reading_of
from attnctl.backbones.look.refusals import refusal_of
from attnctl.core.sites import Site
from attnctl.errors import UnsupportedModelError

__all__ = ["BackboneSite", "backbone_sites", "owner_of", "sites_of"]


@dataclass(frozen=True)
class BackboneSite:
    """One attention of a backbone.

    Attributes:
        name: Dotted name of the module that is called.
        module: That module.
        reading: How it is read.
        prefix: Class and register tokens ahead of the grid of the keys.
        tokens: Names of the queries that are no places of the image: class and register tokens, or those of a pool.
        frame: What shows the map of its tokens; None for the patch embedding, or the call itself.
    """

    name: str
    module: nn.Module
    reading: Reading
    prefix: int = 0
    tokens: tuple[str, ...] = ()
    frame: Frame | None = None

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return self.reading.heads

    @property
    def kind(self) -> str:
        """Return "pool" where single tokens ask, "self" where the places of the image do."""
        return "self" if self.reading.pool is None else "pool"


def backbone_sites(model: nn.Module) -> tuple[BackboneSite, ...]:
    """List the attention of a backbone in execution order.

    Raises: UnsupportedModelError for a model with none that can be read.
    """
    sites: dict[str, BackboneSite] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in sites):
            continue
        reading = reading_of(module)
        if reading is not None:
            owner, frame = owner_of(model, name), frame_of(module, _around(model, name))
            prefix = prefix_of(owner) if reading.prefix is None else reading.prefix
            if frame is not None and frame.places is not None:
                prefix = 0
            first = ["class"] * class_tokens(owner)
            names = (first + [f"register{n}" for n in range(1, prefix + 1)])[:prefix]
            tokens = tuple(names) if reading.pool is None else reading.pool
            sites[name] = BackboneSite(name, module, reading, prefix, tokens, frame)
    if not sites:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that can be read. {refusal_of(model)} Readable: {READABLE}."
        )
    return tuple(sites.values())


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the nearest module around a site that embeds patches, or the model."""
    return next((m for m in _around(model, name) if hasattr(m, "patch_embed")), model)


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    """Describe the attention of a backbone as sites of kind "self" or "pool"; images that pass show their grids."""
    return tuple(
        Site(s.name, s.kind, s.heads, s.reading.width // s.heads, depth, module=s.module)
        for depth, s in enumerate(backbone_sites(model))
    )


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """List the modules around a dotted name, the innermost first and the model last."""
    parts = name.split(".")[:-1]
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]
