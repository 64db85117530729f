"""Output files: safe names, nothing half written, nothing overwritten unasked."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from attnctl.errors import AttnctlError

__all__ = ["FileExists", "below", "check_free", "publish", "slug"]


class FileExists(AttnctlError):
    """An output file is already there, and overwriting it was not asked for."""


def slug(text: str, longest: int = 48) -> str:
    """Turn any text into a file name: lower case letters, digits and dashes.

    Text that does not survive the change whole gets a short hash, so that two prompts never share a name.
    """
    simple = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", simple).strip("-")
    if name and name.replace("-", " ") == text and len(name) <= longest and name not in _RESERVED:
        return name
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{name[: longest - 7].strip('-')}-{mark}".strip("-")


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


def check_free(paths: Sequence[str | Path], *, force: bool) -> None:
    """Refuse early, before hours of work, when an output file is already there.

    Raises:
        FileExists: a file is there and `force` is not set.
    """
    taken = [str(p) for p in paths if os.path.lexists(p)]
    if taken and not force:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        raise FileExists(f"{taken[0]} is already there{more}; choose another folder or pass --force.")


def publish(files: Mapping[Path, bytes], *, force: bool = False) -> None:
    """Write files atomically: each appears whole or not at all, and none replaces another without `force`.

    Raises:
        FileExists: a file is there and `force` is not set.
    """
    check_free(list(files), force=force)
    drafts: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            drafts[path] = path.with_name(f".{path.name[:80]}.{secrets.token_hex(6)}.tmp")
            drafts[path].write_bytes(content)
        for path, draft in drafts.items():
            _place(draft, path, force)
            placed.append(path)
    except BaseException:
        for path in placed if not force else ():
            path.unlink(missing_ok=True)
        raise
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _place(draft: Path, path: Path, force: bool) -> None:
    if force:
        os.replace(draft, path)
        return
    try:
        os.link(draft, path)  # unlike a rename, this fails when somebody else was faster
    except FileExistsError:
        check_free([path], force=False)
    except OSError:  # a file system without hard links
        check_free([path], force=False)
        os.replace(draft, path)
