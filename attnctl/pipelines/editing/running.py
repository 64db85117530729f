"""Running a pipeline on a scheduler of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from attnctl.data.quiet import without_bar

__all__ = ["running_on"]


@contextlib.contextmanager
def running_on(pipe: Any, scheduler: Any, step: Callable[[], object] | None = None) -> Iterator[dict[str, Any]]:
    """Run a pipeline with another scheduler and without its own progress bar; then give it back what it had.

    Args:
        step: Called after every step.

    Yields:
        Further arguments of the pipeline's call.
    """
    before = pipe.scheduler

    def report(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step is not None:
            step()
        return tensors

    with without_bar(pipe):
        pipe.scheduler = scheduler
        try:
            yield {"callback_on_step_end": report}
        finally:
            pipe.scheduler = before
