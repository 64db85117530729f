"""Where an edit takes place in a transformer: the sites that are fused, and those that show where a word lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnctl.core.hosts.linear import is_linear
from attnctl.core.sites import Site, select
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError

__all__ = ["transformer_groups"]


def transformer_groups(control: Any, sites: Sequence[Site], family: Any) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Return the sites of a transformer whose attention is edited, and those that the blend mask is made of.

    Raises:
        ConfigError: The control asks for factors, which transformers have not.
        SiteError: No site can be edited.
        UnsupportedModelError: The model's attention cannot be parted into image and text.
    """
    name = type(control).__name__
    if control.factor is not None or control.mask_factor is not None:
        raise ConfigError(
            f"{name}: factor={control.factor!r}, mask_factor={control.mask_factor!r}: {family.name} models have one "
            "resolution. Leave both out, and choose layers by sites=..."
        )
    if any(s.kind == "temporal" for s in sites):
        raise UnsupportedModelError(
            f"{name}: {family.name} models attend over frames apart from places, which is not edited. UNets of images "
            "and transformers that attend over everything at once are."
        )
    if any(s.kind == "joint" for s in sites) and family.text is None:
        raise UnsupportedModelError(
            f"{name}: nothing tells image from text tokens in the joint attention of {family.name} models."
        )
    fusable = [s for s in sites if s.module is None or not is_linear(type(getattr(s.module, "processor", None)))]
    kinds = tuple(k for k in ("self", "cross", "joint", "dual") if k in control.kinds)
    if control.sites is not None:
        fused = select(fusable, control.sites, kinds=kinds, what=name)
    else:
        fused = tuple(s for s in fusable if s.kind in kinds)
    masks = tuple(s for s in fusable if s.kind in ("cross", "joint"))
    third = max(1, len(masks) // 3)
    masks = masks[third : 2 * third] or masks  # the middle third, where words are read from best
    if control.blend_words is not None and not masks:
        raise SiteError(f"{name}: {family.name} models have no attention to text, where a blend mask could come from.")
    return fused, masks if control.blend_words is not None else ()
