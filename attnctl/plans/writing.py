"""Write files that belong together: all of them or none, whole, and never over another without being told to.

The order of events: drafts are written beside their places, each is linked to its place, and the journal that names
them is removed, which is the moment at which the files count. Whoever is killed on the way leaves a journal that nobody
holds any more; the next start that writes there reads it, and puts everything back as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from attnctl.errors import AttnctlError
from attnctl.plans.reading import Expected, read_json

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FileExists",
    "WriteError",
    "check_free",
    "check_writable",
    "lock",
    "publish",
    "recover",
    "save_tensors",
]

_PREFIX = ".attnctl-"  # of journals; their endings say how far the writing is
_NEW, _DRAFTING, _PLACING, _DONE = ".new", ".drafting", ".placing", ".done"
_STALE = 86400  # seconds after which a journal that no lock speaks for counts as left behind
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileExists(AttnctlError):
    """An output file is already there, and overwriting it was not asked for."""


class WriteError(AttnctlError):
    """An output file cannot be written: the disk is full, or the folder is not writable."""


_JOURNAL = Expected("the journal of files that are being written", WriteError, 4 << 20)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises: OSError where it cannot be written, which the library calls by another name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def check_free(paths: Sequence[str | Path], *, force: bool) -> None:
    """Refuse early, before hours of work, when an output file is already there, or its folder cannot be written.

    What a killed run left half done goes.

    Raises:
        FileExists: A file is there and `force` is not set.
        WriteError: A folder cannot be made or written; nothing is left in it by finding out.
    """
    folders = dict.fromkeys(Path(p).parent for p in paths)
    for folder in folders:
        recover(folder)
    taken = [str(p) for p in paths if os.path.lexists(p)]
    if taken and not force:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        raise FileExists(f"{taken[0]} is already there{more}; choose another folder or pass --force.")
    for folder in folders:
        check_writable(folder)


def check_writable(folder: Path) -> None:
    """Refuse early a folder in which nothing can be written, or which cannot be made; nothing is left in it.

    Raises:
        WriteError: It is none, or may not be written; the message says which folder and why.
    """
    there = folder.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = error.strerror or str(error) if there.is_dir() else f"{there.name} is no folder"
        raise WriteError(f"Nothing can be written into {folder}: {why}. Choose another folder.") from None


def publish(files: Mapping[Path, bytes], *, force: bool = False) -> None:
    """Write files: all of them appear whole or none does, and none replaces another without `force`.

    Raises:
        FileExists: A file is there and `force` is not set.
        WriteError: The disk is full, or a folder cannot be written; everything is as it was.
    """
    check_free(list(files), force=force)
    try:
        _write_all({Path(path): content for path, content in files.items()}, force)
    except OSError as error:
        name = Path(error.filename).name if isinstance(error.filename, str) else next(iter(files)).name
        if error.errno in _FULL:
            size = sum(map(len, files.values()))
            reason = f"the disk is full ({size} bytes are needed): free some space or choose another folder"
        else:
            reason = f"{error.strerror or error}: choose another folder"
        raise WriteError(f"{name} cannot be written, {reason}. Nothing was written.") from None


@dataclass(frozen=True)
class _Entry:
    """One file on its way: its place, its draft, what stood in its place before, and its content's hash."""

    path: Path
    token: str
    replaces: bool
    sha256: str

    @property
    def draft(self) -> Path:
        return self._beside("tmp")

    @property
    def second(self) -> Path:
        """A second name of the draft, which takes the place of what stood there."""
        return self._beside("new")

    @property
    def backup(self) -> Path:
        return self._beside("old")

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f".{self.path.name[:80]}.{self.token}.{ending}")

    def undo(self) -> None:
        """Put back what stood in the place before, or nothing."""
        if os.path.lexists(self.backup):
            os.replace(self.backup, self.path)
            self.backup.unlink(missing_ok=True)  # two names of one file: the replacing did nothing
        elif not self.replaces and self._placed():
            self.path.unlink()
        self.draft.unlink(missing_ok=True)

    def _placed(self) -> bool:
        """Tell whether the file in the place is this draft, and not one that somebody else was faster with."""
        if not self.path.is_file():
            return False
        if self.draft.exists():
            return os.path.samefile(self.draft, self.path)
        return hashlib.sha256(self.path.read_bytes()).hexdigest() == self.sha256

    def place(self, force: bool) -> None:
        """Let the draft appear in its place; where the file system has links the draft stays, and says whose it is."""
        if force and os.path.lexists(self.path):
            _link_or_move(self.path, self.backup)
        try:
            os.link(self.draft, self.path)  # unlike a rename, this fails when somebody else was faster
        except FileExistsError:
            if not force:
                check_free([self.path], force=False)
            os.link(self.draft, self.second)
            os.replace(self.second, self.path)
        except OSError:  # a file system without hard links
            if not force:
                check_free([self.path], force=False)
            os.replace(self.draft, self.path)


