"""Which controls cannot act together: what each declares, held against every list of controls before it is attached.

Guidance adds up, observers only look, and controls at different sites do not meet. What is left are pairs that decide
the same thing at the same place (the kernel, the rows of a prompt, the order of tokens), where one would silently undo
the other or read what the other has replaced. A pair is declared once, by either control (`Control.conflicts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnctl.core.control import Control, Guidance
from attnctl.core.registry import Conflict, Where
from attnctl.core.sites import Site
from attnctl.errors import ConflictError

__all__ = ["check_conflicts", "conflict_between"]


def conflict_between(first: type, second: type) -> Conflict | None:
    """Find why two classes of controls cannot act together, subclasses included; None where they can."""
    for one, other in ((first, second), (second, first)):
        names = {c.__name__ for c in other.__mro__}
        for c in one.__mro__:
            for conflict in vars(c).get("conflicts", ()):
                if names & set(conflict.names):
                    return conflict
    return None


def check_conflicts(controls: Sequence[Control], resolved: Mapping[int, Sequence[Site]]) -> None:
    """Refuse controls that cannot act together.

    Args:
        controls: What is to be attached.
        resolved: The sites of each, by its place in the list.

    Raises:
        ConflictError: Two of them cannot, at the same time and place.
    """
    for j, b in enumerate(controls):
        for i, a in enumerate(controls[:j]):
            conflict = conflict_between(type(a), type(b))
            if conflict is None or not _at_once(a, b):
                continue
            shared = _shared(conflict.where, resolved[i], resolved[j])
            if shared is not None:
                names = f"{type(a).__name__} and {type(b).__name__}"
                raise ConflictError(
                    f"{names} cannot act together{shared}: {conflict.reason}. Leave one out"
                    + (", give it other sites" if shared else "")
                    + ", or give them windows (start, stop) that do not overlap."
                )


def _at_once(a: Control, b: Control) -> bool:
    """Tell whether both act at some step; controls of weight zero never do."""
    if any(isinstance(c, Guidance) and c.is_off() for c in (a, b)):
        return False
    return max(a.start, b.start) < min(a.stop, b.stop)


def _shared(where: Where, a: Sequence[Site], b: Sequence[Site]) -> str | None:
    """Say in words what two controls share; None where that is nothing."""
    if where == "model":
        return ""
    names = [{s.name: s.name if where == "site" else s.name.rpartition(".")[0] for s in sites} for sites in (a, b)]
    other = set(names[1].values())
    return next((f" at {name}" for name, place in names[0].items() if place in other), None)
