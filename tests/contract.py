"""What the contract tests share: choosing sites, recording what a control could leave behind, tiny controls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import attnctl
from attnctl.core.call import AttnCall, Proceed, Wrapper
from attnctl.core.sites import Site
from attnctl.processors import PAG, Control, SoftPAG

ALL_KINDS = ("self", "cross", "joint", "dual", "temporal", "text", "audio", "aux")

# Hosts with a norm or a rotary table that computes in float32 whatever the type of the model.
SINGLE_INSIDE = frozenset({"hunyuandit", "sana"})


@dataclass(frozen=True, kw_only=True)
class Through(Control, abstract=True):
    """Wrap every attention and change nothing; note each call."""

    seen: list[AttnCall] = field(default_factory=list, compare=False)
    kinds = ALL_KINDS

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        """Return the wrapper."""

        def note(call: AttnCall, proceed: Proceed) -> Tensor:
            self.seen.append(call)
            return proceed(call)

        return note

    def default_sites(self, sites: Any, family: Any) -> tuple[Site, ...]:
        """Take every site."""
        return tuple(sites)


@dataclass(frozen=True, kw_only=True)
class Replace(Control, abstract=True):
    """Compute every selected attention by a function of the call, in the base pass."""

    function: Callable[[AttnCall, Proceed], Tensor]
    kinds = ALL_KINDS

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        """Return the wrapper."""
        return self.function

    def default_sites(self, sites: Any, family: Any) -> tuple[Site, ...]:
        """Take every site."""
        return tuple(sites)


def perturbed(model: nn.Module, guidance: PAG | SoftPAG, inputs: dict[str, Any]) -> Tensor:
    """Run a model with the perturbation of a guidance in its only pass, without branch, replay or rows."""
    sites = guidance.resolve(attnctl.find_sites(model), _family(model))
    wrap = guidance.branch(sites, model).perturb
    assert wrap is not None
    with attnctl.control(model, Replace(sites=[s.name for s in sites], function=wrap), layout="cond"):
        return zoo.call(model, inputs)


def _family(model: nn.Module) -> Any:
    from attnctl.core.hosts.families import family_of

    return family_of(model)


def own(sites: tuple[Site, ...]) -> list[Site]:
    """Keep the sites that perturbation guidance is about: self and joint attention."""
    return [s for s in sites if s.kind in ("self", "joint")]


def guidances(model: nn.Module) -> dict[str, PAG | SoftPAG]:
    """Make one PAG (a middle site) and one SoftPAG (some heads of the middle and of the last site)."""
    sites = own(attnctl.find_sites(model))
    mid, last = sites[len(sites) // 2], sites[-1]
    pairs = [(mid.name, 0), (last.name, last.heads - 1)]
    return {"PAG": PAG(scale=2.5, sites=mid.name), "SoftPAG": SoftPAG(scale=1.5, u=0.6, heads=pairs)}


def distance(a: Tensor, b: Tensor) -> float:
    """Compute the relative L2 distance of a to b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# What could be left behind


def snapshot(*roots: Any) -> dict[str, Any]:
    """Record, by identity, the variables of every module, processor and scheduler below some objects."""
    found: dict[str, Any] = {}
    for number, root in enumerate(roots):
        if isinstance(root, nn.Module):
            _note(found, number, root)
        else:
            _note_plain(found, f"{number}", root)
    return found


def _note(found: dict[str, Any], number: int, root: nn.Module) -> None:
    """Record a model; tests do so thousands of times, for hundreds of modules with twenty variables each."""
    for name, module in root.named_modules():
        where = f"{number}:{name}"
        found[f"{where} class"] = type(module)
        held = vars(module)
        for key, value in held.items():
            found[f"{where}.{key}"] = value
            if isinstance(value, dict):
                for k, v in value.items():
                    found[f"{where}.{key}[{k!r}]"] = v
        processor = _processor(module)
        if processor is not None:
            _note_plain(found, f"{where}.processor", processor)
    for key in root.state_dict():
        found[f"{number} state {key}"] = None