def _link_or_move(path: Path, to: Path) -> None:
    try:
        os.link(path, to, follow_symlinks=False)
    except (OSError, NotImplementedError):
        os.replace(path, to)


def _write_all(files: dict[Path, bytes], force: bool) -> None:
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise FileExists(f"{path} is a folder; expected the name of a file to write.")
    token = secrets.token_hex(6)
    entries = [
        _Entry(path, token, os.path.lexists(path), hashlib.sha256(content).hexdigest())
        for path, content in files.items()
    ]
    placed: list[_Entry] = []
    with _journal(entries, token) as journal:
        try:
            for entry, content in zip(entries, files.values(), strict=True):
                entry.draft.write_bytes(content)
            journal = journal.rename(journal.with_suffix(_PLACING))
            for entry in entries:
                placed.append(entry)
                entry.place(force)
            journal = journal.rename(journal.with_suffix(_DONE))  # from here on the files count
        except BaseException:
            for entry in reversed(placed):
                entry.undo()
            _sweep(entries)
            journal.unlink(missing_ok=True)
            raise
        _sweep(entries)
        journal.unlink(missing_ok=True)


def _sweep(entries: Sequence[_Entry]) -> None:
    for entry in entries:
        for path in (entry.draft, entry.second, entry.backup):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _journal(entries: Sequence[_Entry], token: str) -> Iterator[Path]:
    """Write down what is about to be written, in the folder that holds all of it, and keep it locked meanwhile."""
    parents = [entry.path.parent.absolute() for entry in entries]
    common = Path(os.path.commonpath(parents))
    root = common if common in parents else parents[0]
    facts = [[os.path.relpath(e.path.absolute(), root), e.replaces, e.sha256] for e in entries]
    path = root / f"{_PREFIX}{token}{_NEW}"
    with path.open("w", encoding="utf-8") as file:
        try:
            lock(file)  # before it has the name that others look for
            file.write(json.dumps({"schema": 1, "kind": "publishing", "files": facts}))
            file.flush()
            yield path.rename(path.with_suffix(_DRAFTING))
        finally:
            path.unlink(missing_ok=True)


def lock(file: object) -> bool:
    """Lock an open file until it is closed; False where another process has it, or where files cannot be locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except OSError:
        return False
    return True


def recover(folder: Path) -> None:
    """Put back what a killed run left half written in a folder, and remove its drafts; what others write stays."""
    try:
        with os.scandir(folder) as entries:
            journals = [folder / e.name for e in entries if e.name.startswith(_PREFIX)]
    except OSError:
        return
    for path in journals:
        if path.suffix in (_NEW, _DRAFTING, _PLACING, _DONE):
            with contextlib.suppress(OSError), path.open("rb") as file:
                if _abandoned(path, file):
                    _undo(path)


def _abandoned(path: Path, file: BinaryIO) -> bool:
    if fcntl is None or path.suffix == _NEW:  # a new one may not be locked yet
        return time.time() - os.fstat(file.fileno()).st_mtime > _STALE
    return lock(file)


def _undo(journal: Path) -> None:
    token = journal.stem.removeprefix(_PREFIX)
    with contextlib.suppress(WriteError, OSError, TypeError, ValueError):  # a damaged journal names nothing
        data = read_json(journal, _JOURNAL, kind="publishing", schema=1)
        entries = [
            _Entry(_inside(journal.parent, str(name)), token, bool(replaces), str(sha256))
            for name, replaces, sha256 in data["files"]
        ]
        if journal.suffix == _PLACING:
            for entry in reversed(entries):
                entry.undo()
        _sweep(entries)
    journal.unlink(missing_ok=True)


def _inside(root: Path, name: str) -> Path:
    """Join a name from a journal to its folder; what leads out of it is none of ours."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(name)
    return root / name
