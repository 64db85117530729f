"""Names of files: safe ones for any text, inputs in the order that people count in."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path

from attnctl.plans.writing import FileExists

__all__ = ["below", "natural", "slug"]


_LONGEST = 48  # characters of a name


def slug(text: str) -> str:
    """Turn any text into a file name: lower case letters, digits and dashes.

    Text that does not survive the change whole gets a short hash, so that two prompts never share a name.
    """
    simple = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", simple).strip("-")
    if name and name.replace("-", " ") == text and len(name) <= _LONGEST and name not in _RESERVED:
        return name
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{name[: _LONGEST - 7].strip('-')}-{mark}".strip("-")


_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}


def below(folder: str | Path, name: str) -> Path:
    """Join a file name to its folder, and make sure that it stays there.

    Raises:
        FileExists: the name leads out of the folder, or the folder is a file.
    """
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise FileExists(f"{root} is a file; expected a folder for the output.")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise FileExists(f"The name {name!r} leads out of the folder {root}.")
    return path


def natural(path: Path) -> tuple[tuple[tuple[int, str], ...], str]:
    """Return a key that sorts file names as people count: frame_2 before frame_10."""
    parts = re.split(r"([0-9]+)", path.name)
    return tuple((int(part), "") if part.isdecimal() else (-1, part.casefold()) for part in parts), path.name
