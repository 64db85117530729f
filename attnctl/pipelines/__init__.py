"""Whole jobs built from the controls.

Names are looked up on first use, so that one job does not import what another needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnctl.pipelines.calibration import Calibration, calibrate
    from attnctl.pipelines.calibration_report import check_plan, draw_maps, write_report
    from attnctl.pipelines.classification import Classified, classify
    from attnctl.pipelines.guider import ControlGuider
    from attnctl.pipelines.hunt_plan import HuntPlan, halvings
    from attnctl.pipelines.hunt_results import Hunted, compose
    from attnctl.pipelines.hunt_search import hunt
    from attnctl.pipelines.inversion import ddim_of, estimate_bytes, invert
    from attnctl.pipelines.noised import image_maps
    from attnctl.pipelines.segmentation import Segmented, segment
    from attnctl.pipelines.video_edit import Edited, edit_video

__all__ = [
    "Calibration",
    "Classified",
    "ControlGuider",
    "Edited",
    "HuntPlan",
    "Hunted",
    "Segmented",
    "calibrate",
    "check_plan",
    "classify",
    "compose",
    "ddim_of",
    "draw_maps",
    "edit_video",
    "estimate_bytes",
    "halvings",
    "hunt",
    "image_maps",
    "invert",
    "segment",
    "write_report",
]

_HOMES = {
    "Classified": "classification",
    "classify": "classification",
    "Segmented": "segmentation",
    "segment": "segmentation",
    "Calibration": "calibration",
    "ControlGuider": "guider",
    "Edited": "video_edit",
    "calibrate": "calibration",
    "check_plan": "calibration_report",
    "draw_maps": "calibration_report",
    "write_report": "calibration_report",
    "ddim_of": "inversion",
    "edit_video": "video_edit",
    "estimate_bytes": "inversion",
    "HuntPlan": "hunt_plan",
    "Hunted": "hunt_results",
    "compose": "hunt_results",
    "halvings": "hunt_plan",
    "hunt": "hunt_search",
    "image_maps": "noised",
    "invert": "inversion",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attnctl.pipelines.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
