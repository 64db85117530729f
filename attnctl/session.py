"""Putting controls on a pipeline and taking them off again without a trace.

`control` is the only place that touches a pipeline. What it installs, it records in one undo list: the class of each
selected processor, two native torch hooks on each denoiser and the class of the scheduler object. Hooks instead of a
replaced `forward`, because accelerate's offloading silently deletes the latter.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from attnctl.branches import (
    Branch,
    Checkpointing,
    Prefix,
    added,
    check_reached,
    combine,
    difference,
    main_output,
    overridden,
    own_context,
    scaled,
    with_main_output,
)
from attnctl.errors import ConfigError, ConflictError, UnsupportedModelError
from attnctl.families import Family, family_of
from attnctl.intercept import Link, Wrapper, attach_processor, detach_processor, release_processor
from attnctl.kernels import backends
from attnctl.layout import Layout, RowReader
from attnctl.processors.base import Control, Guidance
from attnctl.sites import Site, denoisers_of, find_sites
from attnctl.state import Rows, StepState, bind_call, take_rows
from attnctl.steps import unwatch_scheduler, watch_scheduler

__all__ = ["Handle", "attn_processors", "control", "handle_of"]


@dataclass
class _Memory:
    """The last c - p of one branch, kept for the steps that reuse it."""

    step: int
    delta: Any


@dataclass
class _Watched:
    """One denoiser under control."""

    module: torch.nn.Module
    family: Family
    sites: tuple[Site, ...]
    resolved: dict[int, tuple[Site, ...]]
    """Sites of each control, by the control's place in the list."""
    state: StepState = field(default_factory=StepState)
    links: dict[str, Link] = field(default_factory=dict)
    made: list[Any] = field(default_factory=list)
    """Every processor that was put under control, those that a host set aside included."""
    base: dict[str, list[tuple[Control, Wrapper]]] = field(default_factory=dict)
    branches: list[tuple[Guidance, Branch]] = field(default_factory=list)
    memory: dict[Any, _Memory] = field(default_factory=dict)
    pending: tuple[Any, float | None] | None = None
    """Delta of the prompt call, waiting for the negative call of a sequential pair."""
    weights: list[tuple[Guidance, Branch, float]] = field(default_factory=list)
    prefix: Prefix | None = None
    checkpointing: Checkpointing | None = None
    forwards: dict[torch.nn.Module, Any] = field(default_factory=dict)
    """Forwards that the current pass replaces."""
    passes: int = 0
    began: set[Any] = field(default_factory=set)
    """Branches that have run in this run."""

    def remember(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Note what the current pass does; the result does the same again, whenever it is entered."""
        wrappers = [(link, link.wrappers) for link in self.links.values()]
        state, forwards = dict(vars(self.state)), dict(self.forwards)

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            held = [(link, link.wrappers) for link, _ in wrappers]
            now = dict(vars(self.state))
            try:
                for link, value in wrappers:
                    link.wrappers = value
                vars(self.state).update(state)
                with overridden(forwards):
                    yield
            finally:
                vars(self.state).update(now)
                for link, value in held:
                    link.wrappers = value

        return again


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
        self._running = False
        self._undo = contextlib.ExitStack()
        self._attached = False
        self._pipe = None if isinstance(target, torch.nn.Module) else target
        self._scheduler: Any = None
        self._reader = RowReader(self._pipe, layout)
        self._layout = layout
        self._warned: set[str] = set()
        _check_controls(controls)
        if backend != "auto":
            _check_backend(backend)
        self._watched = [_resolve(m, self.controls, backend) for m in denoisers_of(target).values()]

    def attach(self) -> Handle:
        """Install the controls; undo everything if any part fails."""
        try:
            for watched in self._watched:
                self._attach_denoiser(watched)
            self._attach_scheduler()
            self._attached = True
        except BaseException:
            self._undo.close()
            raise
        return self

    def _attach_denoiser(self, watched: _Watched) -> None:
        self._undo.callback(self._release_made, watched)
        for link in watched.links.values():
            watched.made.append(attach_processor(link.site, link))
            self._undo.callback(self._release_processor, watched, link)
        pre = watched.module.register_forward_pre_hook(_Hook(self, watched).before, with_kwargs=True)
        self._undo.callback(pre.remove)
        post = watched.module.register_forward_hook(_Hook(self, watched).after, with_kwargs=True)
        self._undo.callback(post.remove)
        self._undo.callback(self._quiet, watched)

    def _attach_scheduler(self) -> None:
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is None or scheduler is self._scheduler:
            return
        held, self._scheduler = self._scheduler, scheduler
        watch_scheduler(scheduler, self)
        if held is None:
            self._undo.callback(lambda: unwatch_scheduler(self._scheduler))
        else:  # the user gave the pipeline another scheduler, whose set_timesteps nobody has heard
            unwatch_scheduler(held)
            self.on_set_timesteps()

    def _release_processor(self, watched: _Watched, link: Link) -> None:
        if not detach_processor(link.site, link):
            warnings.warn(
                f"attnctl: the processor of {link.site.name} was replaced after control() attached; it is left as it "
                "is.",
                stacklevel=4,
            )

    def _release_made(self, watched: _Watched) -> None:
        for processor in watched.made:  # a model that fused its projections keeps the old ones for later
            release_processor(processor)
        watched.made.clear()

    def detach(self) -> None:
        """Take the controls off: processors, hooks and scheduler are as before. Detaching twice does nothing."""
        self._attached = False
        self._undo.close()

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

    def set_step(self, step: int, steps: int, timestep: float | None = None) -> None:
        """Tell the step of a hand-written loop: step i of n, and the timestep (1000 = noise) where weights adapt."""
        if not 0 <= step < steps:
            raise ConfigError(f"set_step({step}, {steps}): the step must lie in 0 to {steps - 1}.")
        for w in self._watched:
            w.state.step, w.state.steps, w.state.timestep = step, steps, timestep
            if step == 0:
                w.memory.clear()
                w.began.clear()
            w.pending = None
        self._reader.calls = 0

    def report(self) -> str:
        """Say in words what is attached where, from which publication, and how it runs."""
        from attnctl.report import report

        return report(self)

    # What the scheduler reports ------------------------------------------------------------------------------

    def on_set_timesteps(self) -> None:
        """Begin a run."""
        self._reader.new_run()
        for w in self._watched:
            w.state.step, w.state.steps = 0, None
            w.memory.clear()
            w.began.clear()
            w.pending = None

    def on_scale(self, sample: torch.Tensor) -> None:
        """Note the latents that the pipeline scales."""
        self._reader.scaled(sample)

    def on_step(self, sample: Any) -> None:
        """End a step."""
        if self._attached and self.enabled:
            self._reader.check_step(sample)
        for w in self._watched:
            w.state.step += 1
            w.pending = None

    # What the denoiser's hooks do ----------------------------------------------------------------------------

    def _before(self, w: _Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._quiet(w)
        if not self._enabled or self._running:
            return
        self._heal(w)
        bound = bind_call(w.module, args, kwargs)
        w.state.begin_call(w.module, w.family, bound)
        self._time(w)
        rows = self._reader.read(bound, w.family.cond_first)
        w.state.rows = rows
        if rows.role == "extra":
            return
        if torch.is_grad_enabled() and getattr(w.module, "is_gradient_checkpointing", False):
            w.checkpointing = Checkpointing(w.module, w.remember)
        self._warn_bare(w, rows)
        for name, wrappers in w.base.items():
            active = tuple(wrap for c, wrap in wrappers if c.in_window(w.state))
            w.links[name].wrappers = active or None
            w.links[name].reached = False
        if rows.role == "uncond":
            return
        w.weights = [(g, b, g.weight(w.state)) for g, b in w.branches]
        due = [(g, b) for g, b, weight in w.weights if weight != 0 and self._due(w, g, b)]
        if due and self._replay and Prefix.refusal(w.module) is None:
            targets = {m for _, b in due for m in b.targets}
            if w.prefix is None or w.prefix.targets != targets:
                w.prefix = Prefix(w.module, targets)
            w.prefix.watch()
        elif w.prefix is not None:
            w.prefix.release()

    def _after(self, w: _Watched, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._enabled or self._running or w.state.denoiser is None:
            return None
        controlled = [(link.site, link.reached) for link in w.links.values() if link.wrappers is not None]
        if w.prefix is not None:
            w.prefix.unwatch()
        try:
            check_reached(controlled, w.state, "the base pass")
            return self._guide(w, output)
        finally:
            self._quiet(w)
            w.state.end_call()
            if w.prefix is not None:
                w.prefix.release()

    def _guide(self, w: _Watched, output: Any) -> Any:
        """Add the guidance of all branches to a prediction; None where there is none."""
        rows = w.state.rows
        if rows.role == "extra":
            return None
        if rows.role == "uncond":
            if w.pending is None:
                return None
            delta, safe = w.pending
            w.pending = None
            return with_main_output(output, combine(main_output(output), delta, rows, safe))
        if not any(weight for _, _, weight in w.weights):
            return None
        pred = main_output(output)
        c = pred[rows.cond]
        total: Any = None
        ran: dict[Any, Any] = {}
        for g, branch, weight in w.weights:
            if weight == 0:
                continue
            if branch.key in ran:  # two controls that perturb alike share the pass
                unit = ran[branch.key]
            elif self._due(w, g, branch):
                unit = difference(c, self._perturbed(w, branch))
                if g.every > 1:
                    w.memory[branch.key] = _Memory(w.state.step, unit)
            else:
                unit = w.memory[branch.key].delta
            ran[branch.key] = unit
            total = added(total, scaled(unit, weight))
        safe = self._rescale_safe(w)
        if rows.role == "all" and self._pipe is not None:
            w.pending = (total, safe)
        if rows.role == "all" and safe is not None:
            return None  # the whole share goes to the negative call
        return with_main_output(output, combine(pred, total, rows, safe))

    def _perturbed(self, w: _Watched, branch: Branch) -> Any:
        """Run one perturbed pass on the prompt rows and return its prediction."""
        state, rows = w.state, w.state.rows
        frames = state.grid[0] if rows.role == "both" and state.grid else 1
        kwargs = take_rows(state.bound, rows.cond, rows.total, frames)
        touched = {s.name: s for s in branch.sites}
        base = {name: link.wrappers for name, link in w.links.items()}
        held = dict(vars(state))
        forwards: dict[torch.nn.Module, Any] = {}
        if w.prefix is not None:
            forwards.update(w.prefix.stubs(rows, frames))
        for module, make in branch.blocks.items():
            forwards[module] = make(module, module.forward)
        self._running = True
        w.forwards = forwards
        state.begin_call(w.module, w.family, kwargs)
        state.phase, state.rows = str(branch.key), Rows.all(rows.prompts)
        try:
            for name, link in w.links.items():
                if name in touched and branch.perturb is not None:
                    link.wrappers = (branch.perturb, *(base[name] or ()))
                link.reached = False
            own = [b.key for _, b in w.branches].index(branch.key)
            with own_context(w.module, f"attnctl_{own}") as cached, overridden(forwards):
                output = w.module.forward(**kwargs)
            reached = [(w.links[n].site, w.links[n].reached) for n in touched]
            # A cache of the perturbed pass's own may answer for blocks that an earlier perturbed pass has run.
            if not (cached and branch.key in w.began):
                check_reached(reached, state, "the perturbed pass")
            w.began.add(branch.key)
        finally:
            self._running = False
            w.forwards = {}
            vars(state).update(held)
            for name, link in w.links.items():
                link.wrappers = base[name]
        w.passes += 1
        return main_output(output)

    def _due(self, w: _Watched, g: Guidance, branch: Branch) -> bool:
        """Tell whether a branch must be computed on this step."""
        memory = w.memory.get(branch.key)
        if g.every == 1 or memory is None or w.state.step - memory.step >= g.every:
            return True
        delta = memory.delta
        return isinstance(delta, torch.Tensor) and delta.shape[0] != w.state.rows.prompts

    def _rescale_safe(self, w: _Watched) -> float | None:
        """Return the CFG scale if guidance must leave the prompt rows alone, else None."""
        modes = {g.combine for g, _, weight in w.weights if weight != 0}
        explicit = modes - {"auto"}
        if len(explicit) > 1:
            raise ConfigError(f"Controls ask for different ways to combine: {sorted(explicit)}. Use one.")
        cfg = w.state.rows.role == "both" or getattr(self._pipe, "do_classifier_free_guidance", False) is True
        rescale = getattr(self._pipe, "guidance_rescale", 0.0) or 0.0
        wanted = explicit == {"rescale_safe"} or (not explicit and rescale > 0 and cfg)
        if not wanted:
            return None
        if not cfg:
            raise ConfigError('combine="rescale_safe" needs classifier-free guidance; this run has no negative prompt.')
        scale = getattr(self._pipe, "guidance_scale", None)
        if not isinstance(scale, (int, float)):
            raise ConfigError(
                f'combine="rescale_safe" needs the CFG scale, which {type(self._pipe).__name__} does not tell. '
                'Use combine="add".'
            )
        if scale == 1:
            raise ConfigError('combine="rescale_safe" cannot divide by guidance_scale - 1 = 0. Use combine="add".')
        return float(scale)

    def _time(self, w: _Watched) -> None:
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

    def _heal(self, w: _Watched) -> None:
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

    def _warn_bare(self, w: _Watched, rows: Any) -> None:
        bare = self._pipe is None and self._layout == "auto" and rows.total % 2 == 0
        if bare and w.branches and "layout" not in self._warned:
            self._warned.add("layout")
            warnings.warn(
                f"attnctl: a bare model tells nothing of its {rows.total} rows; each is guided as a prompt row. "
                'Pass control(..., layout="uncond_first") if the first half is the negative prompt, or '
                'layout="cond" to confirm.',
                stacklevel=2,
            )

    def _quiet(self, w: _Watched) -> None:
        """Leave every link inactive and no watcher on any module."""
        if self._running:
            return
        for link in w.links.values():
            link.wrappers = None
        if w.prefix is not None:
            w.prefix.release()
        if w.checkpointing is not None:
            w.checkpointing.release()
            w.checkpointing = None
        w.weights = []


class _Hook:
    """Binds a handle and a denoiser to torch's hook signatures."""

    def __init__(self, handle: Handle | None, watched: _Watched | None) -> None:
        self.handle, self.watched = handle, watched

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None, None)  # the copy of a denoiser is not under control

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.handle is not None and self.watched is not None:
            self.handle._before(self.watched, args, kwargs)

    def after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.handle is None or self.watched is None:
            return None
        return self.handle._after(self.watched, args, kwargs, output)


