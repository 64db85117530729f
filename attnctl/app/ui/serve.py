"""Starting the page: on this machine alone, without telemetry, and without anything from elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attnctl.app.ui.models import Models
from attnctl.errors import AttnctlError, ConfigError

__all__ = ["POLICY", "UiError", "require_gradio", "serving"]

# The browser itself refuses whatever is not served by this page.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'"
)


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
    with TemporaryDirectory(prefix="attnctl-ui-") as name, _temporary(name):
        require_gradio()
        from attnctl.app.ui.page import CSS, build, theme

        folder = Path(name)
        page = build(models, folder)
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
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                pwa=False,
                mcp_server=False,
                allowed_paths=[name],
                max_file_size="500mb",
                app_kwargs={"middleware": [_policy()]},
            )
        except OSError as error:
            raise UiError(f"Cannot listen on {host}, port {port or '7860 and up'}: {error}") from None
        try:
            yield url
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _temporary(folder: str) -> Iterator[None]:
    """Let gradio keep uploads and results in a folder that goes when the page does."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


def _policy() -> Any:
    from starlette.middleware import Middleware

    return Middleware(_Policy)


class _Policy:
    """Send the policy with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)
