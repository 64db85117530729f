"""What was found out about a model, or is asked of its attention, as data: head sets, block plans, selectors.

The classes are imported when they are asked for: files are read and written without PyTorch too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnctl.plans.blocks import BlockPlan
    from attnctl.plans.heads import HeadSet
    from attnctl.plans.model import ModelPlan
    from attnctl.plans.selectors import Neighborhood, Online, Radial, SlidingTile

__all__ = ["BlockPlan", "HeadSet", "ModelPlan", "Neighborhood", "Online", "Radial", "SlidingTile"]

_HOMES = {
    "BlockPlan": "blocks",
    "HeadSet": "heads",
    "ModelPlan": "model",
    "Neighborhood": "selectors",
    "Online": "selectors",
    "Radial": "selectors",
    "SlidingTile": "selectors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
