"""Temporary folders of one process: locked as long as it lives, and removed at the next start where it was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from attnctl.plans.writing import lock

__all__ = ["OwnFolder", "clear_left_over"]

_LOCK = "lock"


class OwnFolder:
    """A new folder below another, removed by `close`; those that killed processes left there are removed first.

    Args:
        prefix: What its name begins with: folders of one purpose have one.
        parent: The folder that it lies in; None for the system's temporary folder.

    Attributes:
        path: Where it is.
    """

    def __init__(self, prefix: str, parent: str | Path | None = None) -> None:
        clear_left_over(prefix, Path(tempfile.gettempdir() if parent is None else parent))
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._file = (self.path / _LOCK).open("w")
        lock(self._file)

    def close(self) -> None:
        """Remove the folder with everything in it."""
        self._file.close()
        shutil.rmtree(self.path, ignore_errors=True)


def clear_left_over(prefix: str, parent: Path) -> None:
    """Remove the folders that killed processes of this user left; those of processes that live are locked, and stay."""
    for folder in parent.glob(f"{prefix}*"):
        if folder.is_symlink():
            continue
        with contextlib.suppress(OSError), (folder / _LOCK).open("r+") as file:
            if lock(file) and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
