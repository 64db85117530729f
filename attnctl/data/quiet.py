"""Keeping messages and bars of libraries from users whom they do not concern, and counting steps in their place."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["counting_steps", "hush_xformers", "without_bar"]


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


@contextlib.contextmanager
def counting_steps(pipe: Any, step: Callable[[], object]) -> Iterator[None]:
    """Call a function after every denoising step in place of the pipeline's own bar; leave the pipeline as it was."""

    def bar(iterable: Iterable[Any] | None = None, total: int | None = None) -> _Steps:
        return _Steps(iterable, step)

    missing = object()
    before = vars(pipe).get("progress_bar", missing)
    pipe.progress_bar = bar
    try:
        yield
    finally:
        if before is missing:
            del pipe.progress_bar
        else:
            pipe.progress_bar = before


class _Steps:
    """What a pipeline takes for its bar: it counts calls of `update`, or what is iterated."""

    def __init__(self, iterable: Iterable[Any] | None, step: Callable[[], object]) -> None:
        self.iterable, self.step = iterable, step

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.step()

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        for _ in range(n):
            self.step()

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Take what else a bar is told, such as a description, and show none of it."""
        return lambda *args, **options: None
