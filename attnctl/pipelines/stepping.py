"""How far runs of a pipeline are: one bar, or lines, over the denoising steps of all of them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from attnctl.data.progress import Progress
from attnctl.data.quiet import counting_steps

__all__ = ["showing_steps", "step_bar", "steps_of"]


def steps_of(pipe: Any, steps: int | None = None) -> int | None:
    """Return how many steps a call will take: those that are given, else the pipeline's default, None for neither."""
    if steps is None:
        parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
        steps = None if parameter is None else parameter.default
    return steps if isinstance(steps, int) else None


def step_bar(pipe: Any, steps: int | None, calls: int, label: str) -> Progress:
    """Make a bar over the steps of several calls, whose caller counts them."""
    each = steps_of(pipe, steps)
    return Progress(None if each is None else calls * each, "step", label)


@contextlib.contextmanager
def showing_steps(
    pipe: Any, call: Mapping[str, Any] | None, runs: int, label: str, *, quiet: bool = False
) -> Iterator[Progress]:
    """Show the steps of all calls of a pipeline inside the block.

    Args:
        pipe: The pipeline; its own bar is off meanwhile.
        call: Arguments of its calls, num_inference_steps among them where it is given.
        runs: How many calls there will be.
        label: What the job is called.
        quiet: Show nothing.
    """
    steps = steps_of(pipe, (call or {}).get("num_inference_steps"))
    total = None if steps is None else runs * steps
    with Progress(total, "step", label, quiet=quiet) as shown, counting_steps(pipe, shown.update):
        yield shown
