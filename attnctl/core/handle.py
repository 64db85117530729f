"""Putting controls on a pipeline and taking them off again without a trace.

`control` is the only place that touches a pipeline. What it installs, it records in one undo list: the class of each
selected processor, two native torch hooks on each denoiser and the class of the scheduler object. Hooks instead of a
replaced `forward`, because accelerate's offloading silently deletes the latter.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from attnctl.core.control import Control, Guidance
from attnctl.core.hosts.arguments import bind_call
from attnctl.core.hosts.listing import denoisers_of, is_backbone
from attnctl.core.hosts.outputs import latents_of, with_latents
from attnctl.core.hosts.prompt import PromptWatch
from attnctl.core.hosts.rows import Layout, RowLayout
from attnctl.core.hosts.scheduler import unwatch_scheduler, watch_scheduler
from attnctl.core.intercept import SiteHook, attach_processor, detach_processor, release_processor
from attnctl.core.passes import ControlledDenoiser, resolve
from attnctl.core.sites import Site
from attnctl.data.maps import WordMaps, joined
from attnctl.errors import BackendError, ConfigError, ConflictError, NeverApplied, UnsupportedModelError
from attnctl.kernels import backends
from attnctl.processors.capture.capture import Capture
from attnctl.processors.capture.recorder import Recorder
from attnctl.processors.latent.engine import LatentEngine
from attnctl.processors.latent.guidance import LatentGuidance

__all__ = ["Handle", "check_controls", "check_hookable", "control", "handle_of"]


class Handle:
    """Controls attached to a pipeline: switch them off and on, look at them, take them off.

    Also a context manager that detaches on leaving, whatever happens inside.

    Attributes:
        controls: The controls, in the order given.
        enabled: Set to False to run the pipeline plain, bit for bit, without detaching.
    """

    def __init__(self, target: Any, controls: Sequence[Control], *, backend: str, layout: Layout, replay: bool) -> None:
        self.controls = tuple(controls)
        self.backend = backend
        self._enabled = True
        self._replay = replay
        self._undo = contextlib.ExitStack()
        self._attached = False
        self._pipe = None if isinstance(target, torch.nn.Module) else target
        self._scheduler: Any = None
        self._reader = RowLayout(self._pipe, layout)
        self._layout = layout
        self._warned: set[str] = set()
        check_controls(controls)
        modules = denoisers_of(target).values()
        for module in modules:
            check_hookable(module)
            if backend != "auto":
                _check_backend(backend, module)
        self._watched = [resolve(m, self.controls, backend, self._pipe) for m in modules]
        guides = {i: c for i, c in enumerate(self.controls) if isinstance(c, LatentGuidance)}
        self._latents = LatentEngine(self._pipe, guides) if guides else None
        hears = self._pipe is not None and (guides or any(c.needs_prompt() for c in self.controls))
        self.prompts = PromptWatch(self._pipe) if hears else None
        """Hears the prompt of each call, where a control needs it."""

    def attach(self) -> Handle:
        """Install the controls; undo everything if any part fails."""
        try:
            for watched in self._watched:
                self._attach_denoiser(watched)
            self._attach_scheduler()
            if self.prompts is not None:
                self.prompts.attach()
                self._undo.callback(self.prompts.detach)
            self._attached = True
        except BaseException:
            self._undo.close()
            raise
        return self

    def _attach_denoiser(self, watched: ControlledDenoiser) -> None:
        self._undo.callback(self._release_made, watched)
        for link in watched.links.values():
            watched.made.append(attach_processor(link.site, link))
            self._undo.callback(self._release_processor, watched, link)
        pre = watched.module.register_forward_pre_hook(_Hook(self, watched).before, with_kwargs=True)
        self._undo.callback(pre.remove)
        post = watched.module.register_forward_hook(_Hook(self, watched).after, with_kwargs=True)
        self._undo.callback(post.remove)
        self._undo.callback(watched.stop)

    def _attach_scheduler(self) -> None:
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is None or scheduler is self._scheduler:
            return
        held, self._scheduler = self._scheduler, scheduler
        watch_scheduler(scheduler, self)
        if held is None:
            self._undo.callback(self._release_scheduler)
        else:  # the user gave the pipeline another scheduler, whose set_timesteps nobody has heard
            unwatch_scheduler(held)
            self.on_set_timesteps()

    def _release_scheduler(self) -> None:
        unwatch_scheduler(self._scheduler)
        latest = getattr(self._pipe, "scheduler", None)
        if latest is not None and getattr(latest, "_attnctl", None) is None:
            unwatch_scheduler(latest)  # made of a watched class, and given to the pipeline after the last run

    def _release_processor(self, watched: ControlledDenoiser, link: SiteHook) -> None:
        if not detach_processor(link.site, link):
            warnings.warn(
                f"attnctl: the processor of {link.site.name} was replaced after control() attached; it is left as it "
                "is.",
                stacklevel=4,
            )

    def _release_made(self, watched: ControlledDenoiser) -> None:
        for processor in watched.made:  # a model that fused its projections keeps the old ones for later
            release_processor(processor)
        watched.made.clear()

    def detach(self) -> None:
        """Take the controls off: processors, hooks and scheduler are as before. Detaching twice does nothing."""
        self._attached = False
        self._undo.close()
        if self._latents is not None:
            self._latents.new_run()

    @property
    def attached(self) -> bool:
        """Tell whether the controls are still on the pipeline."""
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
        return 0 if self._latents is None else self._latents.forwards

    @property
    def maps(self) -> WordMaps:
        """Return the word maps that the `Capture` among the controls recorded in the last run.

        Raises:
            ConfigError: No control is a `Capture`, or several are: use `result`.
            NeverApplied: Nothing was recorded yet.
        """
        found = [c for c in self.controls if isinstance(c, Capture)]
        if len(found) != 1:
            raise ConfigError(
                f"handle.maps needs one Capture among the controls; there are {len(found)}. "
                + ("Use handle.result(capture)." if found else "Pass attnctl.processors.Capture(words=(...)) too.")
            )
        return self.result(found[0])

    def result(self, capture: Capture) -> WordMaps:
        """Return the word maps that one of the controls recorded in the last run.

        Raises:
            ConfigError: It is not one of the controls that were attached.
            NeverApplied: Nothing was recorded yet.
        """
        recorders = [own for w in self._watched for c, own in w.attached if c is capture]
        parts = [r for r in recorders if isinstance(r, Recorder)]
        if not parts:
            raise ConfigError(f"{capture!r} is not a Capture that this handle has attached.")
        return joined([r.maps() for r in parts if r.layers] or [parts[0].maps()])

    def kept(self, guidance: Guidance) -> Any:
        """Return c - p of a guidance that reuses it (every > 1), as it was computed last in this run.

        Raises:
            NeverApplied: It computed none yet, or keeps none.
        """
        for w in self._watched:
            for g, branch in w.branches:
                if g is guidance and branch.key in w.memory:
                    return w.memory[branch.key].delta
        raise NeverApplied(f"{guidance.describe()} has kept no difference: it needs every > 1, and a step that ran.")

    def set_step(self, step: int, steps: int, timestep: float | None = None) -> None:
        """Tell the step of a hand-written loop: step i of n, and the timestep (1000 = noise) where weights adapt."""
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (step, steps))
        if not whole or not 0 <= step < steps:
            raise ConfigError(
                f"set_step({step!r}, {steps!r}): give step i of n as whole numbers, the step from 0 to n - 1."
            )
        for w in self._watched:
            w.state.step, w.state.steps, w.state.timestep = step, steps, timestep
            if step == 0:
                w.begin_run()
            w.pending = None
        self._reader.calls = 0

    def report(self) -> str:
        """Say in words what is attached where, from which publication, and how it runs."""
        from attnctl.core.report import report

        return report(self)

    # What the scheduler reports ------------------------------------------------------------------------------

    def on_set_timesteps(self) -> None:
        """Begin a run."""
        self._reader.new_run()
        if self._latents is not None:
            self._latents.new_run()
        for w in self._watched:
            w.state.step, w.state.steps = 0, None
            w.begin_run()

    def on_scale(self, sample: torch.Tensor, scale: Callable[[Any], Any]) -> None:
        """Note the latents that the pipeline scales."""
        self._reader.scaled(sample)
        if self._latents is not None:
            self._latents.scaled(sample, scale)

    def on_step(self, sample: Any) -> Any:
        """End a step, with the latents that the controls have made of the pipeline's."""
        if self._attached and self.enabled:
            self._reader.check_step(sample)
        for w in self._watched:
            w.state.step += 1
            w.pending = None
        return sample if self._latents is None else self._latents.stepped(sample)

    def on_stepped(self, result: Any) -> Any:
        """Give the latents that a step returned to the controls that change them."""
        if not self.enabled:
            return result
        for w in self._watched:
            for c, own in w.attached:
                step = w.state.step - 1  # counted already
                if own.changes_latents and c.in_window_at(step, w.state.steps):
                    result = with_latents(result, own.stepped(step, latents_of(result)))
        return result

    # What the denoiser's hooks do ----------------------------------------------------------------------------

    def _before(self, w: ControlledDenoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        w.stop()
        if not self._enabled or w.running:
            return None
        self._heal(w)
        bound = bind_call(w.module, args, kwargs)
        w.state.begin_call(w.module, w.family, bound)
        self._time(w)
        rows = self._reader.read(bound, w.family.cond_first)
        w.state.rows = rows
        changed = self._moved(w)
        if rows.role != "extra":
            self._warn_bare(w, rows)
            w.begin_pass(self._replay)
        return None if changed is None else ((), changed)

    def _moved(self, w: ControlledDenoiser) -> dict[str, Any] | None:
        """Let the controls move the latents; return the arguments with which the call shall go on, if they did."""
        if self.prompts is not None:
            self.prompts.close()
            w.state.prompts = self.prompts.call
        call = None if self.prompts is None else self.prompts.call
        changed = None if self._latents is None else self._latents.before(w, call)
        if changed is not None:
            rows = w.state.rows
            w.state.begin_call(w.module, w.family, changed)
            w.state.rows = rows
        return changed

    def _after(self, w: ControlledDenoiser, output: Any) -> Any:
        if not self._enabled or w.running or w.state.denoiser is None:
            return None
        guided = w.end_pass(output)
        if self._latents is None:
            return guided
        pushed = self._latents.pushed(w, output if guided is None else guided)
        return guided if pushed is None else pushed

    def _time(self, w: ControlledDenoiser) -> None:
        """Fill in the length of the run and the timestep, once a run."""
        self._attach_scheduler()
        state = w.state
        if self._pipe is None:
            needy = [c for c in self.controls if c.needs_steps()]
            if state.steps is None and needy:
                raise ConfigError(
                    f"{needy[0].describe()} depends on the step, which a bare model call does not tell. Call "
                    "handle.set_step(i, n) before each call, or pass the pipeline to control()."
                )
            return
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None:
            return
        if state.steps is None:
            told = vars(self._pipe).get("_num_timesteps")
            state.steps = min(int(told), len(timesteps)) if told else len(timesteps)
        if any(isinstance(c, Guidance) and c.adaptive for c in self.controls):
            # img2img starts late in the list: the run is its tail.
            index = min(len(timesteps) - state.steps + state.step, len(timesteps) - 1)
            state.timestep = float(timesteps[index])

    def _heal(self, w: ControlledDenoiser) -> None:
        """Put links back where another tool has replaced a controlled processor."""
        for name, link in w.links.items():
            module: Any = link.site.module
            if vars(module.processor).get("_attnctl") is link:
                continue
            w.made.append(attach_processor(link.site, link))
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"attnctl: the processor of {name} was replaced while under control (IP-Adapter, fused projections "
                    "and set_attn_processor do that); the control was attached to the new one.",
                    stacklevel=2,
                )

    def _warn_bare(self, w: ControlledDenoiser, rows: Any) -> None:
        bare = self._pipe is None and self._layout == "auto" and rows.total % 2 == 0
        if bare and w.branches and "layout" not in self._warned:
            self._warned.add("layout")
            warnings.warn(
                f"attnctl: a bare model tells nothing of its {rows.total} rows; each is guided as a prompt row. "
                'Pass control(..., layout="uncond_first") if the first half is the negative prompt, or '
                'layout="cond" to confirm.',
                stacklevel=2,
            )


