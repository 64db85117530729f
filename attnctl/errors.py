"""Every error attnctl raises on purpose. A message says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AttnctlError",
    "BackendError",
    "ConfigError",
    "ConflictError",
    "JudgeError",
    "NeverApplied",
    "PlanError",
    "SiteError",
    "UnsupportedModelError",
    "nearest",
]


class AttnctlError(ValueError):
    """Base class: catch this to catch everything that attnctl raises on purpose."""


class ConfigError(AttnctlError):
    """A field of a control, or an argument of a public call, is out of range or of the wrong type."""


class SiteError(AttnctlError):
    """A selector matches no attention site, or a head or token range does not exist there."""


class UnsupportedModelError(AttnctlError):
    """The model, its processors or the way it is run cannot be controlled exactly, for the reason given."""


class ConflictError(AttnctlError):
    """Two controls claim the same decision, or a handle is used out of order."""


class NeverApplied(AttnctlError):
    """A control was attached and active, but no denoiser call reached the attention it selected."""


class PlanError(AttnctlError):
    """A saved head set or block plan is damaged, of another schema, or made for another model."""


class BackendError(AttnctlError):
    """A kernel was asked for by name that cannot run here."""


class JudgeError(AttnctlError):
    """An image or a prompt is outside the shapes world, so the judge cannot mark it."""


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> str:
    """Name the closest candidates to a misspelt name, ready to be put in an error message."""
    close = difflib.get_close_matches(name, list(candidates), n=n, cutoff=0.3)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""
