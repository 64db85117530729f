"""Standing between a module's own attention processor and the kernel that it calls.

The processor keeps its class, its code and its place in the module tree: attnctl swaps the object's class for a
subclass made once per processor class, whose `__call__` runs the original code inside a function mode that hands every
`scaled_dot_product_attention` to the controls. Nothing of the host is copied, so RoPE, q/k norms, masks, fused
projections and IP-Adapters are the host's own. Detaching puts the class back.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attnctl.core.call import AttnCall, CallState, Wrapper, run_wrappers
from attnctl.core.hosts.linear import is_linear, run_linear
from attnctl.core.hosts.listing import stage_grid
from attnctl.core.hosts.processors import interceptable, native, native_backend
from attnctl.core.sites import Site
from attnctl.errors import ConflictError, UnsupportedModelError
from attnctl.kernels import attention, sdpa

__all__ = [
    "SiteHook",
    "attach_processor",
    "controlled",
    "detach_processor",
    "is_controlled",
    "release_processor",
]


class SiteHook:
    """What ties one processor to the session: its site and what to do there in the current pass.

    `wrappers` is None while the site is left alone; a tuple (outermost first) while it is controlled. It changes only
    between passes, so that a compiled block sees few distinct values. `reached` tells that a controlled pass came by.
    """

    def __init__(self, site: Site, state: CallState, backend: str = "auto") -> None:
        self.site = site
        self.state = state
        self.kernel = attention if backend == "auto" else functools.partial(attention, backend=backend)
        self.wrappers: tuple[Wrapper, ...] | None = None
        self.reached = False
        self.seen: tuple[int, slice | None, slice | None] | None = None
        """Query tokens, image range and text range of the first intercepted call."""
        self.block_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.fixed = False
        """Belongs to a processor that was handed out, not to a session."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteHook:
        # No session writes to the links of a copied pipeline: they must not act while the original's do.
        return self if self.fixed else SiteHook(replace(self.site, module=None), CallState())

    @property
    def observed(self) -> bool:
        """Tell whether all wrappers only look at the call."""
        return all(getattr(getattr(w, "__self__", None), "observes", False) for w in self.wrappers or ())

    def seen_site(self) -> Site:
        """Return the site with what the calls so far have shown of its tokens."""
        if self.seen is None:
            return self.site
        n, image, text = self.seen
        grid, family = self.state.last_grid, self.state.family
        if grid is not None and family is not None and family.unet:
            grid = stage_grid(self.state.denoiser, self.site.name, grid, n)
        return replace(self.site, grid=grid or self.site.grid, image=image, text=text)

    def run(self, call: AttnCall) -> torch.Tensor:
        """Send a call through the wrappers to its kernel."""
        self.reached = True
        # A compiled block would be compiled again once this is no longer None.
        if not torch.compiler.is_compiling() and self.seen is None:
            self.seen = (call.q.shape[-2], call.image, call.text)
        return run_wrappers(self.wrappers or (), call)


class _Intercept(TorchFunctionMode):
    """Send scaled_dot_product_attention to a link; everything else passes."""

    def __init__(self, link: SiteHook, hidden: Any, encoder: Any) -> None:
        super().__init__()
        self.link, self.hidden, self.encoder = link, hidden, encoder
        self.index = 0
        self.after: list[Callable[[Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self.attend(*args, **kwargs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if dropout_p:
            raise UnsupportedModelError(
                f"{self.link.site.name} drops attention weights (p = {dropout_p}): call model.eval() first."
            )
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        tokens = _token_slices(self.link, query.shape[-2], _tokens(self.hidden), _tokens(self.encoder))
        hidden = self.hidden if isinstance(self.hidden, torch.Tensor) else None
        kernel = self.link.kernel
        if self.link.observed:
            kernel = functools.partial(sdpa.as_called, is_causal=is_causal, enable_gqa=enable_gqa)
        call = AttnCall(query, key, value, attn_mask, scale, self.link, self.index, tokens, kernel, hidden, self.after)
        self.index += 1
        return self.link.run(call)


def _token_slices(link: SiteHook, n: int, hidden: int | None, encoder: int | None) -> tuple[slice | None, slice | None]:
    """Tell image from text tokens in a joint sequence of n tokens."""
    family = link.state.family
    if link.site.kind != "joint" or family is None or family.text is None:
        return None, None
    # Double-stream blocks bring both parts; single-stream ones bring the packed sequence.
    n_image = hidden if encoder is not None else link.state.image_tokens
    if n_image is None or hidden is None or not 0 < n_image <= n:
        return None, None
    if family.text == "first":
        return slice(n - n_image, n), slice(0, n - n_image)
    return slice(0, n_image), slice(n_image, n)


def _tokens(value: Any) -> int | None:
    return int(value.shape[1]) if isinstance(value, torch.Tensor) and value.ndim == 3 else None


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

    def __call__(self: Any, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        link: SiteHook | None = self._attnctl
        if link is None or link.wrappers is None:
            return cls.__call__(self, attn, *args, **kwargs)
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        encoder = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        encoder = None if encoder is hidden else encoder
        if linear:
            return run_linear(link, attn, hidden, encoder, AttnCall)
        mode = _Intercept(link, hidden, encoder)
        with native_backend(self, sdpa_backend), mode:
            output = cls.__call__(self, attn, *args, **kwargs)
        for change in mode.after:
            output = change(output)
        return output

    __call__.__signature__ = inspect.signature(cls.__call__)  # type: ignore[attr-defined]
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
    _refuse_fixed(site)
    original = module.processor = release_processor(module.processor)
    inner = interceptable(site, original)
    if getattr(inner, "_parallel_config", None) is not None:
        raise UnsupportedModelError(
            f"{site.name} runs under context or tensor parallelism, whose attention takes another path: "
            "disable it before attaching."
        )
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


def detach_processor(site: Site, link: SiteHook) -> bool:
    """Give a module its own processor back; return False if another tool has put its own there meanwhile."""
    module: Any = site.module
    current = module.processor
    if not is_controlled(current) or current._attnctl not in (link, None):
        return False
    restored = release_processor(current)
    if restored is not current:
        module.processor = restored
    return True


def is_controlled(processor: Any) -> bool:
    """Tell whether a processor has a controlled class."""
    return type(processor) in _classes.values()


def release_processor(processor: Any) -> Any:
    """Give a controlled processor its own class back, wherever it is kept; return the one that it stands for."""
    if not is_controlled(processor):
        return processor
    original = processor._attnctl_original
    processor.__class__ = type(processor).__mro__[1]
    for name in ("_attnctl", "_attnctl_original"):
        processor.__dict__.pop(name, None)
    return processor if original is None else original


def _refuse_fixed(site: Site) -> None:
    module: Any = site.module
    if is_controlled(module.processor) and getattr(module.processor._attnctl, "fixed", False):
        raise ConflictError(
            f"{site.name} carries a processor made by attnctl.attn_processors, which perturbs every pass: restore the "
            "model's own processors with set_attn_processor before attaching a control."
        )
