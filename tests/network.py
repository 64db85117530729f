"""A guard on the network: it hears every attempt to reach another machine, whoever makes it, and refuses it.

    python tests/network.py examples/pag_sd15.py --shapes    # runs a script; fails if anything was heard

It listens to Python's own audit events, so it hears sockets and names of every library, and it runs with the hub's
offline switch off: what is quiet here is quiet because nobody asked, not because asking was forbidden.
"""

from __future__ import annotations

import runpy
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ASKED_BY_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_REACHED = ("socket.connect", "socket.sendto", "socket.sendmsg")
_HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None, socket.gethostname())
SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_OFFLINE")

_heard: list[str] | None = None
_listening = False


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if _heard is None or event not in (*_ASKED_BY_NAME, *_REACHED):
        return
    where = args[0] if event in _ASKED_BY_NAME else args[1]
    if event in _REACHED:
        if not isinstance(where, tuple):  # a file of this machine, or an answer on an open connection
            return
        where = where[0]
    host = where.decode("idna") if isinstance(where, bytes) else where
    if host in _HERE:
        return
    _heard.append(f"{event} {host}")
    raise ConnectionRefusedError(f"no network here: {event} {host}")


@contextmanager
def guarded() -> Iterator[list[str]]:
    """Refuse the network inside the block; yield what was attempted."""
    global _heard, _listening
    if not _listening:
        sys.addaudithook(_listen)  # for good: an audit hook cannot be taken off
        _listening = True
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before


def main(script: str, *args: str) -> int:
    """Run a script under the guard, in an interpreter that was started without the hub's switches."""
    sys.modules["network"] = sys.modules[__name__]  # so that the script finds what was heard so far
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).resolve().parent)
    with guarded() as heard:
        runpy.run_path(script, run_name="__main__")
    if heard:
        print(f"attempts to reach another machine: {heard}", file=sys.stderr)
    return 1 if heard else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
