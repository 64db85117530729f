"""Whole jobs built from the controls.

Names are looked up on first use, so that one job does not import what another needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnctl.pipelines.calibration.calibrate import Calibration, calibrate
    from attnctl.pipelines.calibration.compare import candidates, compare
    from attnctl.pipelines.calibration.report import check_plan, draw_maps, write_report
    from attnctl.pipelines.editing.edit import Edited, edit_video
    from attnctl.pipelines.editing.inversion import ddim_of, estimate_bytes, invert
    from attnctl.pipelines.guider import ControlGuider
    from attnctl.pipelines.hunting.blocks import BlockHunt, RankedBlocks, hunt_blocks
    from attnctl.pipelines.hunting.plan import HuntPlan, halvings
    from attnctl.pipelines.hunting.results import Hunted, compose
    from attnctl.pipelines.hunting.search import hunt
    from attnctl.pipelines.map_images import image_maps
    from attnctl.pipelines.referring import refer
    from attnctl.pipelines.vision.classification import Classified, classify
    from attnctl.pipelines.vision.segmentation import Segmented, segment

__all__ = [
    "BlockHunt",
    "Calibration",
    "Classified",
    "ControlGuider",
    "Edited",
    "HuntPlan",
    "Hunted",
    "RankedBlocks",
    "Segmented",
    "calibrate",
    "candidates",
    "check_plan",
    "classify",
    "compare",
    "compose",
    "ddim_of",
    "draw_maps",
    "edit_video",
    "estimate_bytes",
    "halvings",
    "hunt",
    "hunt_blocks",
    "image_maps",
    "invert",
    "refer",
    "segment",
    "write_report",
]

_HOMES = {
    "Classified": "vision.classification",
    "classify": "vision.classification",
    "Segmented": "vision.segmentation",
    "segment": "vision.segmentation",
    "Calibration": "calibration.calibrate",
    "ControlGuider": "guider",
    "Edited": "editing.edit",
    "calibrate": "calibration.calibrate",
    "candidates": "calibration.compare",
    "compare": "calibration.compare",
    "check_plan": "calibration.report",
    "draw_maps": "calibration.report",
    "write_report": "calibration.report",
    "ddim_of": "editing.inversion",
    "edit_video": "editing.edit",
    "estimate_bytes": "editing.inversion",
    "BlockHunt": "hunting.blocks",
    "HuntPlan": "hunting.plan",
    "Hunted": "hunting.results",
    "compose": "hunting.results",
    "halvings": "hunting.plan",
    "RankedBlocks": "hunting.blocks",
    "hunt": "hunting.search",
    "hunt_blocks": "hunting.blocks",
    "image_maps": "map_images",
    "invert": "editing.inversion",
    "refer": "referring",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attnctl.pipelines.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
