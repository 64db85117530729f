"""A pretend CUDA device: tensors that say `cuda:0`, compute on the CPU, and tell where code would wait for a device.

    move_module(model); inputs = moved(inputs)
    with Stalls() as stalls: model(**inputs)
    stalls.found        # a line for every wait: reading a value, or copying between the machine's and the card's memory

Copies that are asked for as non-blocking are no waits. Mixing devices in one operation is an error, as on a card.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import attnctl

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_ROOT = str(Path(attnctl.__file__).parent)
_READS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim",
        "unique_consecutive", "bincount", "item", "_unique",
    )
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index"}
_now: list[Stalls] = []


class Pretend(Tensor):
    """A tensor of the pretend device around one of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Pretend:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CUDA, requires_grad=requires_grad,
        )  # fmt: skip
        made.inner = inner.detach() if inner.requires_grad else inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is Tensor.tolist:
            _note("tolist")
            return args[0].inner.tolist()
        if func is F.rms_norm:
            return _rms_norm(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class Stalls(TorchDispatchMode):
    """Collect the waits of the code inside, with the package's line that caused each; waits of hosts are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> Stalls:
        torch.cuda._lazy_init = lambda: None
        torch.cuda.mem_get_info = lambda device=None: (1 << 36, 1 << 36)
        # Work goes by no stream: there is none to carry over to another thread.
        torch.cuda.current_stream = lambda device=None: None
        torch._C._ensureCUDADeviceGuardSet()
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        # Backward asks the driver for its streams. It runs no line of the package but those of checkpointed blocks.
        self._gradient, torch.autograd.grad = torch.autograd.grad, lambda loss, leaf: (torch.zeros_like(leaf),)
        _now.append(self)
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: object) -> None:
        _now.pop()
        torch.autograd.grad = self._gradient
        torch._C._set_only_lift_cpu_tensors(self._lift)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # torch keeps it for each thread, and this may be another
        return _dispatch(func, args, kwargs or {})


def _note(what: str) -> None:
    """Note a wait, if the innermost frame outside torch and this file is the package's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file, handed_on = frame.f_code.co_filename, frame.f_code.co_name == "__torch_function__"
        if file.startswith(_ROOT) and not handed_on:  # what a host calls passes through the package, which looks
            for stalls in _now[-1:]:
                stalls.found.append(f"{what} at {file[len(_ROOT) + 1 :]}:{frame.f_lineno}")
        if "/torch/" not in file and file != __file__ and not handed_on:
            return
        frame = frame.f_back


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    tensors = [x.inner if isinstance(x, Pretend) else x for x in (query, key, value, attn_mask)]
    assert all(x is None or isinstance(x, Pretend) for x in (query, key, value, attn_mask)), "devices are mixed"
    q, k, v, mask = tensors
    done = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return Pretend(done)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    return out if weight is None else out * weight


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    ours: list[Pretend] = []
    others: list[Tensor] = []

    def inner(x: Any) -> Any:
        if isinstance(x, Pretend):
            ours.append(x)
            return x.inner
        if isinstance(x, Tensor):
            others.append(x)
        elif isinstance(x, (list, tuple)):  # what operators take is nested no further, and has no other containers
            return type(x)([inner(y) for y in x])
        return x

    args, given = [inner(x) for x in args], args
    kwargs, named = {name: inner(x) for name, x in kwargs.items()}, kwargs
    device = kwargs.get("device")
    to_card = device is not None and torch.device(device).type == "cuda"
    name = func._schema.name
    if name == "aten::_to_copy" and ours and device is not None and not to_card:
        if not kwargs.get("non_blocking"):
            _note("copy to the machine's memory")
        return func(ours[0].inner, **{k: v for k, v in kwargs.items() if k != "device"}).clone()
    _look_for_waits(func, name, given, named, ours, others, to_card)
    known = {id(x.inner): x for x in ours}
    out = func(*args, **({**kwargs, "device": CPU} if to_card else kwargs))
    if not ours and not to_card:
        return out

    def wrapped(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)([wrapped(y) for y in x])
        if not isinstance(x, Tensor) or isinstance(x, Pretend):
            return x
        return known[id(x)] if id(x) in known else Pretend(x)

    return wrapped(out)


def _look_for_waits(
    func: Any, name: str, args: Any, kwargs: dict[str, Any], ours: list[Pretend], others: list[Tensor], to_card: bool
) -> None:
    waits = not kwargs.get("non_blocking")
    if name == "aten::_to_copy":
        if to_card and others and waits:
            _note("copy to the card")
    elif name == "aten::copy_":
        if ours and others and waits:
            _note("copy between the machine and the card")
    elif ours and name in _READS:
        _note(name)
    elif ours and name == "aten::repeat_interleave" and "Tensor" in func._overloadname:
        if kwargs.get("output_size") is None:
            _note(name)
    elif ours and name in _INDEXING:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            _note(f"{name} by a mask")
        if any(not isinstance(i, Pretend) for i in indices):
            _note(f"{name} by an index of the machine")
    elif ours:
        assert not any(x.dim() for x in others), f"{name}: devices are mixed"


def moved(x: Any) -> Any:
    """Return tensors, also in dictionaries and lists, on the pretend device."""
    return tree_map(lambda t: Pretend(t.detach().clone()) if type(t) is Tensor else t, x)


def back(x: Tensor) -> Tensor:
    """Return a tensor of the CPU."""
    return x.inner if isinstance(x, Pretend) else x


def move_module(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers to the pretend device."""
    for inner in module.modules():
        for name, p in list(inner._parameters.items()):
            if p is not None:
                inner._parameters[name] = nn.Parameter(Pretend(p.detach().clone()), requires_grad=False)
        for name, b in list(inner._buffers.items()):
            if b is not None:
                inner._buffers[name] = Pretend(b.detach().clone())
    return module
