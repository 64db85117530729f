"""How much may be asked for: sizes beyond these are a slip or an attack, and are refused before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnctl.data.picture_files import MOST_PIXELS
from attnctl.errors import AttnctlError

__all__ = ["MOST", "check_pixels_asked", "check_whole", "check_wholes"]

_SEEDS = 2**63 - 2**32  # a few billion images may follow the first
MOST: Mapping[str, int] = {
    "num": 10_000,
    "batch": 1_024,
    "pictures": 100_000,
    "steps": 10_000,
    "height": 16_384,
    "width": 16_384,
    "size": 16_384,
    "frames": 100_000,
    "every": 100_000,
    "start": 1_000_000,
    "window": 1_024,
    "threads": 1_024,
    "draws": 1_024,
    "rounds": 10_000,
    "repeats": 10_000,
    "num_train_timesteps": 100_000,
    "option": 16_384,
    "seed": _SEEDS,
}
_FROM_ZERO = ("seed", "start")


def check_whole(name: str, value: Any, error: type[AttnctlError], label: str = "") -> int:
    """Return a whole number that may be asked for under a name.

    Raises:
        AttnctlError: `error`: it is no whole number, or out of range.
    """
    least, most = int(name not in _FROM_ZERO), MOST[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise error(f"{label or name} is a whole number from {least} on, at most {most}; got {value!r:.80}.")
    return value


def check_wholes(values: Mapping[str, Any], error: type[AttnctlError], label: str = "") -> None:
    """Check every value that is given: see `check_whole`; a label such as "--" stands before the names."""
    for name, value in values.items():
        if value is not None:
            check_whole(name, value, error, f"{label}{name}")


def check_pixels_asked(width: int | None, height: int | None, error: type[AttnctlError]) -> None:
    """Raise an error for a picture of more pixels than any is read with."""
    if width is not None and height is not None and width * height > MOST_PIXELS:
        raise error(f"{width}x{height} pixels were asked for; expected at most {MOST_PIXELS} of them.")
