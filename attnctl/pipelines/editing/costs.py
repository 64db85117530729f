"""What an edit along a flow costs: calls of the denoiser, rows beside the prompt's, and bytes that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnctl.core.hosts.paths import Route
from attnctl.core.sites import Site
from attnctl.kernels.flow import Rule
from attnctl.processors.editing.flow_edit import FlowEdit

__all__ = ["ON_DEVICE", "Shape", "calls_of", "flow_costs", "in_words"]

ON_DEVICE = 64 << 20
"""Bytes of latents that stay on the model's device; more go to the CPU's memory."""


@dataclass(frozen=True)
class Shape:
    """What a run is of.

    Attributes:
        image: Image tokens.
        text: Text tokens.
        latents: Numbers in the latents.
        latent_size: Bytes of each.
        size: Bytes of a number of the model.
    """

    image: int
    text: int
    latents: int
    latent_size: int
    size: int


def calls_of(rule: Rule, steps: int) -> tuple[int, int]:
    """Return the evaluations of the denoiser on the way up, and on the way down."""
    up = Route(rule, up=True).evaluations([i / steps for i in range(steps + 1)])
    down = Route(rule).evaluations([1 - i / steps for i in range(steps + 1)])
    return len(up), len(down)


def flow_costs(edit: Any, sites: Sequence[Site], shape: Shape, steps: int, rule: Rule) -> dict[str, Any]:
    """Count calls, rows and bytes of one window of an edit.

    Args:
        edit: FateZero, Inject or FlowEdit.
        sites: Where it acts.
        shape: What the run is of.
        steps: Steps of the path.
        rule: The rule of its inversion.
    """
    inversionless = isinstance(edit, FlowEdit)
    up, down = calls_of(rule, steps)
    one = shape.latents * shape.latent_size
    latents = 2 * one if inversionless else (steps + 1) * one
    qk = maps = 0
    for site in sites:
        if site.kind not in ("self", "cross", "joint", "dual"):
            continue
        n = shape.image
        keys = {"cross": shape.text, "joint": n + shape.text}.get(site.kind, n)
        qk += (n + keys) * site.heads * site.head_dim * shape.size
        maps += site.heads * n * keys * shape.size
    if hasattr(edit, "stop") and not hasattr(edit, "cross_replace"):
        acting = edit.stop
    else:
        acting = max(_end(getattr(edit, name, 0.0)) for name in ("cross_replace", "self_replace"))
    fused = math.ceil(down * acting)
    store = getattr(edit, "store", "recompute")
    store_bytes = {"recompute": 0, "qk": fused * qk, "maps": fused * maps}[store]
    rows = 2.0 if inversionless else (1 + fused / max(down, 1) if store == "recompute" else 1.0)
    on_device = latents if latents <= ON_DEVICE or inversionless else one
    return {
        "tokens": shape.image,
        "text_tokens": shape.text,
        "inversion_calls": 0 if inversionless else up,
        "edit_calls": max(1, round(steps * edit.strength)) * edit.average if inversionless else down,
        "rows_beside": rows,
        "latent_bytes": latents,
        "device_bytes": on_device + store_bytes,
        "kept_bytes": store_bytes,
        "bytes": (0 if inversionless else latents) + store_bytes,
        "qk_bytes": fused * qk,
        "maps_bytes": fused * maps,
    }


def in_words(costs: dict[str, Any]) -> str:
    """Say calls, rows and bytes."""
    mib = 2.0**20
    c = costs
    where = (
        "" if c["latent_bytes"] <= ON_DEVICE else f", on the CPU ({c['device_bytes'] / mib:.1f} MiB beside the model)"
    )
    return (
        f"denoiser calls: {c['inversion_calls']} to invert, {c['edit_calls']} to edit with {c['rows_beside']:.2f} "
        "times the prompt's rows\n"
        f"kept of the source: {c['latent_bytes'] / mib:.1f} MiB of latents{where}, {c['kept_bytes'] / mib:.1f} MiB of "
        f"attention (qk would take {c['qk_bytes'] / mib:.0f} MiB, maps {c['maps_bytes'] / mib:.0f} MiB)"
    )


def _end(value: Any) -> float:
    """Return the end of a window of the run, the latest where words have windows of their own."""
    if isinstance(value, dict):
        return max(map(_end, value.values()), default=1.0)
    return float(value[1] if isinstance(value, (tuple, list)) else value)
