"""The handle of attached controls: it switches them off and on, reads them, and takes them off without a trace.

What an attachment installs, it records in one undo list: hooks, classes of processors and of the scheduler. Detaching
runs the list backwards. `DenoiserHandle` (core.attach) and `BackboneHandle` (backbones.look.capture) build on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import torch

from attnctl.core.control import Control, Guidance
from attnctl.core.hosts.hook import check_hookable, hooked_by
from attnctl.core.hosts.rows import Layout
from attnctl.core.hosts.tokens import seen_site
from attnctl.core.live import LiveControl
from attnctl.core.passes import ControlledDenoiser
from attnctl.core.sites import Site
from attnctl.errors import ConfigError, ConflictError, NeverApplied, check_fields, choice, number, require, shown, whole
from attnctl.kernels.dispatch import check_backend

__all__ = ["Handle", "check_controls", "handle_of", "place_in"]


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
        choice(layout, "layout", get_args(Layout))
        check_controls(controls)
        for module in modules:
            check_hookable(module)
            check_backend(backend, next(module.parameters()))
        self.controls = tuple(controls)
        self.backend = backend
        self.prompts: Any = None
        self._watched: list[ControlledDenoiser] = []
        self._enabled, self._attached = True, False
        self._undo = contextlib.ExitStack()

    # On and off -----------------------------------------------------------------------------------------------

    def attach(self) -> Handle:
        """Install the controls; undo everything if any part fails."""
        require(not self._attached, ConflictError, "This handle is attached already: handle.detach() comes first.")
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

    def set(self, control: Control | int, **fields: Any) -> Control:
        """Replace fields of an attached control between two runs; the others keep what they have recorded.

        Args:
            control: One of `controls`, or its place in the list.
            fields: The fields to replace, checked as when a control is made and attached.

        Returns:
            The control that acts from now on, with which `result` is asked.

        Raises:
            ConfigError: There is no such control or field, or its value is out of range.
            ConflictError: The handle is detached, a run is under way, or the controls cannot act together.
        """
        place = place_in(self.controls, control)
        check_fields(type(self.controls[place]), fields)
        changed = dataclasses.replace(self.controls[place], **fields)
        require(self._attached, ConflictError, "This handle is detached: attnctl.control(...) attaches again.")
        self._exchange((*self.controls[:place], changed, *self.controls[place + 1 :]))
        return changed

    def _exchange(self, controls: tuple[Control, ...]) -> None:
        """Attach other controls in the place of the ones that are attached; change nothing where that fails."""
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
        require(isinstance(value, bool), ConfigError, f"enabled={shown(value)} was given; expected True or False.")
        require(self._attached or not value, ConflictError, "This handle is detached: call attnctl.control(...).")
        self._enabled = value

    def __enter__(self) -> Handle:
        require(self._attached, ConflictError, "This handle is detached: write `with attnctl.control(...):`.")
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def set_step(self, step: int, steps: int, timestep: float | None = None) -> None:
        """Set the step of a hand-written loop: step i of n, and the timestep (1000 = noise) where weights adapt."""
        given = f"set_step({step!r}, {steps!r}):"
        steps = whole(steps, f"{given} steps", 1)
        step = whole(step, f"{given} step", 0, steps - 1)
        timestep = None if timestep is None else number(timestep, f"{given} timestep")
        self._at_step(step, steps, timestep)

    def _at_step(self, step: int, steps: int, timestep: float | None) -> None:
        """Take over a step that was set by hand; a model that has no steps has nothing to do."""

    # What it shows --------------------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[Site, ...]:
        """Return the sites under control, with grids and token ranges once a call has shown them."""
        return tuple(seen_site(link) for w in self._watched for link in w.links.values())

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

    def result(self, control: Control | int) -> Any:
        """Return what one of the controls, or the one at a place in the list, recorded in the last run.

        Raises:
            ConfigError: It is not one of the controls that were attached, or it records nothing.
            NeverApplied: Nothing was recorded yet.
        """
        control = self.controls[place_in(self.controls, control)]
        parts = self._live(control)
        require(bool(parts), ConfigError, f"{control.describe()} records nothing. A Capture beside it would.")
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
            f"{shown(guidance)}: no difference is stored. Use every > 1 and run at least one step before you read it."
        )

    def report(self) -> str:
        """Describe what is attached where, from which publication, and how it runs."""
        raise NotImplementedError


def handle_of(target: Any) -> Handle | None:
    """Return the handle that controls a pipeline, denoiser or backbone, or None."""
    handle: Handle | None = hooked_by(target)
    return handle


def check_controls(controls: Sequence[Any]) -> None:
    """Raise ConfigError unless there is at least one control, and nothing else."""
    if not controls:
        raise ConfigError("control() was given no control. Pass one, for example attnctl.processors.PAG(scale=3.0).")
    for c in controls:
        if not isinstance(c, Control):
            instances = "Pass instances from attnctl.processors, for example PAG(scale=3.0)."
            several = "Pass the controls one by one: control(pipe, *controls)."
            raise ConfigError(f"{shown(c)} is not a control. {several if isinstance(c, (list, tuple)) else instances}")


def place_in(controls: Sequence[Control], control: Control | int) -> int:
    """Find a control in a list: the same object, else the only equal one, else by its place."""
    if isinstance(control, int) and not isinstance(control, bool) and -len(controls) <= control < len(controls):
        return control % len(controls)
    places = [i for i, c in enumerate(controls) if c is control] or [i for i, c in enumerate(controls) if c == control]
    if len(places) == 1:
        return places[0]
    attached = ", ".join(f"{i}: {c.describe()}" for i, c in enumerate(controls))
    raise ConfigError(f"{shown(control)} is {'several' if places else 'none'} of the attached controls ({attached}).")
