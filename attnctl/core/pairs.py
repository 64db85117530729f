"""Which controls cannot act together, and why: one table, held against every list of controls before it is attached.

Guidance adds up, observers only look, and controls at different sites do not meet. What is left are pairs that decide
the same thing at the same place (the kernel, the rows of a prompt, the order of tokens), where one would silently undo
the other or read what the other has replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from attnctl.core.control import Control, Guidance
from attnctl.core.sites import Site
from attnctl.errors import ConflictError

__all__ = ["RULES", "Rule", "check_pairs", "commute", "rule_for"]

Where = Literal["site", "block", "model"]


@dataclass(frozen=True)
class Rule:
    """A refused pair of methods.

    Attributes:
        first: Class names of one control.
        second: Class names of the other; equal to `first` for a method beside itself.
        where: What both must share: an attention site, a transformer block, or nothing but the model.
        reason: Why they cannot act together.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    where: Where
    reason: str


_EDITS = ("FateZero", "PromptToPrompt")
_MOVES = ("AStar", "AttendExcite", "LatentGuidance")
RULES: tuple[Rule, ...] = (
    Rule(("FateZero",), ("FateZero", "PromptToPrompt"), "model", "each takes the attention of a source of its own"),
    Rule(("PromptToPrompt",), ("PromptToPrompt",), "model", "each takes the attention of a source of its own"),
    Rule(
        ("PromptToPrompt",), _MOVES, "model",
        "latent guidance moves the source's latents too, so that source and edit no longer begin alike",
    ),
    Rule(_EDITS, ("AgentAttention",), "site", "merged tokens have no counterpart in the source's attention"),
    Rule(_EDITS, ("NAG",), "site", "both compute the cross-attention of chosen rows, which the other takes for all"),
    Rule(("NAG",), ("NAG",), "site", "the second would take the prompt rows that the first cuts out for all rows"),
    Rule(("PARO",), ("AgentAttention",), "site", "a block plan goes by the places of tokens, which merging takes away"),
    Rule(("PARO",), ("PARO",), "site", "each brings the kernel, and one kernel computes an attention"),
    Rule(("AgentAttention",), ("AgentAttention",), "site", "tokens that are merged already have no grid to merge on"),
    Rule(("BroadWay",), ("BroadWay",), "site", "both set the gain of the same motion: give one beta and alpha"),
    Rule(("EnhanceAVideo",), ("EnhanceAVideo",), "site", "both set the gain of the same output: give one weight"),
    Rule(
        ("TPG",), ("PARO", "AgentAttention", "BroadWay", "EnhanceAVideo"), "block",
        "the one shuffles the tokens of the block, the other goes by their places",
    ),
)  # fmt: skip
"""A pair stands here once; the order in which two controls are given does not matter."""


def rule_for(first: type, second: type) -> Rule | None:
    """Find the rule for two classes of controls, subclasses included; None where they may act together."""
    one, other = ({c.__name__ for c in cls.__mro__} for cls in (first, second))
    for rule in RULES:
        a, b = set(rule.first), set(rule.second)
        if (one & a and other & b) or (one & b and other & a):
            return rule
    return None


def commute(first: type, second: type) -> bool:
    """Tell whether two controls that may act together give the same result in either order.

    All do but two that move the latents, of which the second starts where the first has moved them.
    """
    moves = [{c.__name__ for c in cls.__mro__} & set(_MOVES) for cls in (first, second)]
    return not all(moves)


def check_pairs(controls: Sequence[Control], resolved: Mapping[int, Sequence[Site]]) -> None:
    """Refuse controls that cannot act together.

    Args:
        controls: What is to be attached.
        resolved: The sites of each, by its place in the list.

    Raises:
        ConflictError: Two of them cannot, at the same time and place.
    """
    for j, b in enumerate(controls):
        for i, a in enumerate(controls[:j]):
            rule = rule_for(type(a), type(b))
            if rule is None or not _at_once(a, b):
                continue
            shared = _shared(rule.where, resolved[i], resolved[j])
            if shared is not None:
                names = f"{type(a).__name__} and {type(b).__name__}"
                raise ConflictError(
                    f"{names} cannot act together{shared}: {rule.reason}. Leave one out"
                    + (", give it other sites" if shared else "")
                    + ", or give them windows (start, stop) that do not overlap."
                )


def _at_once(a: Control, b: Control) -> bool:
    """Tell whether both act at some step; controls of weight zero never do."""
    if any(isinstance(c, Guidance) and c.scale == 0 for c in (a, b)):
        return False
    return max(a.start, b.start) < min(a.stop, b.stop)


def _shared(where: Where, a: Sequence[Site], b: Sequence[Site]) -> str | None:
    """Say in words what two controls share; None where that is nothing."""
    if where == "model":
        return ""
    place = _block if where == "block" else _name
    other = {place(s) for s in b}
    return next((f" at {s.name}" for s in a if place(s) in other), None)


def _name(site: Site) -> str:
    return site.name


def _block(site: Site) -> str:
    return site.name.rpartition(".")[0]
