"""The handle of attached controls: it switches them off and on, reads them, and takes them off without a trace.

What an attachment installs, it records in one undo list: hooks, classes of processors and of the scheduler. Detaching
runs the list backwards. `DenoiserHandle` (core.attach) and `BackboneHandle` (backbones.look.capture) build on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, get_args

import torch

from attnctl.core.control import Control, Guidance
from attnctl.core.hosts.hook import Hook
from attnctl.core.hosts.listing import denoisers_of
from attnctl.core.hosts.rows import Layout
from attnctl.core.live import LiveControl
from attnctl.core.passes import ControlledDenoiser
from attnctl.core.sites import Site
from attnctl.errors import BackendError, ConfigError, ConflictError, NeverApplied, UnsupportedModelError, unboxed
from attnctl.kernels import backends

__all__ = ["Handle", "check_controls", "check_hookable", "handle_of"]


class Handle:
    """Controls attached to a model: switch them off and on, look at them, take them off.

    Also a context manager that detaches on leaving, whatever happens inside.

    Attributes:
        controls: The controls, in the order given.
        enabled: Set to False to run the model plain, bit for bit, without detaching.
        prompts: The texts of each pipeline call, where a control needs them; else None.
    """

    def __init__(
        self, modules: Sequence[torch.nn.Module], controls: Sequence[Control], *, backend: str, layout: Layout
    ) -> None:
        if layout not in get_args(Layout):
            raise ConfigError(f"layout={layout!r} is unknown. Choose one of {', '.join(get_args(Layout))}.")
        check_controls(controls)
        for module in modules:
            check_hookable(module)
            if backend != "auto":
                _check_backend(backend, module)
        self.controls = tuple(controls)
        self.backend = backend
        self.prompts: Any = None
        self._watched: list[ControlledDenoiser] = []
        self._enabled, self._attached = True, False
        self._undo = contextlib.ExitStack()

    # On and off -----------------------------------------------------------------------------------------------

    def attach(self) -> Handle:
        """Install the controls; undo everything if any part fails."""
        try:
            self._install()
            self._attached = True
        except BaseException:
            self._undo.close()
            raise
        return self

    def _install(self) -> None:
        """Put hooks on the model, each with its undoing in `_undo`."""
        raise NotImplementedError

    def detach(self) -> None:
        """Take the controls off: processors, hooks and scheduler are as before. Detaching twice does nothing."""
        self._attached = False
        self._undo.close()

    @property
    def attached(self) -> bool:
        """Tell whether the controls are still on the model."""
        return self._attached

    @property
    def enabled(self) -> bool:
        """Tell whether the controls act."""
        return self._enabled and self._attached

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value and not self._attached:
            raise ConflictError("This handle is detached: call attnctl.control(...) again instead of enabling it.")
        self._enabled = bool(value)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def set_step(self, step: int, steps: int, timestep: float | None = None) -> None:
        """Set the step of a hand-written loop: step i of n, and the timestep (1000 = noise) where weights adapt."""
        step, steps, timestep = unboxed(step), unboxed(steps), unboxed(timestep)
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (step, steps))
        if not whole or not 0 <= step < steps:
            raise ConfigError(
                f"set_step({step!r}, {steps!r}): give step i of n as whole numbers, the step from 0 to n - 1."
            )
        self._at_step(step, steps, timestep)

    def _at_step(self, step: int, steps: int, timestep: float | None) -> None:
        """Take over a step that was set by hand; a model that has no steps has nothing to do."""

    # What it shows --------------------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[Site, ...]:
        """Return the sites under control, with grids and token ranges once a call has shown them."""
        return tuple(link.seen_site() for w in self._watched for link in w.links.values())

    @property
    def passes(self) -> int:
        """Return how many perturbed passes have run since the controls were attached."""
        return sum(w.passes for w in self._watched)

    @property
    def guidance_forwards(self) -> int:
        """Return how many forwards with gradients have run to move the latents."""
        return sum(live.forwards for w in self._watched for _, live in w.live)

    @property
    def maps(self) -> Any:
        """Return what the only control that records has recorded in the last run.

        Raises:
            ConfigError: No control records, or several do: use `result`.
            NeverApplied: Nothing was recorded yet.
        """
        recording = [c for c in self.controls if any(live.records for live in self._live(c))]
        if len(recording) != 1:
            raise ConfigError(
                f"handle.maps needs one control that records, such as a Capture; there are {len(recording)}. "
                + ("Use handle.result(control)." if recording else "Pass attnctl.processors.Capture(words=(...)) too.")
            )
        return self.result(recording[0])

    def result(self, control: Control) -> Any:
        """Return what one of the controls recorded in the last run: ask the control.

        Raises:
            ConfigError: It is not one of the controls that were attached, or it records nothing.
            NeverApplied: Nothing was recorded yet.
        """
        parts = self._live(control)
        if not parts:
            raise ConfigError(f"{control!r} is not a {type(control).__name__} that this handle has attached.")
        # Denoisers that take turns record a part each; the first puts the parts together.
        return parts[0].result(parts)

    def _live(self, control: Control) -> list[LiveControl]:
        return [live for w in self._watched for c, live in w.live if c is control]

    def kept(self, guidance: Guidance) -> Any:
        """Return c - p of a guidance that reuses it (every > 1), as it was computed last in this run.

        Raises:
            NeverApplied: No difference is stored.
        """
        for w in self._watched:
            for g, branch in w.branches:
                if g is guidance and branch.key in w.memory:
                    return w.memory[branch.key][1]
        raise NeverApplied(
            f"{guidance.describe()}: no difference is stored. Use every > 1 and run at least one step before you read "
            "it."
        )

    def report(self) -> str:
        """Describe what is attached where, from which publication, and how it runs."""
        raise NotImplementedError


def handle_of(target: Any) -> Handle | None:
    """Return the handle that controls a pipeline, denoiser or backbone, or None."""
    for module in denoisers_of(target).values():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Hook) and hook.handle is not None:
                return hook.handle
    return None


def check_controls(controls: Sequence[Any]) -> None:
    """Raise ConfigError unless there is at least one control, and nothing else."""
    if not controls:
        raise ConfigError("control() was given no control. Pass one, for example attnctl.processors.PAG(scale=3.0).")
    for c in controls:
        if not isinstance(c, Control):
            raise ConfigError(
                f"{c!r} is not a control. Pass instances from attnctl.processors, for example PAG(scale=3.0)."
            )


def _check_backend(backend: str, module: torch.nn.Module) -> None:
    """Raise BackendError if a kernel given by name is unknown or cannot run where the model is."""
    weight = next(module.parameters())
    stored = weight.is_meta or weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    # Weights that are offloaded, in 8 bits or packed tell nothing of q: the first call does, in the kernel itself.
    available = backends() if stored else backends(weight.device.type, weight.dtype)
    if backend not in available:
        raise BackendError(f"backend={backend!r} is unknown. Choose auto or one of {', '.join(available)}.")
    if not stored and not available[backend].available:
        runs = ", ".join(name for name, b in available.items() if b.available)
        raise BackendError(f"backend={backend!r} cannot run here: {available[backend].reason}. These can: {runs}.")


def check_hookable(module: torch.nn.Module) -> None:
    """Raise unless hooks on a model would run, and nobody else's controls are on it."""
    name = type(module).__name__
    if handle_of(module) is not None:
        raise ConflictError(
            f"This {name} is under control already: pass all controls to one control() call, or detach the other "
            "handle first (attnctl.handle_of(pipe).detach())."
        )
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        raise UnsupportedModelError(
            f"{name} is compiled as a whole, so hooks on it would not run. Compile its blocks instead "
            "(model.compile_repeated_blocks(fullgraph=True))."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{name} is a TorchScript module, whose attention cannot be reached. Load it as is."
        )
