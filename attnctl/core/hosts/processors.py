"""diffusers' attention processors under control: a subclass of a processor's class, put on and taken off.

The processor keeps its code and its place in the module tree: attnctl swaps the object's class for a subclass made once
per processor class, whose `__call__` runs the original code inside a function mode that hands every
`scaled_dot_product_attention` to the controls. Nothing of the host is copied, so RoPE, q/k norms, masks, fused
projections and IP-Adapters are the host's own. Detaching puts the class back.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from attnctl.core.call import AttnCall, SiteHook
from attnctl.core.control import Control
from attnctl.core.hosts.intercept import Intercept
from attnctl.core.hosts.linear import is_linear, run_linear
from attnctl.core.hosts.tokens import sequences
from attnctl.core.hosts.user_kernel import native, set_backend
from attnctl.core.sites import Site
from attnctl.errors import ConflictError, UnsupportedModelError

__all__ = ["Processors", "attach_processor", "controlled"]


class Processors:
    """The processors of a denoiser's controlled sites: put under control, kept there, and released.

    Args:
        links: The hook of each site, by the site's name.
        parts: Each control with its sites. Under context parallelism each process has a part of the tokens: a control
            that skips whole blocks leaves attention alone there, one whose map is the same for any order of tokens and
            in every head acts in the attention, all else is refused.
    """

    def __init__(self, links: Mapping[str, SiteHook], parts: Sequence[tuple[Any, tuple[Site, ...], Any]]) -> None:
        self.links, self.parts = links, parts
        self._made: list[Any] = []
        """Every processor that was put under control, those that a host set aside included."""
        self._warned: set[str] = set()

    def attach(self, undo: contextlib.ExitStack) -> None:
        """Put all under control; `undo` releases them."""
        undo.callback(self._release_made)
        for link in self._needed().values():
            self._check_split(link)
            self._made.append(attach_processor(link.site, link))
            undo.callback(self._release, link)

    def _needed(self) -> dict[str, SiteHook]:
        """Return the sites whose attention some control needs to see, all of them where no sequence is split."""
        seen = {s.name for c, sites, _ in self.parts if not c.skips_blocks for s in sites}
        return {name: link for name, link in self.links.items() if name in seen or not _is_split(_processor(link))}

    def _check_split(self, link: SiteHook) -> None:
        """Note whether processes share the sequence of a site, and refuse what is not right there.

        Raises:
            UnsupportedModelError: A control needs to know which tokens or heads it sees.
        """
        link.split = _is_split(_processor(link))
        if not link.split:
            return
        for c, sites, _ in self.parts:
            at = next((s for s in sites if s.name == link.site.name), None)
            if at is not None and not (c.skips_blocks or c.alike_anywhere(at)):
                raise UnsupportedModelError(
                    f"{c.describe()}: {at.name} runs under context parallelism, where a process sees a part of the "
                    "tokens and then, in another order, a part of the heads. Skip whole layers (SLG), take PAG or "
                    'SoftPAG with all heads (scope="all" in joint attention), or load the model without '
                    "enable_parallelism."
                )
        config = _processor(link)._parallel_config.context_parallel_config
        if config.ring_degree > 1:
            raise UnsupportedModelError(
                f"{link.site.name} runs under ring attention (ring_degree={config.ring_degree}), whose kernels are not "
                "torch's scaled_dot_product_attention. Use ulysses_degree, skip whole layers (SLG), or load the model "
                "without enable_parallelism."
            )

    def heal(self) -> None:
        """Put the hooks back where another tool has replaced a controlled processor."""
        if all(vars(_processor(link)).get("_attnctl") is link for link in self.links.values()):
            return
        for name, link in self._needed().items():
            if vars(_processor(link)).get("_attnctl") is link:
                continue
            self._check_split(link)
            self._made.append(attach_processor(link.site, link))
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"attnctl: the processor of {name} was replaced while under control (IP-Adapter, fused projections "
                    "and set_attn_processor do that); the control was attached to the new one.",
                    stacklevel=3,
                )

    def _release(self, link: SiteHook) -> None:
        if not _detach_processor(link.site, link):
            warnings.warn(
                f"attnctl: the processor of {link.site.name} was replaced after control() attached; it is left as it "
                "is.",
                stacklevel=4,
            )

    def _release_made(self) -> None:
        for processor in self._made:  # a model that fused its projections keeps the old ones for later
            _release_processor(processor)
        self._made.clear()


def _processor(link: SiteHook) -> Any:
    module: Any = link.site.module
    return module.processor


# Making a subclass is the only process-wide state: a cache of classes, harmless to share.
_classes: dict[type, type] = {}
_classes_lock = threading.Lock()


def controlled(cls: type) -> type:
    """Return the controlled subclass of a processor class, made once.

    The signature of the original `__call__` is forwarded at class level: diffusers drops keyword arguments (rotary
    embeddings among them) that it does not find there, and torch.compile cannot trace an instance-level `__call__`.
    """
    with _classes_lock:
        if cls not in _classes:
            _classes[cls] = _make_controlled(cls)
        return _classes[cls]


def _make_controlled(cls: Any) -> type:
    linear, sdpa_backend = is_linear(cls), native()  # looked up here: torch.compile warns of caches that it traces
    signature = inspect.signature(cls.__call__)
    names = tuple(signature.parameters)[2:]

    def __call__(self: Any, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        link: SiteHook | None = self._attnctl
        if link is None or link.wrappers is None:
            return cls.__call__(self, attn, *args, **kwargs)
        if link.reader is not None and not torch.compiler.is_compiling():
            with link.reader.describing(link, attn):
                return run(self, link, attn, *args, **kwargs)
        return run(self, link, attn, *args, **kwargs)

    def run(self: Any, link: SiteHook, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden, encoder = sequences(names, args, kwargs)
        if _is_split(self):
            _check_split_call(link, hidden)
        if linear:
            return run_linear(link, attn, hidden, encoder, AttnCall)
        mode = Intercept(link, hidden, encoder, set_backend(self) if link.open else None)
        with _native_backend(self, sdpa_backend), mode:
            output = cls.__call__(self, attn, *args, **kwargs)
        for change in mode.after:
            output = change(output)
        return output

    __call__.__signature__ = signature  # type: ignore[attr-defined]
    # "Controlled" stands in front so that checks for "Added" and the like in a class name still hold. Hosts make new
    # processors of an old one's class: those have no link and act like the original.
    members = {"__call__": __call__, "__module__": cls.__module__, "_attnctl": None, "_attnctl_original": None}
    return type(f"Controlled{cls.__name__}", (cls,), members)


def attach_processor(site: Site, link: SiteHook) -> Any:
    """Put a module's processor under control and return the controlled processor.

    Raises:
        ConflictError: The module carries a processor made by `attn_processors`.
        UnsupportedModelError: The processor computes attention where it cannot be intercepted.
    """
    module: Any = site.module
    if _is_controlled(module.processor) and getattr(module.processor._attnctl, "reader", None) is not None:
        raise ConflictError(
            f"{site.name} carries a processor made by attnctl.attn_processors, which perturbs every pass: restore the "
            "model's own processors with set_attn_processor before attaching a control."
        )
    original = module.processor = _release_processor(module.processor)
    inner = _interceptable(site, original)
    if isinstance(inner, torch.nn.Module):
        new = inner  # its weights live in the module tree: the same object must stay registered
    else:
        new = copy.copy(inner)  # one processor object may serve every site
    new.__class__ = controlled(type(inner))
    new.__dict__["_attnctl"] = link
    if new is not original:
        new.__dict__["_attnctl_original"] = original
        module.processor = new
    return new


def _is_split(processor: Any) -> bool:
    """Tell whether several processes share the sequence that a processor attends over."""
    return getattr(processor, "_parallel_config", None) is not None


def _check_split_call(link: SiteHook, hidden: Any) -> None:
    """Refuse a call under context parallelism whose perturbation, or whose gradient, would be wrong."""
    family = link.state.family
    if not link.split:
        reason = "was put under it while under control: call enable_parallelism first, then attnctl.control"
    elif family is not None and not family.classes:
        reason = "belongs to a model that attnctl does not list, and its kind of attention is not known there"
    elif torch.is_grad_enabled() and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
        reason = "has no gradient through perturbed attention there: use torch.no_grad()"
    else:
        return
    raise UnsupportedModelError(f"Under context parallelism {link.site.name} {reason}.")


def _detach_processor(site: Site, link: SiteHook) -> bool:
    """Give a module its own processor back; return False if another tool has put its own there meanwhile."""
    module: Any = site.module
    current = module.processor
    if not _is_controlled(current) or current._attnctl not in (link, None):
        return False
    restored = _release_processor(current)
    if restored is not current:
        module.processor = restored
    return True


def _is_controlled(processor: Any) -> bool:
    """Tell whether a processor has a controlled class."""
    return type(processor) in _classes.values()


def _release_processor(processor: Any) -> Any:
    """Give a controlled processor its own class back, wherever it is kept; return the one that it stands for."""
    if not _is_controlled(processor):
        return processor
    original = processor._attnctl_original
    processor.__class__ = type(processor).__mro__[1]
    for name in ("_attnctl", "_attnctl_original"):
        processor.__dict__.pop(name, None)
    if original is None:
        return processor
    if isinstance(original, torch.nn.Module) or isinstance(processor, torch.nn.Module):
        return original  # what is set on it is in the module tree
    for name, value in vars(processor).items():  # a backend, or parallelism, that was set under control stays set
        if vars(original).get(name, original) is not value:
            vars(original)[name] = value
    return original


@contextlib.contextmanager
def _native_backend(processor: Any, native: Any) -> Iterator[None]:
    """Have diffusers' dispatcher call SDPA, where it can be seen, whatever backend is set."""
    # Nothing is set where SDPA is what is chosen: torch 2.10 does not trace what is set and taken back.
    if not hasattr(processor, "_attention_backend") or (
        set_backend(processor) is None and id(processor) not in _NATIVE
    ):
        yield
        return
    # Two calls may pass through one module side by side (NAG's): the last to leave puts back what the first met.
    inside, backend = _NATIVE.get(id(processor), (0, vars(processor).get("_attention_backend", _MISSING)))
    _NATIVE[id(processor)] = inside + 1, backend
    processor._attention_backend = native
    try:
        yield
    finally:
        inside, backend = _NATIVE.pop(id(processor))
        if inside > 1:
            _NATIVE[id(processor)] = inside - 1, backend
        elif backend is _MISSING:
            del processor._attention_backend
        else:
            processor._attention_backend = backend