class _Hook:
    """Binds a handle and a denoiser to torch's hook signatures."""

    def __init__(self, handle: Handle | None, watched: ControlledDenoiser | None) -> None:
        self.handle, self.watched = handle, watched

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None, None)  # the copy of a denoiser is not under control

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.handle is None or self.watched is None:
            return None
        return self.handle._before(self.watched, args, kwargs)

    def after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.handle is None or self.watched is None:
            return None
        return self.handle._after(self.watched, output)


def control(
    pipe: Any, *controls: Control, backend: str = "auto", layout: Layout = "auto", replay: bool = True
) -> Handle:
    """Put controls on a diffusers pipeline, or on a bare denoiser, until `detach()` or the end of the with block.

    Args:
        pipe: A diffusers pipeline, or its denoiser; or an image backbone of timm, which takes a `Capture`.
        controls: What to do, in order.
        backend: Attention kernel by name ("sdpa", "xformers", "math"), or "auto" for the fastest that runs.
        layout: How the rows of a call are laid out, if attnctl cannot tell: "cond" (all rows carry the prompt),
            "uncond_first" (first half negative), "sequential" (a prompt call, then a negative call).
        replay: Let perturbed passes reuse the part of the base pass that is the same (exact; off for debugging).

    Returns:
        The handle, already attached.

    Raises:
        ConfigError: No control is given, or one of its fields is out of range.
        ConflictError: The denoiser is under control already.
        SiteError: A control selects sites that do not exist or that it cannot act on.
        UnsupportedModelError: The model cannot be controlled exactly; the message says why.

    Example:
        >>> from attnctl.processors import PAG
        >>> with control(pipe, PAG(scale=3.0)):  # doctest: +SKIP
        ...     image = pipe("an astronaut").images[0]
    """
    if is_backbone(pipe):
        from attnctl.backbones.look.capture import BackboneHandle  # here: it needs timm, and this module

        check_controls(controls)
        return BackboneHandle(pipe, controls).attach()
    return Handle(pipe, controls, backend=backend, layout=layout, replay=replay).attach()


