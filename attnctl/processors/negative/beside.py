"""A call of a denoiser with the negative prompt, in lockstep with the one under way, from joint site to joint site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.arguments import Rows, own_containers, row_count
from attnctl.core.hosts.caches import hooks_of
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.modules import named_below
from attnctl.core.live import LiveDenoiser
from attnctl.errors import UnsupportedModelError
from attnctl.processors.negative.keys import has_text_stream, text_keys
from attnctl.processors.negative.lockstep import ENDED, Lockstep

__all__ = ["Beside", "Key", "check_beside"]

Key = tuple[str, int]
"""Name of a site, and the number of the attention call in it."""


class Beside:
    """A call with the negative prompt beside the one that is under way.

    It runs under a state and wrappers of its own, which are put in place while it computes, and taken off again.

    Args:
        passes: The denoiser, in the midst of a call.
        family: Its family.
        kwargs: Arguments of the second call.
        sites: Names of the joint sites where both calls meet.
        name: What the control is called in errors.
        what: What its text is called there.

    Raises:
        UnsupportedModelError: Two calls cannot go through this denoiser's blocks side by side.
    """

    def __init__(
        self, passes: LiveDenoiser, family: Family, kwargs: dict[str, Any], sites: Sequence[str], name: str, what: str
    ) -> None:
        check_beside(passes.module, name, what)
        self.passes, self.sites, self.what = passes, sites, what
        self._vars: dict[str, Any] | None = None
        self._pauses: list[Callable[[Any], Any]] = []
        pauses, state, denoiser = self._pauses, passes.state, passes.module

        def body(pause: Callable[[Any], Any]) -> None:
            pauses.append(pause)
            state.begin_call(denoiser, family, kwargs)
            state.phase, state.rows = "negative", Rows.all(row_count(kwargs))
            denoiser.forward(**own_containers(kwargs))

        self._lock = Lockstep(body, next(iter(denoiser.parameters())).device)
        # Torch calls this hook when the denoiser's forward raises, too.
        self._hook = denoiser.register_forward_hook(self._ended, always_call=True)
        passes.listening.append(self._hook)  # removed when the call is over, or the control is taken off

    def arrive(self, key: Key, answer: Tensor | None) -> AttnCall:
        """Let the second call go on to the same attention as the first, and return that.

        Args:
            key: Where the first call is.
            answer: What the attention returns at which the second call stands, [B, H, N, D]; None before the first.

        Raises:
            UnsupportedModelError: It went somewhere else.
        """
        item = self._resume(answer)
        if item is ENDED or item[0] != key:
            where = "its end" if item is ENDED else f"{item[0][0]}, attention {item[0][1]},"
            raise UnsupportedModelError(
                f"The call with {self.what} came to {where} while the prompt's was at {key[0]}, attention "
                f"{key[1]}: {type(self.passes.module).__name__} takes its blocks in an order that depends on the text."
            )
        return item[1]

    def _resume(self, answer: Tensor | None) -> Any:
        """Let the second call go on under its own state and wrappers; put those of the first back."""
        pauses, state = self._pauses, self.passes.state

        def meet(call: AttnCall, proceed: Proceed) -> Tensor:
            text = text_keys(call) if has_text_stream(call) else slice(0, 0)
            if text.start == text.stop:
                return proceed(call)
            return pauses[0](((call.site.name, call.index), call))

        with self.passes.beside(dict.fromkeys(self.sites, meet)):
            if self._vars is not None:
                vars(state).update(self._vars)
            item = self._lock.resume(answer)
            self._vars = dict(vars(state))
        return item

    def _ended(self, module: torch.nn.Module, args: Any, output: Any = None) -> None:
        self._end()  # the hook stays: torch walks through the hooks, and would raise an error of its own

    def close(self) -> None:
        """End the second call where it stands. Closing twice does nothing."""
        self._hook.remove()
        self._end()

    def _end(self) -> None:
        self._vars = None
        self._lock.close()


def check_beside(denoiser: torch.nn.Module, name: str, what: str) -> None:
    """Raise where a second call cannot go through a denoiser's blocks while the first does.

    Raises:
        UnsupportedModelError: Gradient checkpointing, compiled blocks, or hooks of diffusers; what to switch off.
    """
    why = None
    if torch.is_grad_enabled() and getattr(denoiser, "is_gradient_checkpointing", False):
        why = "gradient checkpointing runs blocks a second time: call disable_gradient_checkpointing()"
    for module in named_below(denoiser):
        if module._compiled_call_impl is not None:
            why = "a compiled block runs from its beginning to its end: attach to a model that is not compiled"
        hooks = [name for name in hooks_of(module) if name != "layerwise_casting"]
        if hooks:
            why = f"diffusers' hook {hooks[0]!r} (a cache, group offloading) would mix both calls up: disable it"
    if why is not None:
        raise UnsupportedModelError(
            f"{name} takes {what} through the joint attention of {type(denoiser).__name__} beside the prompt, block by "
            f"block, and {why}."
        )
