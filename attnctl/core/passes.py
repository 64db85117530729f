"""One denoiser under control: what acts in its passes, and the guidance that its predictions receive.

The session's hooks call `begin_pass` before and `end_pass` after the denoiser's own forward. Between them the base pass
runs with the wrappers of the controls that act on it; after it, each guidance branch runs its perturbed pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnctl.core.call import CallState, Rows, Wrapper
from attnctl.core.conflicts import check_conflicts
from attnctl.core.control import Control, Guidance
from attnctl.core.guidance import Branch, added, check_reached, combine, difference, overridden, scaled
from attnctl.core.hosts.arguments import row_count, take_rows
from attnctl.core.hosts.caches import check_rows_kept, own_context
from attnctl.core.hosts.checkpointing import Checkpointing
from attnctl.core.hosts.families import Family, family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.hosts.outputs import main_output, with_main_output
from attnctl.core.intercept import SiteHook
from attnctl.core.live import LiveControl
from attnctl.core.replay import Prefix
from attnctl.core.sites import Site
from attnctl.errors import ConfigError

__all__ = ["ControlledDenoiser", "resolve"]


@dataclass
class _Memory:
    """The last c - p of one branch, kept for the steps that reuse it."""

    step: int
    delta: Any


@dataclass
class ControlledDenoiser:
    """One denoiser under control."""

    module: torch.nn.Module
    family: Family
    sites: tuple[Site, ...]
    resolved: dict[int, tuple[Site, ...]]
    """Sites of each control, by the control's place in the list."""
    pipe: Any = None
    running: bool = False
    """Whether a perturbed pass is under way, whose own hooks must do nothing."""
    state: CallState = field(default_factory=CallState)
    links: dict[str, SiteHook] = field(default_factory=dict)
    made: list[Any] = field(default_factory=list)
    """Every processor that was put under control, those that a host set aside included."""
    base: dict[str, list[tuple[Control, Wrapper]]] = field(default_factory=dict)
    attached: list[tuple[Control, LiveControl]] = field(default_factory=list)
    """Controls that keep something of their own while they are attached."""
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
    listeners: list[tuple[Control, torch.nn.Module, SiteHook]] = field(default_factory=list)
    """Blocks whose input a control wants to see, with the link that it goes to."""
    listening: list[Any] = field(default_factory=list)
    """Handles of the hooks that the current call put on them."""
    began: set[Any] = field(default_factory=set)
    """Branches that have run in this run."""

    def snapshot(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
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

    def begin_run(self) -> None:
        """Forget what earlier steps left for later ones."""
        self.memory.clear()
        self.began.clear()
        self.pending = None
        for _, own in self.attached:
            own.begin_run()

    def begin_pass(self, replay: bool) -> None:
        """Switch on what acts in the base pass of the call that `state` describes, and watch what can be replayed."""
        if torch.is_grad_enabled() and getattr(self.module, "is_gradient_checkpointing", False):
            self.checkpointing = Checkpointing(self.module, self.snapshot)
        for c, own in self.attached:
            if c.in_window(self.state):
                own.before(self)
        for name, wrappers in self.base.items():
            active = tuple(wrap for c, wrap in wrappers if c.in_window(self.state))
            self.links[name].wrappers = active or None
            self.links[name].reached = False
            if active:
                check_rows_kept(self.module)
        for c, block, link in self.listeners:
            if c.in_window(self.state):
                self.listening.append(block.register_forward_pre_hook(_listen(link), with_kwargs=True))
        if self.state.rows.role == "uncond":
            return
        self.weights = [(g, b, g.weight(self.state)) for g, b in self.branches]
        due = [b for g, b, weight in self.weights if weight != 0 and self.due(g, b)]
        if due and replay and Prefix.refusal(self.module) is None:
            targets = {m for b in due for m in b.targets}
            if self.prefix is None or self.prefix.targets != targets:
                self.prefix = Prefix(self.module, targets)
            self.prefix.watch()
        elif self.prefix is not None:
            self.prefix.release()

    def end_pass(self, output: Any) -> Any:
        """Guide the prediction of a base pass; return None to leave it as it is."""
        controlled = [(link.site.name, link.reached) for link in self.links.values() if link.wrappers is not None]
        if self.prefix is not None:
            self.prefix.unwatch()
        try:
            check_reached(controlled, self.state, "the base pass")
            return self.guide(output)
        finally:
            self.stop()
            self.state.end_call()

    def guide(self, output: Any) -> Any:
        """Add the guidance of all branches to a prediction; None where there is none."""
        rows = self.state.rows
        if rows.role == "extra":
            return None
        if rows.role == "uncond":
            if self.pending is None:
                return None
            delta, safe = self.pending
            self.pending = None
            return with_main_output(output, combine(main_output(output), delta, rows, safe))
        if not any(weight for _, _, weight in self.weights):
            return None
        pred = main_output(output)
        c = pred[rows.cond]
        total: Any = None
        ran: dict[Any, Any] = {}
        for g, branch, weight in self.weights:
            if weight == 0:
                continue
            if branch.key in ran:  # two controls that perturb alike share the pass
                unit = ran[branch.key]
            elif self.due(g, branch):
                unit = difference(c, self.perturbed(branch))
                if g.every > 1:
                    self.memory[branch.key] = _Memory(self.state.step, unit)
            else:
                unit = self.memory[branch.key].delta
            ran[branch.key] = unit
            total = added(total, scaled(unit, weight))
        safe = self.rescale_safe()
        if rows.role == "all" and self.pipe is not None:
            self.pending = (total, safe)
        if rows.role == "all" and safe is not None:
            return None  # the whole share goes to the negative call
        return with_main_output(output, combine(pred, total, rows, safe))

    def perturbed(self, branch: Branch) -> Any:
        """Run one perturbed pass on the prompt rows and return its prediction."""
        state, rows = self.state, self.state.rows
        frames = state.grid[0] if rows.role == "both" and state.grid else 1
        kwargs = take_rows(state.bound, rows.cond, rows.total, frames)
        touched = {s.name: s for s in branch.sites}
        base = {name: link.wrappers for name, link in self.links.items()}
        held = dict(vars(state))
        forwards: dict[torch.nn.Module, Any] = {}
        replaced: set[torch.nn.Module] = set()
        if branch.begin is not None:
            branch.begin(state)
        if self.prefix is not None:
            forwards.update(self.prefix.stubs(rows, frames))
        for module, make in branch.blocks.items():
            forwards[module] = _noting(make(module, module.forward), module, replaced)
        self.running = True
        self.forwards = forwards
        state.begin_call(self.module, self.family, kwargs)
        state.phase, state.rows = str(branch.key), Rows.all(rows.prompts)
        try:
            for name, link in self.links.items():
                if name in touched and branch.perturb is not None:
                    link.wrappers = (branch.perturb, *(base[name] or ()))
                link.reached = False
            own = [b.key for _, b in self.branches].index(branch.key)
            with own_context(self.module, f"attnctl_{own}") as cached, overridden(forwards):
                output = self.module.forward(**kwargs)
            reached = [(self.links[n].site.name, self.links[n].reached) for n in touched]
            reached += [(name, module in replaced) for module, name in self.names(branch).items()]
            # A cache of the perturbed pass's own may answer for blocks that an earlier perturbed pass has run.
            if not (cached and branch.key in self.began):
                check_reached(reached, state, "the perturbed pass")
            self.began.add(branch.key)
        finally:
            self.running = False
            self.forwards = {}
            vars(state).update(held)
            for name, link in self.links.items():
                link.wrappers = base[name]
        self.passes += 1
        return main_output(output)

    def extra_pass(
        self, phase: str, kwargs: dict[str, Any], wrappers: Mapping[str, Wrapper], last: Site | None = None
    ) -> Any:
        """Run the denoiser with other inputs and wrappers: see `core.control.LiveDenoiser`."""
        state, held = self.state, dict(vars(self.state))
        links = {name: link.wrappers for name, link in self.links.items()}
        token, handle = object(), None
        self.running = True
        state.begin_call(self.module, self.family, kwargs)
        state.phase, state.rows = phase, Rows.all(row_count(kwargs))
        try:
            for name, link in self.links.items():
                link.wrappers = (wrappers[name],) if name in wrappers else None
                link.reached = False
            if last is not None and last.module is not None and Prefix.refusal(self.module) is None:
                handle = last.module.register_forward_hook(_ending(token))
            with own_context(self.module, f"attnctl_{phase}"), _cut_short(token) as cut:
                cut.output = main_output(self.module.forward(**kwargs))
            check_reached([(n, self.links[n].reached) for n in wrappers], state, f"the {phase} pass")
        finally:
            if handle is not None:
                handle.remove()
            self.running = False
            vars(state).update(held)
            for name, link in self.links.items():
                link.wrappers = links[name]
        return None if last is not None else cut.output

    @contextlib.contextmanager
    def beside(self, wrappers: Mapping[str, Wrapper]) -> Iterator[None]:
        """Let modules run beside the pass that is under way: see `core.control.LiveDenoiser`."""
        links = {name: link.wrappers for name, link in self.links.items()}
        pause = contextlib.nullcontext() if self.prefix is None else self.prefix.paused()
        try:
            for name, link in self.links.items():
                link.wrappers = (wrappers[name],) if name in wrappers else None
            with pause:
                yield
        finally:
            for name, link in self.links.items():
                link.wrappers = links[name]

    def names(self, branch: Branch) -> dict[torch.nn.Module, str]:
        """Name the blocks whose forward a branch replaces."""
        if not branch.blocks:
            return {}
        return {m: n for n, m in self.module.named_modules() if m in branch.blocks}

    def due(self, g: Guidance, branch: Branch) -> bool:
        """Tell whether a branch must be computed on this step."""
        memory = self.memory.get(branch.key)
        if g.every == 1 or memory is None or self.state.step - memory.step >= g.every:
            return True
        delta = memory.delta
        return isinstance(delta, torch.Tensor) and delta.shape[0] != self.state.rows.prompts

    def rescale_safe(self) -> float | None:
        """Return the CFG scale if guidance must leave the prompt rows alone, else None."""
        modes = {g.combine for g, _, weight in self.weights if weight != 0}
        explicit = modes - {"auto"}
        if len(explicit) > 1:
            raise ConfigError(f"Controls ask for different ways to combine: {sorted(explicit)}. Use one.")
        cfg = self.state.rows.role == "both" or getattr(self.pipe, "do_classifier_free_guidance", False) is True
        rescale = getattr(self.pipe, "guidance_rescale", 0.0) or 0.0
        wanted = explicit == {"rescale_safe"} or (not explicit and rescale > 0 and cfg)
        if not wanted:
            return None
        if not cfg:
            raise ConfigError(
                'combine="rescale_safe" needs classifier-free guidance that the pipeline tells of; this run has no '
                f'negative prompt, or {type(self.pipe).__name__} does not say so. Use combine="add".'
            )
        scale = getattr(self.pipe, "guidance_scale", None)
        if self.module is getattr(self.pipe, "transformer_2", None):  # Wan 2.2 may guide its second half otherwise
            second = getattr(self.pipe, "_guidance_scale_2", None)
            scale = scale if second is None else second
        if not isinstance(scale, (int, float)):
            raise ConfigError(
                f'combine="rescale_safe" needs the CFG scale, which {type(self.pipe).__name__} does not tell. '
                'Use combine="add".'
            )
        scale = scale + 1 if self.family.from_prompt else scale
        if scale == 1:
            raise ConfigError('combine="rescale_safe" cannot divide by guidance_scale - 1 = 0. Use combine="add".')
        return float(scale)

    def stop(self) -> None:
        """Leave every link inactive and no watcher on any module."""
        if self.running:
            return
        for link in self.links.values():
            link.wrappers, link.block_call = None, None
        for handle in self.listening:
            handle.remove()
        self.listening = []
        self.state.scratch = {}
        if self.prefix is not None:
            self.prefix.release()
        if self.checkpointing is not None:
            self.checkpointing.release()
            self.checkpointing = None
        self.weights = []


class _Ended(Exception):
    """Ends a pass whose prediction nobody needs."""


class _Cut:
    output: Any = None


@contextlib.contextmanager
def _cut_short(token: object) -> Iterator[_Cut]:
    try:
        yield _Cut()
    except _Ended as end:
        if end.args[0] is not token:
            raise


def _ending(token: object) -> Callable[..., None]:
    def end(module: torch.nn.Module, args: Any, output: Any) -> None:
        raise _Ended(token)

    return end


def _noting(forward: Callable[..., Any], module: torch.nn.Module, seen: set[torch.nn.Module]) -> Callable[..., Any]:
    """Note that a replaced forward was called."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.add(module)
        return forward(*args, **kwargs)

    return noted


def _listen(link: SiteHook) -> Callable[..., None]:
    """Make a hook that hands a block's arguments to the link of an attention inside it."""

    def seen(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        link.block_call = args, kwargs

    return seen


def resolve(
    module: torch.nn.Module, controls: Sequence[Control], backend: str = "auto", pipe: Any = None
) -> ControlledDenoiser:
    """Find out everything about a denoiser before anything is touched."""
    family = family_of(module)
    sites = find_sites(module)
    resolved = {i: c.resolve(sites, family) for i, c in enumerate(controls)}
    check_conflicts(controls, resolved)
    watched = ControlledDenoiser(module, family, sites, resolved, pipe)
    for i, c in enumerate(controls):
        for site in watched.resolved[i]:
            link = watched.links.setdefault(site.name, SiteHook(site, watched.state, backend))
            if c.wants_block_input():
                watched.listeners.append((c, module.get_submodule(site.name.rpartition(".")[0]), link))
        own = c.attached(watched.resolved[i], module, pipe)
        if own is not None:
            watched.attached.append((c, own))
        wrap = c.wrapper(watched.resolved[i]) if own is None else own.wrap
        if wrap is not None:
            for site in watched.resolved[i]:
                around = watched.base.setdefault(site.name, [])
                # An observer sees what the model asks for, before controls cut or rewrite it, wherever it is given.
                around.insert(0 if own is not None and own.observes else len(around), (c, wrap))
        if isinstance(c, Guidance):
            watched.branches.append((c, c.branch(watched.resolved[i], module)))
    return watched