def handle_of(pipe: Any) -> Handle | None:
    """Return the handle that controls a pipeline or denoiser, or None."""
    for module in denoisers_of(pipe).values():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, _Hook) and owner.handle is not None:
                return owner.handle
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


def _check_backend(backend: str, denoiser: torch.nn.Module) -> None:
    """Raise BackendError if a kernel asked for by name is unknown or cannot run where the denoiser is."""
    weight = next(denoiser.parameters())
    known = backends(weight.device.type, weight.dtype)
    if backend not in known:
        raise BackendError(f"backend={backend!r} is unknown. Choose auto or one of {', '.join(known)}.")
    if not known[backend].available:
        runs = ", ".join(name for name, b in known.items() if b.available)
        raise BackendError(f"backend={backend!r} cannot run here: {known[backend].reason}. These can: {runs}.")


def check_hookable(module: torch.nn.Module) -> None:
    """Raise unless hooks on a denoiser would run, and nobody else's controls are on it."""
    name = type(module).__name__
    if handle_of(module) is not None:
        raise ConflictError(
            f"This {name} is under control already: pass all controls to one control() call, or detach the other "
            "handle first (attnctl.handle_of(pipe).detach())."
        )
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        raise UnsupportedModelError(
            f"{name} is compiled as a whole, so hooks on it would not run. Compile its blocks instead "
            "(model.compile_repeated_blocks(fullgraph=True)), or attach before compiling."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{name} is a TorchScript module, whose attention cannot be reached. Load it as is."
        )
