"""Caches of diffusers, which keep something from one call of a denoiser to the next."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from attnctl.core.hosts.modules import modules_below
from attnctl.errors import NeverApplied, UnsupportedModelError

__all__ = [
    "check_reached",
    "check_rows_kept",
    "hooks_below",
    "hooks_of",
    "own_context",
    "replay_refusal",
    "saved_weights",
]


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
    contexts = [(m, f, getattr(m, f)) for m in managers for f in ("_context", "_current_context") if hasattr(m, f)]
    try:
        with denoiser.cache_context(name):
            for manager, field_, context in contexts:
                if dataclasses.is_dataclass(context) and not isinstance(context, type):  # the host's step and sigma
                    setattr(manager, field_, dataclasses.replace(context, name=name))
            yield True
    finally:
        for manager, field_, context in contexts:
            setattr(manager, field_, context)


def _state_managers(denoiser: torch.nn.Module) -> list[Any]:
    """Collect the diffusers state managers below a denoiser; they hold one state a context."""
    all_managers: list[Any] = []
    for _, hook in hooks_below(denoiser):
        managers = [m for name, m in vars(hook).items() if name.endswith("state_manager") and m is not None]
        if not managers and getattr(hook, "_is_stateful", False):
            raise UnsupportedModelError(
                f"{type(denoiser).__name__} runs under {type(hook).__name__}, a cache with one state for all passes: "
                "the base pass and a further one would take each other's attention for their own. Call "
                "disable_cache() on it first; FirstBlockCache keeps passes apart."
            )
        all_managers += [m for m in managers if all(m is not other for other in all_managers)]
    return all_managers


def hooks_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """Return diffusers' hooks on one module, by name: caches, group offloading, layerwise casting."""
    return getattr(vars(module).get("_diffusers_hook"), "hooks", None) or {}


def hooks_below(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """List diffusers' hooks on a module and on all modules below it, each with its name."""
    return _hooks_on(modules_below(module))


def _hooks_on(modules: Iterable[torch.nn.Module]) -> list[tuple[str, Any]]:
    return [item for m in modules if "_diffusers_hook" in vars(m) for item in hooks_of(m).items()]


@contextlib.contextmanager
def saved_weights(denoiser: torch.nn.Module) -> Iterator[None]:
    """Keep the weights of a forward with gradients as they were used, until backward is through.

    Layerwise casting (8-bit storage) and group offloading change the data of a weight as soon as its layer has run.
    Autograd saves a weight by reference: backward would find it in another type or on another device.
    """
    modules = [(module, hooks_of(module)) for module in modules_below(denoiser) if hooks_of(module)]
    casts = [(module, hooks["layerwise_casting"]) for module, hooks in modules if "layerwise_casting" in hooks]
    storage = [cast.storage_dtype for _, cast in casts]

    def pack(saved: torch.Tensor) -> torch.Tensor:
        return saved.detach() if isinstance(saved, torch.nn.Parameter) else saved  # the data that it has now

    try:
        for _, cast in casts:  # checkpointed layers run during backward too, where no hook of autograd sees them
            cast.storage_dtype = cast.compute_dtype
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)
        with hooks if len(modules) > len(casts) else contextlib.nullcontext():
            yield
    finally:
        for (module, cast), dtype in zip(casts, storage, strict=True):
            cast.storage_dtype = dtype
            module.to(dtype)


def check_rows_kept(denoiser: torch.nn.Module) -> None:
    """Raise if a cache drops rows between the call of a denoiser and its blocks.

    Raises:
        UnsupportedModelError: FasterCache leaves the negative prompt out on some steps.
    """
    for hook in hooks_of(denoiser).values():
        if type(hook).__name__ == "FasterCacheDenoiserHook" and not hook.is_guidance_distilled:
            raise UnsupportedModelError(
                f"{type(denoiser).__name__} runs under FasterCache, which leaves the negative prompt's rows out on "
                "some steps, so that controls cannot tell the rows of a call. Call disable_cache() on it first."
            )


def check_reached(places: Iterable[tuple[str, bool]], step: int, what: str) -> None:
    """Raise if a controlled pass left a selected attention site or block out.

    Raises:
        NeverApplied: Some sites were never reached: a cache skipped their block, or a backend hides them.
    """
    missing = [name for name, reached in places if not reached]
    if missing:
        raise NeverApplied(
            f"{what}: the denoiser ran step {step} without reaching {', '.join(missing[:4])}"
            f"{' and more' if len(missing) > 4 else ''}. A cache that skips blocks, a `skip_layers` option, or an "
            "attention backend that does not go through scaled_dot_product_attention hides it: switch that off, or "
            "choose sites that run (attnctl.find_sites lists them)."
        )


def replay_refusal(denoiser: torch.nn.Module) -> str | None:
    """Say why outputs cannot be replayed in this denoiser, or return None."""
    if torch.is_inference_mode_enabled():
        return "inference mode keeps no version counters"
    if torch.is_grad_enabled() and getattr(denoiser, "is_gradient_checkpointing", False):
        return "gradient checkpointing runs modules twice"
    modules = modules_below(denoiser)
    if any(module._compiled_call_impl is not None for module in modules):
        return "compiled blocks cannot be watched"
    if _hooks_on(modules):
        return "diffusers hooks (caches, group offloading) need every block to run"
    return None