def _processor(module: nn.Module) -> Any:
    """Return a module's processor, if any, asking only who has one: no attribute is an error with a long text."""
    held = vars(module)
    if "processor" in held:
        return held["processor"]
    has = "processor" in held["_modules"] or hasattr(type(module), "processor")
    return getattr(module, "processor", None) if has else None


def _note_plain(found: dict[str, Any], where: str, value: Any) -> None:
    found[f"{where} class"] = type(value)
    for key in vars(value):
        found[f"{where}.{key} kept"] = None


def assert_clean(before: dict[str, Any], *roots: Any) -> None:
    """Fail if anything differs from a snapshot."""
    after = snapshot(*roots)
    assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())[:6]
    changed = [key for key, value in before.items() if after[key] is not value]
    assert not changed, changed[:6]
    for root in roots:
        if isinstance(root, nn.Module):
            assert attnctl.handle_of(root) is None
            for module in root.modules():
                assert not hasattr(_processor(module), "_attnctl")


def inputs_requiring_grad(inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Copy a call's inputs with latents that require gradients; return those latents too."""
    key = next(k for k in ("sample", "hidden_states", "x") if k in inputs)
    value = inputs[key]
    parts = [t.detach().clone().requires_grad_() for t in (value if isinstance(value, list) else [value])]
    return inputs | {key: parts if isinstance(value, list) else parts[0]}, parts


def gradients(model: nn.Module, inputs: dict[str, Any], handle: Any = None) -> list[Tensor]:
    """Differentiate a fixed projection of the prediction by the latents."""
    with_grad, parts = inputs_requiring_grad(inputs)
    with torch.enable_grad():
        out = zoo.call(model, with_grad)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        return list(torch.autograd.grad((out * weights).sum(), parts))


def middle(model: Any) -> str:
    """Name the self or joint site in the middle of a model."""
    found = [s.name for s in attnctl.find_sites(model) if s.kind in ("self", "joint")]
    return found[len(found) // 2]


Precise = Callable[..., tuple[nn.Module, dict[str, Any]]]


def precise(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """Build a tiny model in double precision.

    It has two rows, or one where prompts of uneven lengths in one batch are refused. Tests take it from the fixture of
    this name, under which hosts keep double precision within: most of them round queries and keys to single where
    they turn them, and a last bit that falls to the other side there is 1e-8 of the prediction.
    """
    return zoo.build(name, batch=1 if name == "lumina2" else 2, dtype=torch.float64, seed=seed)


def round_nowhere(patch: pytest.MonkeyPatch) -> None:
    """Let diffusers' own code keep tensors of double precision where it would round them to single.

    Places and their sines stay as they are: they are the same in every call, and some hosts mix them with others.
    """

    def keeping(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = original(self, *args, **kwargs)
            rounded = self.dtype == torch.float64 and out.dtype == torch.float32
            return self if rounded and _of_activations(sys._getframe(1)) else out

        return method

    for name in ("float", "to"):
        patch.setattr(torch.Tensor, name, keeping(name))


def _of_activations(caller: FrameType) -> bool:
    if not caller.f_globals.get("__name__", "").startswith("diffusers."):
        return False
    owner, function = type(caller.f_locals.get("self")).__name__.lower(), caller.f_code.co_name
    return not any(part in owner for part in ("rotary", "rope", "posembed")) and function not in _OF_PLACES


_OF_PLACES = ("get_1d_rotary_pos_embed", "_create_rope")


def run(model: Any, inputs: dict[str, Any], *controls: Any, layout: Any = "cond") -> Tensor:
    """Call a model under controls."""
    with torch.no_grad(), attnctl.control(model, *controls, layout=layout):
        return zoo.call(model, inputs)


def other_texts(inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    """Return other texts in place of a call's: its own, turned round; None where it has none."""

    def turned(value: Any) -> Any:
        return [turned(v) for v in value] if isinstance(value, list) else value.flip(-1)

    return {name: turned(inputs[name]) for name in names if name in inputs} or None
