"""A description in words of what a handle controls."""

from __future__ import annotations

from collections.abc import Iterator

from attnctl.core.handle import Handle
from attnctl.core.hosts.caches import replay_refusal
from attnctl.core.hosts.tokens import seen_site
from attnctl.core.hosts.user_kernel import set_backends
from attnctl.core.passes import ControlledDenoiser
from attnctl.kernels import backends

__all__ = ["report"]


def report(handle: Handle, *, replay: bool) -> str:
    """Describe controls, resolved sites and their source, kernels and replay, line by line."""
    lines = [f"{'attached' if handle.attached else 'detached'}, {'enabled' if handle.enabled else 'not enabled'}"]
    for w in handle._watched:
        lines.append(f"{type(w.module).__name__} ({w.family.name}), {len(w.sites)} attention sites")
        if w.family.note:
            lines.append(f"  note: {w.family.note}")
        for i, _ in enumerate(handle.controls):
            lines += _control(handle, w, i)
        if w.branches:
            lines.append(f"  prefix replay: {_replay(w) if replay else 'no (switched off)'}")
            lines.append(f"  perturbed passes so far: {w.passes}")
        lines += [line for _, live in w.live if (line := live.describe()) is not None]
    available = backends()
    runs = [b.name for b in available.values() if b.available]
    lines.append(f"kernels: backend={handle.backend}; can run here: {', '.join(runs)}")
    names = set_backends(site for w in handle._watched for chosen in w.resolved.values() for site in chosen)
    if names:
        rest = "computed with it where a control needs no map and changes no mask, with torch's own elsewhere"
        lines.append(
            f"attention set for the model: {', '.join(names)}; {rest if handle.backend == 'auto' else 'unused'}"
        )
    return "\n".join(lines)


def _control(handle: Handle, w: ControlledDenoiser, index: int) -> Iterator[str]:
    c = handle.controls[index]
    yield f"  {c.describe()}"
    source = c.default_source(w.family) if c.sites is None and getattr(c, "heads", None) is None else None
    if source:
        yield f"    default sites from {source}"
    for site in w.resolved[index]:
        now = seen_site(w.links[site.name])
        grid = "x".join(map(str, now.grid)) if now.grid else "not known before the first call"
        yield f"    {now.name}: {now.kind}, depth {now.depth}, {now.heads} heads x {now.head_dim}, grid {grid}"


def _replay(w: ControlledDenoiser) -> str:
    reason = replay_refusal(w.module)
    if reason:
        return f"no ({reason})"
    if w.prefix is None or w.prefix.chosen is None:
        return "yes, found on the first guided step"
    names = list(w.prefix.chosen.values())
    return f"{len(names)} modules ({', '.join(names[:6])}{', ...' if names[6:] else ''})"
