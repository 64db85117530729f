"""One denoiser under control: what acts in its passes, and the guidance that its predictions receive.

One call of the denoiser, in order; the handle's hooks call `begin_pass` before and `end_pass` after its own forward:

    begin_pass   live controls prepare the call, and may change its arguments
                 wrappers of the controls in their window are put on their sites, prefix replay begins to watch
    forward      the base pass: the host's own code, its attention through the wrappers
    end_pass     for each guidance branch that is due, the perturbed pass gives p; w (c - p) is added
                 live controls may change the output; wrappers and watchers come off

Whatever runs the denoiser or its blocks once more does so inside `during`, which puts everything back afterwards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnctl.core.call import CallState, SiteHook, Wrapper
from attnctl.core.conflicts import check_conflicts
from attnctl.core.control import Control, Guidance
from attnctl.core.guidance import Branch
from attnctl.core.hosts.arguments import Rows, as_given, own_containers, row_count, shared_like_rows, take_rows
from attnctl.core.hosts.caches import check_reached, check_rows_kept, own_context, replay_refusal
from attnctl.core.hosts.checkpointing import Checkpointing
from attnctl.core.hosts.families import Family, family_of
from attnctl.core.hosts.kinds import chosen_sites
from attnctl.core.hosts.latents import StepLatents
from attnctl.core.hosts.listing import sites_of
from attnctl.core.hosts.modules import named_below, overridden
from attnctl.core.hosts.outputs import fitted, main_output, with_main_output
from attnctl.core.hosts.pipelines import safe_scale
from attnctl.core.hosts.predictions import combine, difference, with_share
from attnctl.core.hosts.processors import Processors
from attnctl.core.live import LiveControl, PassEnded
from attnctl.core.replay import Prefix
from attnctl.core.sites import Site

__all__ = ["PENDING", "ControlledDenoiser", "resolve"]

PENDING = "pending"


@dataclass
class ControlledDenoiser:
    """One denoiser under control."""

    module: torch.nn.Module
    family: Family
    sites: tuple[Site, ...]
    resolved: dict[int, tuple[Site, ...]]
    """Sites of each control, by the control's place in the list."""
    pipe: Any = None
    latents: StepLatents = field(default_factory=lambda: StepLatents(None))
    """The latents of the current step, shared by the denoisers of a pipeline."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """What live controls keep for the run, shared by the denoisers of a pipeline. Under `PENDING` the delta of a prompt
    call waits for the negative call of the pair, which another denoiser may run."""
    positional: int = 0
    """How many arguments of the current call were given by position."""
    running: bool = False
    """Whether a further pass is under way, whose own hooks must do nothing."""
    state: CallState = field(default_factory=CallState)
    links: dict[str, SiteHook] = field(default_factory=dict)
    base: dict[str, list[tuple[Control, Wrapper]]] = field(default_factory=dict)
    parts: list[tuple[Control, tuple[Site, ...], LiveControl | None]] = field(default_factory=list)
    """Each control with its sites, and what it keeps."""
    live: list[tuple[Control, LiveControl]] = field(default_factory=list)
    """Controls that keep something of their own while they are attached."""
    branches: list[tuple[Guidance, Branch]] = field(default_factory=list)
    memory: dict[Any, tuple[int, Any]] = field(default_factory=dict)
    """Step and value of the last c - p of each branch that later steps reuse, by the branch's key."""
    weights: list[tuple[Guidance, Branch, float]] = field(default_factory=list)
    prefix: Prefix | None = None
    forwards: dict[torch.nn.Module, Any] = field(default_factory=dict)
    """Forwards that the current pass replaces."""
    passes: int = 0
    listeners: list[tuple[Control, torch.nn.Module, SiteHook]] = field(default_factory=list)
    """Blocks whose input a control wants to see, with the link that it goes to."""
    listening: list[Any] = field(default_factory=list)
    """Handles of what the current call has put on the model, removed when it is over."""
    began: set[Any] = field(default_factory=set)
    """Branches that have run in this run."""
    processors: Processors = field(init=False)
    """The processors of the controlled sites."""

    def make_wrappers(self) -> None:
        """Collect what wraps the kernel at each site in the base pass."""
        self.base.clear()
        for c, sites, live in self.parts:
            wrap = c.wrapper(sites) if live is None else live.wrap
            if live is not None and type(live).wrap is LiveControl.wrap:
                wrap = None  # it has nothing to do at its sites in the base pass, which stay the host's own
            if wrap is None:
                continue
            for site in sites:
                around = self.base.setdefault(site.name, [])
                # An observer sees what the model asks for, before controls cut or rewrite it, wherever it is given.
                around.insert(0 if live is not None and live.observes else len(around), (c, wrap))

    def begin_run(self) -> None:
        """Forget what earlier steps left for later ones."""
        self.memory.clear()
        self.began.clear()
        for _, live in self.live:
            live.begin_run()

    # The base pass --------------------------------------------------------------------------------------------

    def begin_pass(self, replay: bool) -> dict[str, Any] | None:
        """Prepare the base pass of the call that `state` describes; return changed arguments for it, or None."""
        changed = self._prepare() if self.live else None
        if self.state.rows.role == "extra":  # the pipeline's own guidance: nothing acts in it
            return changed
        if torch.is_grad_enabled() and getattr(self.module, "is_gradient_checkpointing", False):
            self.listening.append(Checkpointing(self.module, self.snapshot))
        for name, wrappers in self.base.items():
            link = self.links[name]
            link.wrappers = tuple(wrap for c, wrap in wrappers if c.in_window(self.state)) or None
            link.reached = False
        if any(self.links[name].wrappers for name in self.base):
            check_rows_kept(self.module)
        for c, block, link in self.listeners:
            if c.in_window(self.state):
                self.listening.append(block.register_forward_pre_hook(link.hear, with_kwargs=True))
        if self.branches and self.state.rows.role != "uncond":  # guidance is computed from the prompt's rows alone
            self.weights = [(g, b, g.weight(self.state)) for g, b in self.branches]
            self._watch_prefix(replay)
        return changed

    def _prepare(self) -> dict[str, Any] | None:
        """Let live controls prepare the call, each with the arguments that the one before has made of it."""
        changed = None
        for c, live in self.live:
            if not c.in_window(self.state):
                continue
            kwargs = live.before_call(self)
            if kwargs is not None:
                changed, rows = kwargs, self.state.rows
                self.state.begin_call(self.module, self.family, own_containers(kwargs))
                self.state.rows = rows
        return changed

    def _watch_prefix(self, replay: bool) -> None:
        """Have the base pass keep what the perturbed passes of this call need not compute again."""
        due = [b for g, b, weight in self.weights if weight != 0 and self.due(g, b)]
        if due and replay and replay_refusal(self.module) is None and not shared_like_rows(self.state):
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
            check_reached(controlled, self.state.step, "the base pass")
            guided = self.guide(output)
            for c, live in self.live:
                if c.in_window(self.state):
                    changed = live.after_call(output if guided is None else guided)
                    guided = guided if changed is None else changed
            return guided
        finally:
            self.stop()
            self.state.end_call()

    def guide(self, output: Any) -> Any:
        """Add the guidance of all branches to a prediction; None where there is none."""
        rows = self.state.rows
        if rows.role == "extra":
            return None
        guided = any(weight for _, _, weight in self.weights)
        total = self._total(main_output(output)[rows.cond]) if guided else None
        for c, live in self.live:
            if c.in_window(self.state) and (summed := live.predicted(self, output, total)) is not None:
                return summed
        if rows.role == "uncond":  # the second call of a pair receives what the first has computed
            if PENDING not in self.shared:
                return None
            delta, safe = self.shared.pop(PENDING)
            pred = main_output(output)
            return with_main_output(output, combine(pred, fitted(delta, pred), rows, safe))
        if not guided:
            return None
        pred = main_output(output)
        safe = safe_scale({g.combine for g, _, weight in self.weights if weight != 0}, self.pipe, self.state)
        if rows.role == "all" and self.pipe is not None:
            self.shared[PENDING] = (total, safe)
            if safe is not None:
                return None  # the whole share goes to the negative call
        return with_main_output(output, combine(pred, total, rows, safe))

    def _total(self, c: Any) -> Any:
        """Sum up w (c - p) over the branches; those that perturb in the same way share one pass."""
        total: Any = None
        units: dict[Any, Any] = {}
        for g, branch, weight in self.weights:
            if weight == 0:
                continue
            if branch.key not in units:
                if self.due(g, branch):
                    units[branch.key] = difference(c, self.perturbed(branch))
                    if g.every > 1:
                        self.memory[branch.key] = self.state.step, units[branch.key]
                else:
                    units[branch.key] = self.memory[branch.key][1]
            total = with_share(total, units[branch.key], weight)
        return total

    def due(self, g: Guidance, branch: Branch) -> bool:
        """Tell whether a branch must be computed on this step."""
        step, delta = self.memory.get(branch.key, (None, None))
        if g.every == 1 or step is None or self.state.step - step >= g.every:
            return True
        return isinstance(delta, torch.Tensor) and delta.shape[0] != self.state.rows.prompts

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
        self.weights = []

    # Further passes -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def during(self, *, own: bool = True) -> Iterator[None]:
        """Let something else run; put state, wrappers, forwards, flags and prefix back, whatever happens in it.

        Args:
            own: Whether the sites that it reaches are its own, and not those of the pass that is under way.
        """
        state, running, forwards = dict(vars(self.state)), self.running, self.forwards
        links = [(link, link.wrappers, link.reached) for link in self.links.values()]
        prefix, paused = self.prefix, self.prefix is not None and self.prefix.paused
        try:
            if prefix is not None:
                prefix.paused = True
            yield
        finally:
            if prefix is not None:
                prefix.paused = paused
            vars(self.state).update(state)
            self.running, self.forwards = running, forwards
            for link, wrappers, reached in links:
                link.wrappers = wrappers
                link.reached = reached if own else link.reached

    def _run(
        self,
        phase: str,
        context: str | None,
        kwargs: dict[str, Any],
        wrappers: Mapping[str, tuple[Wrapper, ...] | None],
        forwards: dict[torch.nn.Module, Any] | None = None,
    ) -> tuple[Any, bool]:
        """Run a further pass inside `during`, with caches in a `context` of its own; tell whether one was on, too."""
        self.running = True
        self.state.begin_call(self.module, self.family, kwargs)
        self.state.phase, self.state.rows = phase, Rows.all(row_count(kwargs))
        for name, link in self.links.items():
            link.wrappers, link.reached = wrappers.get(name), False
        self.forwards = forwards or {}
        cache_context = contextlib.nullcontext(False) if context is None else own_context(self.module, context)
        with cache_context as cached, overridden(self.forwards):
            args, named = as_given(self.module, kwargs, self.positional)
            return main_output(self.module.forward(*args, **named)), cached

    def perturbed(self, branch: Branch) -> Any:
        """Run one perturbed pass on the prompt rows and return its prediction."""
        state, rows = self.state, self.state.rows
        frames = state.grid[0] if rows.role == "both" and state.grid else 1
        replaced: set[torch.nn.Module] = set()
        with self.during():
            if branch.begin is not None:
                branch.begin(state)
            made = {m: make(m, m.forward) for m, make in branch.blocks.items()}
            blocks = {m: functools.partial(_noted, replaced, m, forward) for m, forward in made.items()}
            # What acts on the base pass acts on this one too, inside of the perturbation.
            wrappers = {name: link.wrappers for name, link in self.links.items()}
            touched = [site.name for site in branch.sites]
            if branch.perturb is not None:
                wrappers |= {name: (branch.perturb, *(wrappers[name] or ())) for name in touched}
            kwargs = take_rows(state.bound, rows.cond, rows.total, frames, self.family)
            name = f"attnctl_{[b.key for _, b in self.branches].index(branch.key)}"
            while True:  # modules ahead of the first perturbed one give what the base pass has computed
                stubs = {} if self.prefix is None else self.prefix.stubs(rows)
                context = None if stubs else name  # caches are hooks of diffusers, under which nothing is replayed
                output, cached = self._run(str(branch.key), context, kwargs, wrappers, stubs | blocks)
                if self.prefix is None or self.prefix.prove(output):
                    break
            reached = [(name, self.links[name].reached) for name in touched]
            if branch.blocks:
                names = named_below(self.module)
                reached += [(names[block], block in replaced) for block in branch.blocks]
            # A cache of the perturbed pass's own may answer for blocks that an earlier perturbed pass has run.
            if not (cached and branch.key in self.began):
                check_reached(reached, state.step, "the perturbed pass")
            self.began.add(branch.key)
        self.passes += 1
        return output

    def extra_pass(
        self, phase: str, kwargs: dict[str, Any], wrappers: Mapping[str, Wrapper], last: Site | None = None
    ) -> Any:
        """Run the denoiser with other inputs and wrappers: see `core.live.LiveDenoiser`."""
        around = {name: (wrap,) for name, wrap in wrappers.items()}
        output: Any = None
        with self.during(), contextlib.ExitStack() as undo:
            if last is not None and last.module is not None and replay_refusal(self.module) is None:
                undo.callback(last.module.register_forward_hook(_end_pass).remove)
            with contextlib.suppress(PassEnded):
                output, _ = self._run(phase, f"attnctl_{phase}", kwargs, around)
            check_reached([(name, self.links[name].reached) for name in wrappers], self.state.step, f"the {phase} pass")
        return None if last is not None else output

    @contextlib.contextmanager
    def beside(self, wrappers: Mapping[str, Wrapper]) -> Iterator[None]:
        """Let modules run beside the pass that is under way: see `core.live.LiveDenoiser`."""
        with self.during():
            for name, link in self.links.items():
                link.wrappers = (wrappers[name],) if name in wrappers else None
            yield

    def snapshot(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Note what the current pass does; the result does the same again, whenever it is entered."""
        wrappers = [(link, link.wrappers) for link in self.links.values()]
        state, forwards = dict(vars(self.state)), dict(self.forwards)

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            with self.during(own=False), overridden(forwards):  # checkpointed blocks run in here the first time, too
                vars(self.state).update(state)
                for link, around in wrappers:
                    link.wrappers = around
                yield

        return again


def _end_pass(module: torch.nn.Module, args: Any, output: Any) -> None:
    raise PassEnded


def _noted(seen: set[torch.nn.Module], module: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a replaced forward, and note that it was called."""
    seen.add(module)
    return forward(*args, **kwargs)


def resolve(
    module: torch.nn.Module,
    controls: Sequence[Control],
    backend: str = "auto",
    pipe: Any = None,
    latents: StepLatents | None = None,
    shared: dict[Any, Any] | None = None,
) -> ControlledDenoiser:
    """Find out everything about a denoiser before anything is touched."""
    family, sites = family_of(module), sites_of(module)
    resolved = chosen_sites(controls, sites, family)
    check_conflicts(controls, resolved)
    w = ControlledDenoiser(
        module, family, sites, resolved, pipe, latents or StepLatents(pipe), {} if shared is None else shared
    )
    w.processors = Processors(w.links, w.parts)
    for i, c in enumerate(controls):
        for site in resolved[i]:
            link = w.links.setdefault(site.name, SiteHook(site, w.state, backend))
            if c.wants_block_input():
                w.listeners.append((c, module.get_submodule(site.name.rpartition(".")[0]), link))
        live = c.attached(resolved[i], module, pipe)
        w.parts.append((c, resolved[i], live))
        if live is not None:
            w.live.append((c, live))
        if isinstance(c, Guidance):
            w.branches.append((c, c.branch(resolved[i], module)))
    return w
