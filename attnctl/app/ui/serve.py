"""Starting the page: on this machine alone, without telemetry, and without anything from elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnctl.app.ui.guard import Guard
from attnctl.app.ui.models import Models
from attnctl.errors import AttnctlError, ConfigError
from attnctl.plans.folders import OwnFolder

__all__ = ["UiError", "require_gradio", "serving"]

_FOLDER = "attnctl-ui-"  # of the files of one page, in the system's temporary folder


class UiError(AttnctlError):
    """The page cannot be served."""


def require_gradio() -> None:
    """Import gradio with its telemetry off.

    Raises:
        UiError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UiError('attnctl ui needs gradio: pip install "attnctl[ui]".') from None


@contextlib.contextmanager
def serving(
    models: Models, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = False
) -> Iterator[str]:
    """Serve the page and yield its address; stop and delete every file that it made when the block is left.

    Args:
        host: The address to listen on. Whoever reaches it can use the page.
        port: The port; None for the first free one from 7860 on.
        browser: Open the page in the user's browser.

    Raises:
        UiError: gradio is missing, or the port is taken.
        ConfigError: the port is none.
    """
    if port is not None and not 1 <= port <= 65535:
        raise ConfigError(f"A port is a whole number from 1 to 65535, got {port}.")
    with contextlib.closing(OwnFolder(_FOLDER)) as folder, _temporary(folder.path / "uploads"):
        require_gradio()
        from attnctl.app.ui.page import CSS, SCRIPT, build, theme

        made = folder.path / "made"
        for part in (made, folder.path / "uploads"):
            part.mkdir()
        page = build(models, made)
        try:
            _, url, _ = page.queue(default_concurrency_limit=1).launch(
                server_name=host,
                server_port=port,
                inbrowser=browser,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                theme=theme(),
                css=CSS,
                js=SCRIPT,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                pwa=False,
                mcp_server=False,
                allowed_paths=[str(made)],
                max_file_size="500mb",
                app_kwargs={"middleware": [_guard(host)]},
            )
        except OSError as error:
            raise UiError(f"Cannot listen on {host}, port {port or '7860 and up'}: {error}") from None
        try:
            yield url
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Let gradio keep uploads in a folder that goes when the page does."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


def _guard(host: str) -> Any:
    from starlette.middleware import Middleware

    return Middleware(Guard, host=host)
