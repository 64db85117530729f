"""`attnctl ui`: a page in the browser."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, say

__all__ = ["Ui"]

_HERE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Ui(Common):
    """Open a page in the browser: pictures plain and controlled, word maps, heads, videos."""

    model: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: the shipped ones)")] = None
    """A hub id or a local folder, beside the shipped models."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The commit or branch of a hub model."""

    host: str = "127.0.0.1"
    """Address to listen on; whoever can reach it can use the page."""

    port: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the first free)")] = None
    """Port to listen on."""

    no_browser: bool = False
    """Do not open the browser."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: str = "auto"
    """auto, float32, float16, bfloat16."""

    def run(self, command: str) -> Result:
        """Serve until interrupted."""
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UsageError(f"--port is a whole number from 1 to 65535, got {self.port}.")

        importing("gradio")
        from attnctl.app.ui.serve import require_gradio, serving

        require_gradio()
        from attnctl.app.ui.models import Models
        from attnctl.pipelines.models import device_and_dtype

        device, dtype = device_and_dtype(self.device, self.dtype)
        say(f"Loading {self.model or 'the shipped models'} ({device}, {dtype})")
        models = Models(self.model, revision=self.revision, device=device, dtype=dtype)
        if self.host not in _HERE:
            say(f"Listening on {self.host}: whoever can reach this machine can use the page.")
        stop = threading.Event()
        with _until(stop), serving(models, host=self.host, port=self.port, browser=not self.no_browser) as url:
            print(json.dumps({"url": url}) if self.json else url, flush=True)
            say("Press Ctrl-C to stop.")
            stop.wait()
        return Result(None, "")


@contextlib.contextmanager
def _until(stop: threading.Event) -> Iterator[None]:
    """Stop in good order when the process is asked to end."""

    def end(*_: Any) -> None:
        stop.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
