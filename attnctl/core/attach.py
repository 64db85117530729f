"""Putting controls on a diffusers pipeline, or on a bare denoiser.

`attach` is the only place that touches a pipeline. It installs controlled classes of the selected processors, two
native torch hooks on each denoiser, and a watched class of the scheduler object. Hooks instead of a replaced `forward`,
because accelerate's offloading silently deletes the latter.

One step of a run, in order:

    scheduler.scale_model_input   the run (`hosts.run`) notes the latents and their scaling
    denoiser, pre-hook            _before: the run tells what this call is (step, rows, words), then `begin_pass`
    denoiser.forward              the base pass
    denoiser, post-hook           _after: `end_pass` guides the prediction
    scheduler.step                end_step: controls may move the latents; the step is counted
                                  stepped: controls may change the latents that come out
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch

from attnctl.core.control import Control, Guidance
from attnctl.core.handle import Handle
from attnctl.core.hosts.arguments import as_given
from attnctl.core.hosts.hook import Hook
from attnctl.core.hosts.listing import denoisers_of, naming_denoisers
from attnctl.core.hosts.outputs import latents_of, with_latents
from attnctl.core.hosts.prompt import PromptWatch
from attnctl.core.hosts.rows import Layout
from attnctl.core.hosts.run import PipelineRun
from attnctl.core.hosts.running import warn_of_idle
from attnctl.core.live import LiveControl
from attnctl.core.passes import PENDING, ControlledDenoiser, resolve
from attnctl.core.report import report
from attnctl.errors import ConfigError, ConflictError

__all__ = ["DenoiserHandle", "attach"]


class DenoiserHandle(Handle):
    """Controls attached to a pipeline or to a bare denoiser."""

    def __init__(self, target: Any, controls: Sequence[Control], *, backend: str, layout: Layout, replay: bool) -> None:
        modules = list(denoisers_of(target).values())
        super().__init__(modules, controls, backend=backend, layout=layout)
        self._pipe = None if isinstance(target, torch.nn.Module) else target
        self._replay = replay
        self._lock = threading.RLock()
        self._run = PipelineRun(self._pipe, modules, layout, self)
        self._shared: dict[Any, Any] = {}
        self._acted: set[int] = set()
        self._told = self._fresh = False
        """Whether what never acted in the run was told; whether no denoiser was called yet in it."""
        self._watched = [naming_denoisers(self._resolve, len(modules))(m, controls) for m in modules]

    def _resolve(self, module: torch.nn.Module, controls: Sequence[Control]) -> ControlledDenoiser:
        return resolve(module, controls, self.backend, self._pipe, self._run.latents, self._shared)

    # Installing -----------------------------------------------------------------------------------------------

    def _install(self) -> None:
        undo = self._undo.callback
        for w in self._watched:
            w.make_wrappers()
            w.processors.attach(self._undo)
            before, after = (Hook(self, functools.partial(react, w)) for react in (self._before, self._after))
            undo(w.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo(w.module.register_forward_hook(after, with_kwargs=True).remove)
            undo(w.base.clear)  # with the wrappers goes what they hold, though the handle may be kept
            undo(w.stop)
        self._level = any(isinstance(c, Guidance) and c.adaptive for c in self.controls)
        lives = [live for w in self._watched for _, live in w.live]
        self._run.hears_noise = any(type(live).noise_added is not LiveControl.noise_added for live in lives)
        self._run.scheduler.follow()
        undo(self._run.scheduler.release)
        if self._pipe is not None and any(c.needs_prompt() for c in self.controls):
            self.prompts = self.prompts or PromptWatch(self._pipe)
            undo(self.prompts.attach().detach)

    def _exchange(self, controls: tuple[Control, ...]) -> None:
        if self._run.owner.at_work():
            raise ConflictError(
                "A run of the model is under way: set fields between runs, before the pipeline is called or after it "
                "has returned. start, stop and adaptive change what a control does along a run."
            )
        with self._lock:
            former = self.controls, self._watched, self.prompts
            watched = [naming_denoisers(self._resolve, len(self._watched))(w.module, controls) for w in self._watched]
            for new, old in zip(watched, self._watched, strict=True):
                _take_over(new, old)
            self._undo.close()
            self.controls, self._watched, self.prompts = controls, watched, None
            try:
                self._install()
            except BaseException:
                self._undo.close()
                self.controls, self._watched, self.prompts = former
                self._install()
                raise

    def detach(self, *, pause: bool = False) -> None:
        with self._lock:  # a hook that runs in another thread ends first
            super().detach()
            self._run.latents.end_step()
            if not pause:  # between the calls of one run, what they share stays
                self._shared.clear()
            self._run.owner.release()

    # What the run reports ---------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Begin a run."""
        self._shared.clear()
        self._acted, self._told = set(), False
        self._fresh = True
        for w in self._watched:
            w.state.step, w.state.steps, w.state.timestep = 0, None, None

    def end_step(self, sample: Any) -> Any:
        """End a step; return the latents that the controls have made of the pipeline's."""
        self._shared.pop(PENDING, None)
        for w in self._watched:
            w.state.step += 1
            for _, live in w.live:
                sample = live.stepping(sample) if isinstance(sample, torch.Tensor) else sample
        return sample

    def stepped(self, result: Any, drew: bool) -> Any:
        """Give the latents that a step returned to the controls that change them."""
        if not self.enabled:
            return result
        for w in self._watched:
            for c, live in w.live:
                step = w.state.step - 1  # counted already
                if drew and c.in_window_at(step, w.state.steps):
                    live.noise_added()
                if live.changes_latents and c.in_window_at(step, w.state.steps):
                    result = with_latents(result, live.stepped(step, latents_of(result)))
        if any(w.state.steps is not None and w.state.step >= w.state.steps for w in self._watched):
            self._end_run()
        return result

    def _end_run(self) -> None:
        """Warn of the controls that no step of the run has reached."""
        steps = next((w.state.steps for w in self._watched if w.state.steps is not None), 0)
        idle = [c for i, c in enumerate(self.controls) if i not in self._acted and not c.is_off()]
        self._run.owner.release()
        if idle and not self._told:
            warn_of_idle(idle, steps)
        self._told = True

    def _at_step(self, step: int, steps: int, timestep: float | None) -> None:
        self._run.owner.claim(type(self._watched[0].module).__name__)
        if step == 0:
            self._run.latents.end_step()
            self.begin_run()
        for w in self._watched:
            w.state.step, w.state.steps, w.state.timestep = step, steps, timestep
        self._shared.pop(PENDING, None)
        self._run.rows.calls = 0

    # What the denoiser's hooks do -----------------------------------------------------------------------------

    def _before(self, w: ControlledDenoiser, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._enabled:
            self._run.owner.claim(type(w.module).__name__, loop=self._pipe is None)
        if w.running:  # a further pass of our own
            return None
        with self._lock:
            w.stop()
            if not self.enabled:
                return None
            w.processors.heal()
            if self._pipe is None and w.state.steps is None:
                self._check_steps()
            self._run.describe(w, args, kwargs, self.prompts, level=self._level)
            if self._fresh:  # not before: Wan Animate sets timesteps once more after its last segment
                for each in self._watched:
                    each.begin_run()
                self._fresh = False
            if w.branches and self._pipe is None:
                self._run.rows.warn_bare(w.state.rows)
            changed = w.begin_pass(self._replay)
            if w.state.rows.role not in ("uncond", "extra"):
                self._acted |= {i for i, c in enumerate(self.controls) if i not in self._acted and c.acts(w.state)}
            return None if changed is None else as_given(w.module, changed, w.positional)

    def _after(self, w: ControlledDenoiser, _: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        with self._lock:
            if not self.enabled or w.running or w.state.denoiser is None:
                return None
            last = self._pipe is None and w.state.steps is not None and w.state.step == w.state.steps - 1
            guided = w.end_pass(output)
            if last:
                self._end_run()
            elif self._pipe is None and w.state.steps is None:
                self._run.owner.release()  # calls of a bare model do not depend on each other
            return guided

    def _check_steps(self) -> None:
        """Raise for a control that depends on the step of a bare model's run, which nobody has told."""
        needy = next((c for c in self.controls if c.needs_steps()), None)
        if needy is not None:
            raise ConfigError(
                f"{needy.describe()} depends on the step, which a bare model call does not tell. Call "
                "handle.set_step(i, n) before each call, or pass the pipeline to control()."
            )

    def report(self) -> str:
        return report(self, replay=self._replay)


def _take_over(new: ControlledDenoiser, old: ControlledDenoiser) -> None:
    """Go on with what the controls have kept that are attached still."""
    by_control = {id(c): live for c, _, live in old.parts}
    new.parts[:] = [(c, sites, by_control.get(id(c), live)) for c, sites, live in new.parts]
    new.live = [(c, live) for c, _, live in new.parts if live is not None]
    new.memory, new.passes = old.memory, old.passes


def attach(
    target: Any, *controls: Control, backend: str = "auto", layout: Layout = "auto", replay: bool = True
) -> Handle:
    """Put controls on a diffusers pipeline or a bare denoiser: `attnctl.control` without backbones."""
    return DenoiserHandle(target, controls, backend=backend, layout=layout, replay=replay).attach()
