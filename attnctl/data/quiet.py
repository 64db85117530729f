"""Keeping messages and bars of libraries from users whom they do not concern."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

__all__ = ["hush_xformers", "without_bar"]


def hush_xformers() -> None:
    """Drop xformers' report that its CUDA extension does not load; `attnctl env` tells it in one line instead."""

    def concerns(record: logging.LogRecord) -> bool:
        return "can't load C++/CUDA extensions" not in str(record.msg)

    logging.getLogger("xformers").addFilter(concerns)


@contextlib.contextmanager
def without_bar(pipe: Any) -> Iterator[None]:
    """Switch a pipeline's own progress bar off, and leave the pipeline as it was."""
    missing = object()
    before = vars(pipe).get("_progress_bar_config", missing)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is missing:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