def control(
    pipe: Any, *controls: Control, backend: str = "auto", layout: Layout = "auto", replay: bool = True
) -> Handle:
    """Put controls on a diffusers pipeline, or on a bare denoiser, until `detach()` or the end of the with block.

    Args:
        pipe: A diffusers pipeline, or its denoiser.
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
    return Handle(pipe, controls, backend=backend, layout=layout, replay=replay).attach()


def handle_of(pipe: Any) -> Handle | None:
    """Return the handle that controls a pipeline or denoiser, or None."""
    for module in denoisers_of(pipe).values():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, _Hook) and owner.handle is not None:
                return owner.handle
    return None


def attn_processors(model: torch.nn.Module, *controls: Control) -> dict[str, Any]:
    """Make processors for `model.set_attn_processor`, diffusers' own plug point.

    The model that carries them computes what the controls do to attention at every call and for every row: with PAG it
    is the perturbed model p, to be combined with the plain prediction in a loop of your own. Sites that no control
    selects keep their processor. `control()` does the guidance, the extra pass and the switching by itself.

    Raises:
        SiteError: A control selects sites that do not exist or that it cannot act on.
    """
    _check_controls(controls)
    watched = _resolve(model, controls, "auto")
    made: dict[str, Any] = {}
    watched.state.family, watched.state.denoiser = watched.family, model
    for site in watched.sites:
        module: Any = site.module
        name = f"{site.name}.processor"
        link = watched.links.get(site.name)
        if link is None:
            made[name] = module.processor
            continue
        original = module.processor
        if isinstance(original, torch.nn.Module):
            raise UnsupportedModelError(
                f"{site.name} holds {type(original).__name__}, whose weights live in the model: a processor for it "
                "cannot be handed out. Use attnctl.control(model, ...)."
            )
        link.fixed = True
        made[name] = attach_processor(site, link)
        module.processor = original
        wrappers = [wrap for _, wrap in watched.base.get(site.name, [])]
        for _, branch in watched.branches:
            if branch.perturb is not None and site in branch.sites:
                wrappers.insert(0, branch.perturb)
        link.wrappers = tuple(wrappers) or None
    return made


def _check_controls(controls: Sequence[Any]) -> None:
    if not controls:
        raise ConfigError("control() was given no control. Pass one, for example attnctl.processors.PAG(scale=3.0).")
    for c in controls:
        if not isinstance(c, Control):
            raise ConfigError(
                f"{c!r} is not a control. Pass instances from attnctl.processors, for example PAG(scale=3.0)."
            )


def _check_backend(backend: str) -> None:
    from attnctl.errors import BackendError

    known = backends()
    names = list(known) if isinstance(known, dict) else [b.name for b in known]
    if backend not in names:
        raise BackendError(f"backend={backend!r} is unknown. Choose auto or one of {', '.join(names)}.")


def _resolve(module: torch.nn.Module, controls: Sequence[Control], backend: str) -> _Watched:
    """Find out everything about a denoiser before anything is touched."""
    _check_hookable(module)
    family = family_of(module)
    sites = find_sites(module)
    watched = _Watched(module, family, sites, {i: c.resolve(sites, family) for i, c in enumerate(controls)})
    for i, c in enumerate(controls):
        for site in watched.resolved[i]:
            watched.links.setdefault(site.name, Link(site, watched.state, backend))
        wrap = c.wrapper(watched.resolved[i])
        if wrap is not None:
            for site in watched.resolved[i]:
                watched.base.setdefault(site.name, []).append((c, wrap))
        if isinstance(c, Guidance):
            watched.branches.append((c, c.branch(watched.resolved[i], module)))
    return watched


def _check_hookable(module: torch.nn.Module) -> None:
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
