"""Extra guidance passes: replay what is shared, run the rest perturbed, add the difference to the prediction.

For every guidance branch the denoiser runs once more on the prompt rows, with some attention (or some blocks)
perturbed, giving p. With c the unperturbed prediction of the same rows, delta = w (c - p) is added to the prompt and
to the negative prediction; classifier-free guidance u + s (c - u) is affine, so the sum receives exactly delta.

The perturbed pass equals the base pass until the first perturbed module. `Prefix` finds, once, the largest modules that
finish before it; the base pass keeps their outputs, and the perturbed pass takes them instead of computing them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attnctl.core.call import CallState, Rows, cut_tensor
from attnctl.core.intercept import Wrapper
from attnctl.core.sites import Site
from attnctl.errors import UnsupportedModelError

__all__ = [
    "Branch",
    "Checkpointing",
    "Prefix",
    "check_rows_kept",
    "combine",
    "latents_of",
    "main_output",
    "overridden",
    "own_context",
    "with_latents",
    "with_main_output",
]

BlockOverride = Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Branch:
    """One perturbed pass.

    Attributes:
        key: Two branches with equal keys perturb alike and share one pass.
        sites: Attention sites that `perturb` wraps.
        perturb: Outermost wrapper at those sites in the perturbed pass.
        blocks: Modules whose forward is replaced in the perturbed pass, each with the maker of its replacement.
        begin: Called before each perturbed pass, with the state of the call that it belongs to.
    """

    key: Any
    sites: tuple[Site, ...] = ()
    perturb: Wrapper | None = None
    blocks: Mapping[torch.nn.Module, BlockOverride] = field(default_factory=dict)
    begin: Callable[[CallState], None] | None = None

    @property
    def targets(self) -> tuple[torch.nn.Module, ...]:
        """Return the modules that this branch perturbs."""
        return tuple(s.module for s in self.sites if s.module is not None) + tuple(self.blocks)


def main_output(output: Any) -> Any:
    """Return the prediction inside whatever container a denoiser returned."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return output[0]
    return output.sample


def with_main_output(output: Any, new: Any) -> Any:
    """Return the same container with another prediction in it."""
    if isinstance(output, torch.Tensor):
        return new
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return (new, *output[1:])
    if isinstance(output, list):
        return [new, *output[1:]]
    return type(output)(**{**output, "sample": new})


def latents_of(result: Any) -> torch.Tensor:
    """Return the latents that a scheduler's step returned."""
    latents: torch.Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return latents


def with_latents(result: Any, latents: torch.Tensor) -> Any:
    """Return what a scheduler's step returned with other latents in it."""
    if isinstance(result, tuple):
        return (latents, *result[1:])
    return type(result)(**{**result, "prev_sample": latents})


def difference(c: Any, p: Any) -> Any:
    """Compute c - p in float32 (float64 stays), for tensors or lists of tensors."""
    if isinstance(c, (list, tuple)):
        return [difference(a, b) for a, b in zip(c, p, strict=True)]
    wide = torch.promote_types(c.dtype, torch.float32)
    return c.to(wide) - p.to(wide)


def scaled(delta: Any, weight: float) -> Any:
    """Multiply a difference by a guidance weight."""
    return [scaled(d, weight) for d in delta] if isinstance(delta, list) else delta * weight


