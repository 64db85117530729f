"""Per-family facts about diffusers' denoisers, in one table.

A family answers questions that no denoiser answers by itself: what kind of attention each site computes, in which
order the sites run, how the tokens lie on the image or video and beside it, how its pipelines lay out rows, and which
layers a paper perturbs in it. Everything else in attnctl is generic; a new model family is a new row in the file of its
kind of host (and a tiny model in `tests/zoo.py`).
"""

from __future__ import annotations

import re

import torch

from attnctl.core.hosts.families.images import IMAGES
from attnctl.core.hosts.families.row import Bound, Family, Tokens
from attnctl.core.hosts.families.sounds import SOUNDS
from attnctl.core.hosts.families.unets import TEMPORAL, UNETS
from attnctl.core.hosts.families.videos import VIDEOS

__all__ = ["FAMILIES", "GENERIC", "Bound", "Family", "Tokens", "family_of", "kind_of"]

FAMILIES: tuple[Family, ...] = (*UNETS, *IMAGES, *VIDEOS, *SOUNDS)

GENERIC = Family(
    name="unlisted",
    classes=(),
    kinds=((rf"(?:{TEMPORAL}).*attn", "temporal"),),
    note="not in attnctl's family table: site kinds are read off the modules; joint token scopes are refused",
)

_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}


def family_of(denoiser: torch.nn.Module) -> Family:
    """Look up a denoiser's family by its class name, subclasses included."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in _BY_CLASS:
            return _BY_CLASS[cls.__name__]
    return GENERIC


def kind_of(family: Family, denoiser: torch.nn.Module, name: str, module: torch.nn.Module) -> str:
    """Name the kind of attention at one site, one of `core.sites.KINDS`, or "" where the module is no site."""
    if family.kind_at is not None and (special := family.kind_at(denoiser, name)) is not None:
        return special
    for pattern, kind in family.kinds:
        if re.search(pattern, name):
            return kind
    if getattr(module, "is_cross_attention", False):
        return "cross"
    return "joint" if getattr(module, "added_kv_proj_dim", None) is not None else "self"
