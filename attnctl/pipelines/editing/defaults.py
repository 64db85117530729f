"""What an edit takes by default in each family of models, and who says so."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Defaults", "defaults_of"]


@dataclass(frozen=True)
class Defaults:
    """Settings of one method in one family.

    Attributes:
        steps: Steps of the path.
        guidance: Guidance of the target's prompt.
        source: Where they come from.
        fields: Fields of the control.
        noise: Where the noise of an inversion begins.
    """

    steps: int
    guidance: float
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    noise: str = "own"


_DRAWN = "drawn noise as tried on shapes:videodit (benchmarks/video_edit_effects.py)"
_HALF = {"cross_replace": 0.5, "self_replace": 0.5}
_MEASURED = "windows as measured on shapes:mmdit (benchmarks/flow_edit_effects.py)"
_FLOW_EDIT = "FlowEdit, arXiv 2412.08629"
_TABLE: dict[tuple[str, str], Defaults] = {
    ("Stable Diffusion 1, 2, XL", "FateZero"): Defaults(50, 7.5, "FateZero's released configurations"),
    ("FLUX.1", "FateZero"): Defaults(25, 5.0, f"{_MEASURED}; steps and guidance of RF-Solver-Edit", _HALF),
    ("FLUX.1", "Inject"): Defaults(25, 5.0, "RF-Solver-Edit, arXiv 2411.04746"),
    ("FLUX.1", "FlowEdit"): Defaults(
        28, 5.5, f"{_FLOW_EDIT}, FLUX.1", {"source_scale": 1.5, "target_scale": 5.5, "strength": 24 / 28}
    ),
    ("Stable Diffusion 3, 3.5", "FlowEdit"): Defaults(
        50, 13.5, f"{_FLOW_EDIT}, SD3", {"source_scale": 3.5, "target_scale": 13.5, "strength": 33 / 50}
    ),
}


def defaults_of(pipe: Any, family: str, method: str) -> Defaults:
    """Return the defaults of a method in a family; where nobody has published any, the pipeline's own."""
    if (family, method) in _TABLE:
        return _TABLE[family, method]
    parameters = inspect.signature(type(pipe).__call__).parameters

    def default_of(names: tuple[str, ...], otherwise: Any) -> Any:
        defaults = (parameters[n].default for n in names if n in parameters)
        return next((v for v in defaults if isinstance(v, (int, float)) and v > 1), otherwise)

    steps = int(default_of(("num_inference_steps",), 28))
    scale = float(default_of(("guidance_scale", "true_cfg_scale"), 4.0))
    if method == "FlowEdit":
        fields = {"source_scale": max(1.0, scale / 4), "target_scale": scale, "strength": 0.66}
        return Defaults(steps, scale, f"{type(pipe).__name__}'s own; FlowEdit's share for SD3", fields)
    fields = _HALF if method == "FateZero" else {}
    noise = "drawn" if family == "Wan" else "own"
    said = [f"{type(pipe).__name__}'s own", *([_MEASURED] if fields else []), *([_DRAWN] if noise == "drawn" else [])]
    return Defaults(steps, scale, "; ".join(said), fields, noise)
