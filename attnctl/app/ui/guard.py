"""What stands between the page and whoever asks for it: whose requests are answered, and how files are handed out."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

__all__ = ["POLICY", "Guard", "host_allowed"]

# The browser itself refuses whatever is not served by this page.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
_SEALED = "default-src 'none'; sandbox"  # of files: nothing in them runs, even where a browser opens one
_SHOWN = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "video/mp4", "video/webm")
_EVERY_ADDRESS = ("0.0.0.0", "::", "")


def host_allowed(header: str, host: str) -> bool:
    """Tell whether a request's Host names this page: the address it listens on, or this machine.

    A name of somebody else's that leads here (DNS rebinding) would let their page read this one. Where the page listens
    on every address, any address in figures and the machine's own names count.
    """
    name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
    names = {"127.0.0.1", "localhost", "::1", host.strip("[]").lower()}
    if host in _EVERY_ADDRESS:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in names
        return True
    return name in names


class Guard:
    """Middleware: refuse requests for another host or from another page, and send the policy with every answer."""

    def __init__(self, app: Any, host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = self._refusal(dict(scope["headers"]))
        if refused:
            await _refuse(scope, send, refused)
            return
        is_file = _is_file(scope["path"])

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = list(_sealed(message["headers"]) if is_file else _policed(message["headers"]))
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)

    def _refusal(self, headers: dict[bytes, bytes]) -> str:
        """Return why a request is refused, or ""."""
        host = headers.get(b"host", b"").decode("latin-1")
        if not _parsed(host, self.host):
            return f"This page is served as localhost or as {self.host}; the request asks for {host!r:.80}."
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and not _parsed(origin.partition("://")[2], self.host):
            return f"This page answers its own requests; this one comes from {origin!r:.80}."
        return ""


def _parsed(header: str, host: str) -> bool:
    try:
        return host_allowed(header, host)
    except ValueError:  # no host at all
        return False


async def _refuse(scope: Any, send: Any, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


def _is_file(path: str) -> bool:
    """Tell whether a path is that of an uploaded or written file: gradio has two forms of it."""
    return any(part in path for part in ("/file=", "/file/", "/stream/"))


def _policed(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    return [*headers, (b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]


def _sealed(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """Yield the headers of a file: pictures and videos as what they are, everything as a download."""
    disposition = b"attachment"
    for name, value in headers:
        key = name.lower()
        if key == b"content-type":
            kind = value.partition(b";")[0].strip().decode("latin-1").lower()
            yield name, kind.encode() if kind in _SHOWN else b"application/octet-stream"
        elif key == b"content-disposition":
            disposition = value if value.lower().startswith(b"attachment") else disposition
        elif key != b"content-security-policy":
            yield name, value
    yield b"content-disposition", disposition
    yield b"content-security-policy", _SEALED.encode()
    yield b"x-content-type-options", b"nosniff"