def added(a: Any, b: Any) -> Any:
    """Add two differences; None counts as zero."""
    if a is None:
        return b
    return [added(x, y) for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b


def combine(pred: Any, delta: Any, rows: Rows, rescale_safe: float | None) -> Any:
    """Add guidance to a prediction.

    Args:
        pred: Prediction of all rows of the call, a tensor [rows, ...] or a list with a tensor a row.
        delta: w (c - p) for the prompt rows, or for the negative rows' partners in a sequential pair.
        rows: Which rows are which.
        rescale_safe: None to add delta to every row. A CFG scale s to leave the prompt rows alone and take
            delta / (s - 1) off the negative ones: u + s (c - u) receives the same delta, and what the pipeline
            derives from c (guidance rescale) stays what it was.

    Returns:
        The guided prediction, in the dtype of `pred`.
    """
    if isinstance(pred, (list, tuple)):
        parts = list(pred)
        share = delta if rescale_safe is None else [d / (1 - rescale_safe) for d in delta]
        if rows.uncond is not None:
            for r, d in zip(range(rows.total)[rows.uncond], share, strict=True):
                parts[r] = _plus(parts[r], d)
        if rescale_safe is None:
            for r, d in zip(range(rows.total)[rows.cond], delta, strict=False):
                parts[r] = _plus(parts[r], d)
        return parts
    if rows.role == "both" and rows.uncond is not None:
        c, u = pred[rows.cond], pred[rows.uncond]
        u = _plus(u, delta if rescale_safe is None else delta / (1 - rescale_safe))
        c = _plus(c, delta) if rescale_safe is None else c
        return torch.cat([u, c] if rows.uncond.start == 0 else [c, u])
    if rescale_safe is None:
        return _plus(pred, delta)
    return _plus(pred, delta / (1 - rescale_safe)) if rows.role == "uncond" else pred


def _plus(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return (x.to(d.dtype) + d).to(x.dtype)


@contextlib.contextmanager
def overridden(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of some modules for the length of one pass."""
    held: list[tuple[torch.nn.Module, Any, Any]] = []
    try:
        for module, forward in forwards.items():
            # A compiled module is called through its compiled forward: set that aside too.
            held.append((module, vars(module).get("forward", _MISSING), module._compiled_call_impl))
            module._compiled_call_impl = None
            module.forward = forward
        yield
    finally:
        for module, forward, compiled in reversed(held):
            if forward is _MISSING:
                del module.forward
            else:
                module.forward = forward
            if compiled is not None:
                module._compiled_call_impl = compiled
            else:
                vars(module).pop("_compiled_call_impl", None)


_MISSING = object()


class Checkpointing:
    """Has gradient checkpointing run blocks again under what they ran under first.

    The blocks of a checkpointed denoiser run a second time during backward, when the pass is over and its controls are
    switched off. Each checkpoint therefore takes along what `remember` returns when its block runs first.
    """

    def __init__(
        self, denoiser: torch.nn.Module, remember: Callable[[], Callable[[], contextlib.AbstractContextManager[Any]]]
    ) -> None:
        self._held = [
            (module, vars(module)["_gradient_checkpointing_func"])
            for module in denoiser.modules()
            if getattr(module, "gradient_checkpointing", False)
            and vars(module).get("_gradient_checkpointing_func") is not None
        ]
        for module, function in self._held:
            vars(module)["_gradient_checkpointing_func"] = _remembering(function, remember)

    def release(self) -> None:
        """Give the modules their own functions back."""
        for module, function in self._held:
            vars(module)["_gradient_checkpointing_func"] = function
        self._held = []


def _remembering(function: Callable[..., Any], remember: Callable[[], Any]) -> Callable[..., Any]:
    def checkpoint(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = remember()

        def run(*args: Any, **kwargs: Any) -> Any:
            with again():
                return block(*args, **kwargs)

        return function(run, *args, **kwargs)

    return checkpoint


@contextlib.contextmanager
def own_context(denoiser: Any, name: str) -> Iterator[bool]:
    """Run a pass in a cache context of its own, then give the caller's context back; yield whether a cache is on.

    In a shared context FirstBlockCache would answer the perturbed pass with the base pass's blocks, and guidance would
    silently be zero.

    Raises:
        UnsupportedModelError: A cache keeps one state for all passes (pyramid attention broadcast, FasterCache).
    """
    managers = _state_managers(denoiser)
    if not managers:  # nothing keeps state; entering a context would only leave an empty registry on the module
        yield False
        return
    held = [(m, f, getattr(m, f)) for m in managers for f in ("_context", "_current_context") if hasattr(m, f)]
    try:
        with denoiser.cache_context(name):
            for manager, field_, context in held:
                if dataclasses.is_dataclass(context) and not isinstance(context, type):  # the host's step and sigma
                    setattr(manager, field_, dataclasses.replace(context, name=name))
            yield True
    finally:
        for manager, field_, context in held:
            setattr(manager, field_, context)


def _state_managers(denoiser: torch.nn.Module) -> list[Any]:
    """Collect the diffusers state managers below a denoiser; they hold one state a context."""
    found: list[Any] = []
    for hook in _diffusers_hooks(denoiser):
        managers = [m for name, m in vars(hook).items() if name.endswith("state_manager") and m is not None]
        if not managers and getattr(hook, "_is_stateful", False):
            raise UnsupportedModelError(
                f"{type(denoiser).__name__} runs under {type(hook).__name__}, a cache with one state for all passes: "
                "the base pass and a further one would take each other's attention for their own. Call "
                "disable_cache() on it first; FirstBlockCache keeps passes apart."
            )
        found += [m for m in managers if all(m is not other for other in found)]
    return found


def _diffusers_hooks(denoiser: torch.nn.Module) -> Iterator[Any]:
    for module in denoiser.modules():
        yield from getattr(vars(module).get("_diffusers_hook"), "hooks", {}).values()


def check_rows_kept(denoiser: torch.nn.Module) -> None:
    """Raise if a cache drops rows between the call of a denoiser and its blocks.

    Raises:
        UnsupportedModelError: FasterCache leaves the negative prompt out on some steps.
    """
    for hook in getattr(vars(denoiser).get("_diffusers_hook"), "hooks", {}).values():
        if type(hook).__name__ == "FasterCacheDenoiserHook" and not hook.is_guidance_distilled:
            raise UnsupportedModelError(
                f"{type(denoiser).__name__} runs under FasterCache, which leaves the negative prompt's rows out on "
                "some steps, so that controls cannot tell the rows of a call. Call disable_cache() on it first."
            )


# Outputs of these modules do not follow the batch even when their first axis fits.
_NOT_ROWS = re.compile(r"rope|rotary|time_proj|time_embed")


class Prefix:
    """The part of a base pass that perturbed passes need not repeat.

    The first base pass is watched module by module; later ones keep only the outputs of the chosen modules.
    """

    def __init__(self, denoiser: torch.nn.Module, targets: Iterable[torch.nn.Module]) -> None:
        self.denoiser = denoiser
        self.targets = set(targets)
        self.chosen: dict[torch.nn.Module, str] | None = None
        self.store: dict[torch.nn.Module, Any] = {}
        self._handles: list[Any] = []
        self._reached = False
        self._paused = False
        self._calls: dict[torch.nn.Module, int] = {}

    @staticmethod
    def refusal(denoiser: torch.nn.Module) -> str | None:
        """Say why outputs cannot be replayed in this denoiser, or return None."""
        if torch.is_inference_mode_enabled():
            return "inference mode keeps no version counters"
        if torch.is_grad_enabled() and getattr(denoiser, "is_gradient_checkpointing", False):
            return "gradient checkpointing runs modules twice"
        for module in denoiser.modules():
            if module._compiled_call_impl is not None:
                return "compiled blocks cannot be watched"
            if getattr(vars(module).get("_diffusers_hook"), "hooks", None):
                return "diffusers hooks (caches, group offloading) need every block to run"
        return None

    def watch(self) -> None:
        """Install hooks for one base pass."""
        self.release()
        self._reached = False
        self._calls = {}
        if self.chosen is None:
            for name, module in self.denoiser.named_modules():
                if module is self.denoiser:
                    continue
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._learn(name)))
        else:
            for module in self.chosen:
                self._handles.append(module.register_forward_hook(self._keep))

    def unwatch(self) -> None:
        """Remove the hooks; after the first pass, settle which modules to replay."""
        for handle in self._handles:
            handle.remove()
        learning = self.chosen is None and bool(self._handles)
        self._handles = []
        if learning and not self._reached:
            self.store = {}  # nothing perturbed has run: the perturbed pass shows whether that is an error
        elif learning:
            self.chosen = {m: n for m, (n, _, _) in self.store.items() if self._calls[m] == 1}
            self.store = {m: (out, versions) for m, (_, out, versions) in self.store.items() if m in self.chosen}

    def release(self) -> None:
        """Remove hooks and drop stored tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.store = [], {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing of what runs meanwhile."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if self._paused:
            return
        self._calls[module] = self._calls.get(module, 0) + 1
        if module in self.targets:
            self._reached = True

    def _learn(self, name: str) -> Callable[..., None]:
        def finished(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._paused or self._reached or _NOT_ROWS.search(name) or next(module.parameters(), None) is None:
                return
            # A finished parent stands for its children.
            for child in module.modules():
                self.store.pop(child, None)
            self.store[module] = (name, output, _versions(output))

        return finished

    def _keep(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._paused:
            self.store[module] = (output, _versions(output))

    def stubs(self, rows: Rows, frames: int) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Return, for each module of the prefix, a forward that gives the prompt rows of its stored output.

        A module whose output has no rows to take, or was written to in place since, is left out for good.
        """
        forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        for module, (output, versions) in self.store.items():
            if versions != _versions(output) or not _has_rows(output, rows.total):
                if self.chosen is not None:
                    self.chosen.pop(module, None)
                continue
            forwards[module] = _replay(_take(output, rows))
        return forwards


def _replay(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)


def _versions(output: Any) -> tuple[int, ...]:
    return tuple(t._version for t in _leaves(output))


def _has_rows(output: Any, total: int) -> bool:
    leaves = list(_leaves(output))
    return bool(leaves) and all(t.ndim > 0 and t.shape[0] % total == 0 for t in leaves)


def _take(output: Any, rows: Rows) -> Any:
    if rows.cond == slice(0, rows.total):
        return output
    if isinstance(output, torch.Tensor):
        return cut_tensor(output, rows.cond, rows.total, (output.shape[0] // rows.total,))
    if isinstance(output, dict):
        return type(output)(**{k: _take(v, rows) for k, v in output.items()})
    if isinstance(output, (list, tuple)):
        return type(output)(_take(v, rows) for v in output)
    return output


def check_reached(places: Iterable[tuple[str, bool]], state: CallState, what: str) -> None:
    """Raise if a controlled pass left a selected attention site or block out.

    Raises:
        UnsupportedModelError: Some sites were never reached: a cache skipped their block, or a backend hides them.
    """
    missing = [name for name, reached in places if not reached]
    if missing:
        from attnctl.errors import NeverApplied

        raise NeverApplied(
            f"{what}: the denoiser ran step {state.step} without reaching {', '.join(missing[:4])}"
            f"{' and more' if len(missing) > 4 else ''}. A cache that skips blocks, a `skip_layers` option, or an "
            "attention backend that does not go through scaled_dot_product_attention hides it: switch that off, or "
            "choose sites that run (attnctl.find_sites lists them)."
        )


__all__ += ["UnsupportedModelError", "added", "check_reached", "difference", "scaled"]
