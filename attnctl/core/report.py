"""Saying in words what a handle controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnctl.core.replay import Prefix
from attnctl.kernels import backends

if TYPE_CHECKING:
    from attnctl.core.handle import Handle

__all__ = ["report"]


def report(handle: Handle) -> str:
    """Describe controls, resolved sites and their source, kernels and replay, line by line."""
    lines = [f"{'attached' if handle.attached else 'detached'}, {'enabled' if handle.enabled else 'not enabled'}"]
    for w in handle._watched:
        lines.append(f"{type(w.module).__name__} ({w.family.name}), {len(w.sites)} attention sites")
        if w.family.note:
            lines.append(f"  note: {w.family.note}")
        for i, c in enumerate(handle.controls):
            lines.append(f"  {c.describe()}")
            source = c.default_source(w.family) if c.sites is None and getattr(c, "heads", None) is None else None
            if source:
                lines.append(f"    default sites from {source}")
            for site in w.resolved[i]:
                now = w.links[site.name].seen_site()
                grid = "x".join(map(str, now.grid)) if now.grid else "not known before the first call"
                lines.append(
                    f"    {now.name}: {now.kind}, depth {now.depth}, {now.heads} heads x {now.head_dim}, grid {grid}"
                )
        if w.branches:
            reason = "switched off" if not handle._replay else Prefix.refusal(w.module)
            if reason:
                lines.append(f"  prefix replay: no ({reason})")
            elif w.prefix is not None and w.prefix.chosen is not None:
                names = list(w.prefix.chosen.values())
                lines.append(
                    f"  prefix replay: {len(names)} modules ({', '.join(names[:6])}{', ...' if names[6:] else ''})"
                )
            else:
                lines.append("  prefix replay: yes, found on the first guided step")
            lines.append(f"  perturbed passes so far: {w.passes}")
    if handle._latents is not None:
        lines.append(
            f"latents: {handle._latents.updates} updates by {handle.guidance_forwards} guidance forwards so far"
        )
    known = backends()
    runs = [b.name for b in known.values() if b.available]
    lines.append(f"kernels: backend={handle.backend}; can run here: {', '.join(runs)}")
    return "\n".join(lines)
