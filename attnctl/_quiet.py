"""Keeping one message of a library from users whom it does not concern."""

from __future__ import annotations

import logging

__all__ = ["hush_xformers"]


def hush_xformers() -> None:
    """Drop xformers' report that its CUDA extension does not load; `attnctl env` tells it in one line instead."""

    def concerns(record: logging.LogRecord) -> bool:
        return "can't load C++/CUDA extensions" not in str(record.msg)

    logging.getLogger("xformers").addFilter(concerns)
