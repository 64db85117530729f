"""The denoiser call that is under way, for processors that were handed out: read off the stack, where no hook is.

`attn_processors` leaves the model alone, so nothing announces a call. A processor runs inside it, though: the call's
arguments are those of `torch.nn.Module` on the stack, and the pipeline that made it, if any, stands above.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from attnctl.core.call import SiteHook
from attnctl.core.hosts.arguments import bind_call, row_count
from attnctl.core.hosts.pipelines import fill_in_time, uses_guidance
from attnctl.core.hosts.rows import Layout, RowLayout
from attnctl.core.hosts.running import Owner, PipelineCall, calling_pipeline
from attnctl.core.passes import ControlledDenoiser
from attnctl.errors import UnsupportedModelError

__all__ = ["CallOnStack"]

_CALL = torch.nn.Module._call_impl.__code__


class CallOnStack:
    """Describe each call of a denoiser to the processors that were made for it.

    Args:
        watched: The denoiser with its controls; its state is written here.
        last: The last site that is controlled: behind it nobody needs the call's tensors.
        layout: What the user says of the rows.
    """

    def __init__(self, watched: ControlledDenoiser, last: str, layout: Layout) -> None:
        self.watched, self.last = watched, last
        self.layout: Layout = layout
        self.rows = RowLayout(None, layout)
        self._under_way: Any = None
        """The keyword arguments of the call that the state describes: one dict for each call."""
        self._owner = Owner()
        self._warned = False
        self._forget()

    @contextlib.contextmanager
    def describing(self, link: SiteHook, attention: torch.nn.Module) -> Iterator[None]:
        """Let a processor run with the call under way described; drop the call's tensors behind its last one."""
        try:
            self._look_up(link, attention)
            yield
        except BaseException:
            self._forget()
            raise
        finally:
            link.block_call = None
        if link.site.name == self.last:
            self._forget()

    def _look_up(self, link: SiteHook, attention: torch.nn.Module) -> None:
        """Find the denoiser's call on the stack, and the block's where a control compares tokens by it."""
        listens = any(listener is link for _, _, listener in self.watched.listeners)
        frame: Any = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _CALL:
                local = frame.f_locals
                module, args, kwargs = local["self"], local["args"], local["kwargs"]
                if isinstance(module, type(self.watched.module)):
                    if module.get_submodule(link.site.name) is attention and kwargs is not self._under_way:
                        self._begin(module, args, kwargs)
                    return
                if listens and link.block_call is None and any(m is attention for m in module.children()):
                    link.block_call = args, kwargs
            frame = frame.f_back
        self._forget()  # computed again for gradients, or `forward` was called by itself: nothing tells

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        self._owner.claim(type(module).__name__)
        w, bound = self.watched, bind_call(module, args, kwargs)
        w.state.begin_call(module, w.family, bound)
        call = calling_pipeline(module) or PipelineCall(None)
        pipe = call.pipe
        w.state.options = call.values
        w.state.rows = self._read_rows(pipe, module, bound)
        w.state.step, w.state.steps = 0, None
        fill_in_time(w.state, getattr(pipe, "scheduler", None), call, seen=False, level=False)
        if w.state.step == 0:
            w.shared.clear()
        self._under_way = kwargs
        if pipe is not None and w.branches and not self._warned:
            self._warn(type(pipe).__name__)
        for c, live in w.live:
            if live.before_call(w) is not None:
                raise UnsupportedModelError(
                    f"{c.describe()} changes what the denoiser is called with, and a processor comes too late for "
                    f"that. Use attnctl.control(pipe, {type(c).__name__}(...))."
                )

    def _read_rows(self, pipe: Any, module: torch.nn.Module, bound: dict[str, Any]) -> Any:
        """Tell the rows of a call by itself; what only the calls around it would tell stays unread."""
        rows = RowLayout(pipe, self.layout).read(module, self.watched.family, bound)
        one_of_two = self.layout == "sequential" or (self.layout == "auto" and uses_guidance(pipe) is True)
        if rows.role == "all" and one_of_two:
            return _Unread(
                "which of the two calls of a step carries the prompt is not told to a processor",
                total=row_count(bound),
            )
        return rows

    def _warn(self, pipe: str) -> None:
        self._warned = True
        names = ", ".join(type(g).__name__ for g, _ in self.watched.branches)
        warnings.warn(
            f"attnctl: {pipe} runs a model that carries the processors of {names}: every prediction is the perturbed "
            f"one, and nothing guides away from it. Restore the model's own processors and use attnctl.control(pipe, "
            f"{names}(...)), or add w (c - p) in a loop of your own.",
            stacklevel=2,
        )

    def _forget(self) -> None:
        """Keep nothing of a call: a processor that finds no call on the stack knows none."""
        state = self.watched.state
        state.end_call()
        state.denoiser, state.family, state.tokens = self.watched.module, self.watched.family, None
        state.rows, state.scratch, self._under_way = _UNREAD, {}, None
        self._owner.release()


class _Unread:
    """Rows that nobody has told: what is read of them anyway is an error, and no guess."""

    def __init__(self, why: str, **facts: Any) -> None:
        vars(self).update(facts, _why=why)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedModelError(
            f"A control needs to know which rows of the denoiser's call carry the prompt, and {self._why}. Use "
            'attnctl.control(pipe, ...), which counts the calls, or pass attn_processors(..., layout="cond") if every '
            "row carries the prompt."
        )


_UNREAD: Any = _Unread("the call was not found on the stack (compiled or recomputed blocks hide it)")
