"""Find saved plans and head sets in a folder or on the Hugging Face Hub, and push them there."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

from attnctl.errors import PlanError, shown

__all__ = ["HUB_ID", "fetching", "find", "local", "may_fetch", "push"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_FETCH: ContextVar[bool] = ContextVar("attnctl_fetch", default=True)


@contextlib.contextmanager
def fetching(allowed: bool) -> Iterator[None]:
    """Say whether names that somebody else has written, in a record or a control as text, may be fetched inside."""
    token = _FETCH.set(allowed)
    try:
        yield
    finally:
        _FETCH.reset(token)


def may_fetch() -> bool:
    """Return whether a Hub id may be looked up in the network here; what is on this machine may be used always."""
    return _FETCH.get()


def local(place: str | os.PathLike[str], noun: str) -> Path:
    """Return what names a file or folder as a path, or raise PlanError for what names nothing."""
    if not isinstance(place, (str, os.PathLike)):
        raise PlanError(f"{shown(place)} was given; expected the file or folder of {noun}, or a Hub id.")
    return Path(place)


def find(repo: str, files: Sequence[str], noun: str, revision: str | None = None) -> Path:
    """Return the folder that holds some files of a Hub repository, fetched where that is allowed.

    Args:
        repo: A Hub id such as "user/plan".
        files: Names of the files.
        noun: What they are, such as "a block plan".
        revision: Commit or branch.

    Raises:
        PlanError: The name is no Hub id, or the files cannot be had.
    """
    if not HUB_ID.fullmatch(repo):
        raise PlanError(f"{repo} does not exist. Pass the file or folder of {noun}, or a Hub id such as 'user/name'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    local = not may_fetch()
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files), local_files_only=local))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if local:
            raise PlanError(
                f"{repo} is a Hub id, is not on this machine, and nothing is fetched unasked: give --fetch, or fetch "
                f"{noun} first and name its folder."
            ) from None
        reason = " ".join(str(error).split())
        raise PlanError(f"{repo} is no local file or folder, and {noun} could not be fetched: {reason}") from None


def push(save: Callable[[str], object], repo: str, *, private: bool, token: str | None) -> str:
    """Save something into a folder, upload that to a Hub repository and return its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return str(api.upload_folder(folder_path=folder, repo_id=repo))