_MISSING = object()
_NATIVE: dict[int, tuple[int, Any]] = {}
"""By the id of a processor: how many calls are inside of it, and the backend that the first of them met."""


_SIBLINGS = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}
"""Processors that do not call SDPA, and what computes the same and does."""


def _interceptable(site: Any, processor: Any) -> Any:
    """Return a processor that calls SDPA and computes the same as this one."""
    from diffusers.models import attention_processor as ap

    name = type(processor).__name__
    if isinstance(processor, Control):
        raise ConflictError(
            f"{site.name} holds the control {processor.describe()} in place of a processor; set_attn_processor takes "
            "anything. Restore the model's own processors: model.set_default_attn_processor(), or load it again."
        )
    if name in _SIBLINGS:
        if not getattr(site.module, "scale_qk", True):
            raise UnsupportedModelError(
                f"{site.name} does not scale its logits (scale_qk=False), which only {name} honours, and {name} "
                "does not call scaled_dot_product_attention: its attention cannot be intercepted."
            )
        return getattr(ap, _SIBLINGS[name])()
    if name == "IPAdapterAttnProcessor":
        new = ap.IPAdapterAttnProcessor2_0(
            processor.hidden_size, processor.cross_attention_dim, processor.num_tokens, processor.scale
        )
        new.load_state_dict(processor.state_dict())
        weight = next(processor.parameters())
        return new.to(device=weight.device, dtype=weight.dtype)
    if "PAG" in name:
        raise UnsupportedModelError(
            f"{site.name} holds {name}, left there by a diffusers PAG pipeline: load the plain pipeline class, or "
            "restore the processors with set_attn_processor, then attach attnctl's PAG instead."
        )
    if "XFormers" in name or "Flex" in name:
        raise UnsupportedModelError(
            f"{site.name} holds {name}, which does not call scaled_dot_product_attention: its attention cannot be "
            "intercepted. Restore the default processor (model.set_attn_processor) before attaching."
        )
    return processor
