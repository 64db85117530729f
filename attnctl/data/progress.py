"""Show how far a job is: a bar in a terminal, lines everywhere else, both on stderr and both from the first moment on.

Lines come when the job begins, when it ends, and between at growing distances: the first after two seconds at the
earliest, later ones a minute apart at most. What is shown is how much of how much is done, the time that it took, and
the time that is left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

__all__ = ["Progress", "in_words", "tracked"]

_FIRST, _LAST = 2.0, 60.0  # seconds between two lines: at first, and in a long job
_LONG = 10.0  # seconds that are worth a line after the first part
_SHARE = 0.2  # of the time that has passed, until the next line
T = TypeVar("T")


class Progress:
    """A bar, or lines where nobody watches a terminal. Use it as a context manager, and call `update` for each part.

    Args:
        total: How many parts there are; None where nobody knows.
        unit: What is counted, in the singular: "step", "picture".
        label: What the job is called.
        done: How many parts are done already, by an earlier run.
        quiet: Show nothing.
    """

    def __init__(self, total: int | None, unit: str, label: str = "", *, done: int = 0, quiet: bool = False) -> None:
        self.total, self.unit, self.label, self.note = total, unit, label, ""
        self.count = self._before = done
        self._began = self._said = time.monotonic()
        self._ready = (self.count, self._began)  # what was done, and when, where the estimate begins
        self._bar: Any = None
        self._lines = not quiet and not sys.stderr.isatty()
        if not quiet and not self._lines:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit=unit, desc=label or None, leave=False, file=sys.stderr)
        self._say(self._line())

    def update(self, n: int = 1) -> None:
        """Count parts that are done."""
        self.count += n
        if self._bar is not None:
            self._bar.update(n)
            return
        now = time.monotonic()
        wait = min(max(_FIRST, _SHARE * (now - self._began)), _LAST)
        first = self.count - n == self._before and self._rest(now) > _LONG  # say at once that this will take long
        if self._lines and self.count != self.total and (first or now - self._said >= wait):
            self._said = now
            self._say(self._line())

    def ready(self) -> None:
        """Leave what came before, such as imports and the loading of a model, out of the time that is left."""
        self._ready = (self.count, time.monotonic())

    def describe(self, note: str) -> None:
        """Say what is being done, such as "picture 3 of 8", behind what is counted."""
        self.note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)

    def close(self) -> None:
        """Take the bar away, or write the last line."""
        if self._bar is not None:
            self._bar.refresh()  # tqdm skips what comes within a tenth of a second: the last count, of a quick job
            self._bar.close()
        elif self._lines and self.count > self._before:
            self.note = ""
            self._say(f"{self._line()}: {in_words(time.monotonic() - self._began)}")
        self._bar, self._lines = None, False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> str:
        """Say what is done, and how long the rest will take."""
        head = f"{self.label}: " if self.label else ""
        of = "" if self.total is None else f" of {self.total}"
        number = self.count if self.total is None else self.total
        parts = [f"{head}{self.count}{of} {self.unit}{'' if number == 1 else 's'}", self.note]
        now = time.monotonic()
        if rest := self._rest(now):
            parts.append(f"{in_words(now - self._began)}, about {in_words(rest)} left")
        return ", ".join(filter(None, parts))

    def _rest(self, now: float) -> float:
        """Return the seconds that are left, by what this run has done; 0 where nobody can know."""
        before, began = self._ready
        done = self.count - before
        return (now - began) / done * (self.total - self.count) if done and self.total is not None else 0.0

    def _say(self, text: str) -> None:
        if self._lines:
            print(text, file=sys.stderr, flush=True)


def tracked(
    items: Iterable[T], unit: str, label: str = "", *, total: int | None = None, quiet: bool = False
) -> Iterator[T]:
    """Yield items, and show how many are done."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, unit, label, quiet=quiet) as shown:
        for item in items:
            yield item
            shown.update()


def in_words(seconds: float) -> str:
    """Write a duration: "4 s", "3 min", "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
