"""Two calls of one denoiser in lockstep, of which only one computes at a time.

The second call runs in a thread of its own, as a coroutine: it goes on when the first one resumes it, and stops where
it calls `pause`. A thread and no generator, because the place where it stops lies deep inside the host's own forward.

    first call                            second call
    resume(None)                 ->       runs to its first attention
                                 <-       pause(attention)
    works with that attention, resume(result)
                                 ->       goes on with the result to its next attention ...
    close()                      ->       PassEnded is raised where it stands
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from attnctl.core.live import PassEnded

__all__ = ["ENDED", "Lockstep"]

ENDED = object()
"""What `resume` returns when the second call has come to its end."""

Pause = Callable[[Any], Any]
Setting = Callable[[], contextlib.AbstractContextManager[None]]


class _Channel:
    """What both threads share; it does not know the `Lockstep`, so that dropping that ends the thread."""

    def __init__(self) -> None:
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.item: Any = None
        self.answer: Any = None
        self.error: BaseException | None = None
        self.closing = False

    def pause(self, item: Any) -> Any:
        """Hand an item to the first call, and wait for its answer: called by the second."""
        self.item = item
        self.stopped.release()
        del item
        self.go.acquire()
        if self.closing:
            raise PassEnded
        answer, self.answer = self.answer, None
        return answer

    def run(
        self, body: Callable[[Pause], None], setting: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self.go.acquire()
        try:
            if not self.closing:
                with setting():
                    body(self.pause)
            self.item = ENDED
        except PassEnded:
            self.item = ENDED
        except BaseException as error:  # raised again in the thread of the first call
            self.error = error
        self.stopped.release()


class Lockstep:
    """A second call beside the one under way.

    Args:
        body: The second call; it is handed `pause`.
        device: Where it computes.
    """

    def __init__(self, body: Callable[[Pause], None], device: torch.device) -> None:
        self._channel = _Channel()
        context, setting = contextvars.copy_context(), _setting(device)
        self._thread = threading.Thread(
            target=context.run, args=(self._channel.run, body, setting), name="attnctl negative prompt", daemon=True
        )
        self._thread.start()
        self._ended = False
        # A run that is broken off drops its lockstep somewhere; the thread ends with it.
        self._close = weakref.finalize(self, _end, self._channel, self._thread)

    def resume(self, answer: Any) -> Any:
        """Let the second call go on; return what it hands over next, or ENDED."""
        if self._ended:
            return ENDED
        channel = self._channel
        channel.answer = answer
        del answer
        channel.go.release()
        channel.stopped.acquire()
        if channel.error is not None:
            self._ended = True
            error, channel.error = channel.error, None
            raise error
        item, channel.item = channel.item, None
        self._ended = item is ENDED
        return item

    def close(self) -> None:
        """End the second call where it stands. Closing twice does nothing."""
        self._ended = True
        self._close()


def _end(channel: _Channel, thread: threading.Thread) -> None:
    channel.closing = True
    channel.go.release()
    if thread is not threading.current_thread():
        thread.join()


def _setting(device: torch.device) -> Setting:
    """Note what torch keeps for each thread: gradients, autocast, modes, the stream. Return what sets it again."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kinds = {"cpu", device.type} - {"meta"}
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in sorted(kinds)]
    functions, dispatches = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            if stream is not None:
                undo.enter_context(torch.cuda.device(device))
                undo.enter_context(torch.cuda.stream(stream))
            undo.enter_context(torch.inference_mode(inference))
            undo.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, enabled in casts:
                undo.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            _push(functions, dispatches)  # the thread ends with them: nothing need be popped
            yield

    return again


def _push(functions: list[Any], dispatches: list[Any]) -> None:
    from torch.utils._python_dispatch import _push_mode

    for mode in functions:
        torch._C._push_on_torch_function_stack(mode)
    for mode in dispatches:
        _push_mode(mode)
