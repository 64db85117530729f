"""The panels of `attnctl demo` on two cores: two processes with one thread each.

The pictures are so small that a second thread saves little where both cores are free, and costs four times the time
where they are not, since threads wait for each other in every product. The order of events: a second process is
started, which imports what it needs; both make their panels, of which those of one model stay together; the second one
sends its steps and its panels as they are done; the first waits for what is left. On one core there is no second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from attnctl.app.commands.demo_panels import Made, make, ticks_of
from attnctl.app.panels import Panel
from attnctl.errors import AttnctlError

__all__ = ["make_all", "shares"]

Passed = Callable[[float], object]


def make_all(panels: Sequence[Panel], command: str, passed: Passed, named: Callable[[str], object]) -> list[Made]:
    """Make panels, in their order.

    Args:
        panels: What is made.
        command: The command line, for the records.
        passed: Called with the seconds that a finished step takes on one core, roughly.
        named: Called with the title of a panel that is begun here.
    """
    ours, theirs = shares(panels, _cores())
    done: dict[int, Made] = {}
    with _one_thread(), _second({i: panels[i] for i in theirs}, command) as second:

        def tick(seconds: float) -> None:
            passed(seconds)
            for one in second.arrived():
                passed(one)

        for i in ours:
            named(panels[i].title)
            done[i] = make(panels[i], partial(tick, _seconds_a_tick(panels[i])), command)
        for one in second.rest():
            passed(one)
        done |= second.made
    return [done[i] for i in range(len(panels))]


def shares(panels: Sequence[Panel], cores: int) -> tuple[list[int], list[int]]:
    """Split panels between two processes, the longer share first; on one core all of them are the first's."""
    models: dict[str, list[int]] = {}
    for i, panel in enumerate(panels):
        models.setdefault(panel.model, []).append(i)
    parts: tuple[list[int], list[int]] = ([], [])
    for group in sorted(models.values(), key=lambda group: -_work(panels, group)):
        lighter = min(parts, key=lambda part: _work(panels, part)) if cores > 1 else parts[0]
        lighter += group
    return parts


def _work(panels: Sequence[Panel], part: Sequence[int]) -> float:
    return sum(panels[i].seconds for i in part)


def _seconds_a_tick(panel: Panel) -> float:
    return panel.seconds / ticks_of(panel)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Second:
    """What the second process sends.

    Attributes:
        made: Its panels that are done.
    """

    def __init__(self, receiver: Any, wanted: int) -> None:
        self.receiver, self.wanted = receiver, wanted
        self.made: dict[int, Made] = {}

    def arrived(self) -> Iterator[float]:
        """Yield the seconds of its steps that are known by now."""
        while len(self.made) < self.wanted and self.receiver.poll():
            yield from self._next()

    def rest(self) -> Iterator[float]:
        """Yield the seconds of its steps until all of its panels are here."""
        while len(self.made) < self.wanted:
            yield from self._next()

    def _next(self) -> Iterator[float]:
        try:
            what, value = self.receiver.recv()
        except EOFError:
            raise AttnctlError("The demo's second process ended early; the machine may be short of memory.") from None
        if what == "failed":
            raise value
        if what == "made":
            self.made |= value
        else:
            yield value


@contextlib.contextmanager
def _second(share: dict[int, Panel], command: str) -> Iterator[_Second]:
    """Run a process that makes a share of the panels; it ends with the context, whatever happens there."""
    if not share:
        yield _Second(None, 0)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_make_share, args=(sender, share, command), daemon=True)
    process.start()
    sender.close()
    try:
        yield _Second(receiver, len(share))
    finally:
        process.terminate()
        process.join()
        receiver.close()


def _make_share(sender: Any, share: dict[int, Panel], command: str) -> None:
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both; the first process ends this one
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the machine, which a process that is ended leaves
    with contextlib.suppress(BrokenPipeError):
        try:
            with _one_thread():
                for i, panel in share.items():
                    tick = partial(sender.send, ("passed", _seconds_a_tick(panel)))
                    sender.send(("made", {i: make(panel, tick, command)}))
        except AttnctlError as error:
            sender.send(("failed", error))
        except Exception as error:  # what cannot be sent is said in words
            sender.send(("failed", RuntimeError(f"{type(error).__name__}: {error}")))
