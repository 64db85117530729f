"""The perturbations of the PAG family written out as attention maps in float64, and the inputs that tests give them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from attnctl import kernels
from attnctl.core.call import AttnCall

N_IMAGE, N_TEXT = 12, 5
N = N_IMAGE + N_TEXT
LAYOUTS = {
    "image_first": (slice(0, N_IMAGE), slice(N_IMAGE, N)),
    "text_first": (slice(N_TEXT, N), slice(0, N_TEXT)),
    "image_only": (slice(0, N), None),
}
TARGETS = ("identity", "uniform", "query_mean", "argmax", "temperature")
MASKS = ("none", "keys", "keys_float", "dense", "heads")


def qkv(b=2, h=4, n=N, d=8, hk=None, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, x, n, d, generator=g) for x in (h, hk or h, hk or h))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def make_mask(kind: str, b: int = 2, h: int = 4, n: int = N) -> Tensor | None:
    g = torch.Generator().manual_seed(7)
    keys = torch.rand(b, 1, 1, n, generator=g) < 0.7
    keys[..., 0] = True
    match kind:
        case "none":
            return None
        case "keys":
            return keys
        case "keys_float":
            return (~keys).float() * -10000.0
        case "dense":
            return (torch.rand(b, 1, n, n, generator=g) < 0.6) | torch.eye(n, dtype=torch.bool)
        case "heads":
            return torch.randn(b, h, 1, n, generator=g)
    raise AssertionError(kind)


def bias(mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.zeros(1, 1, 1, 1).double()
    return (
        torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.double()
    )


def logits_of(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double()
    return q.double() @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)


def map_of(call: AttnCall) -> Tensor:
    """Write out the map of an attention call, [B, H, N, N]; a query without a key gives 0."""
    return (logits_of(call.q, call.k, call.scale) + bias(call.mask)).softmax(-1).nan_to_num(0.0)


def values_of(call: AttnCall) -> Tensor:
    """Return the values of a call, one head for each of the queries'."""
    return call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)


def attended(call: AttnCall) -> Tensor:
    """Multiply the values of a call by its map, [B, H, N, D], in the type of the values."""
    return (map_of(call) @ values_of(call).double()).to(call.v.dtype)


def target_map(name: str, q: Tensor, k: Tensor, mask: Tensor | None, rows: slice = slice(None)) -> Tensor:
    logits = logits_of(q, k)
    match name:
        case "identity":
            return torch.eye(q.shape[2]).double().expand_as(logits)
        case "uniform":
            return (torch.zeros_like(logits) + bias(mask)).softmax(-1)
        case "query_mean":
            mean = q[..., rows, :].double().mean(2, keepdim=True).expand(-1, -1, q.shape[2], -1)
            return (logits_of(mean, k) + bias(mask)).softmax(-1)
        case "argmax":
            best = (logits + bias(mask)).argmax(-1)
            return torch.nn.functional.one_hot(best, k.shape[2]).double()
        case "temperature":
            return (logits * 0.4 + bias(mask)).softmax(-1)
    raise AssertionError(name)


def block_map(q: Tensor, k: Tensor, mask: Tensor | None, image: slice) -> Tensor:
    logits = logits_of(q, k) + bias(mask)
    n = image.stop - image.start
    logits[..., image, image] = logits[..., image, image].masked_fill(~torch.eye(n, dtype=torch.bool), -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)


def naive_perturb(q, k, v, *, target, u, heads, scope, image, text, mask) -> Tensor:
    """(1-u) A + u T on the selected heads and rows, then times v: nothing but the definition."""
    a = (logits_of(q, k) + bias(mask)).softmax(-1)
    taken = {"all": slice(None), "text": text}.get(scope, image)
    goal = block_map(q, k, mask, image) if scope == "image_block" else target_map(target, q, k, mask, taken)
    for i, h in enumerate(heads):
        a[:, h, taken] = torch.lerp(a[:, h, taken], goal[:, h, taken], float(u[i] if isinstance(u, tuple) else u))
    return a @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).double()


def offered(target: str) -> object:
    return partial(kernels.temperature, x=0.4) if target == "temperature" else target
