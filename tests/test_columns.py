"""Columns of attention maps: exact against a dense float64 map, with gradients, without the map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import MASKS, dense_map, make_mask, qkv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnctl.errors import ConfigError
from attnctl.kernels import columns
from attnctl.kernels.maps import FEW_KEYS

LONG = FEW_KEYS + 22


def make_weights(n: int, c: int, batch: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(3)
    shape = (n, c) if batch is None else (batch, n, c)
    w = (torch.rand(shape, generator=g) < 0.2).double()
    return w / w.sum(-2, keepdim=True).clamp_min(1)


class Largest(TorchDispatchMode):
    """Note the most elements that any tensor has had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.__name__)
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n", [9, LONG])
@pytest.mark.parametrize("hk", [4, 2])
def test_columns_are_the_dense_map_times_weights(mask: str, n: int, hk: int) -> None:
    q, k, _ = qkv(n=n, d=8, hk=hk, dtype=torch.float64)
    m = make_mask(mask, 2, 4, n, n)
    for w in (make_weights(n, 3), make_weights(n, 3, 2), make_weights(n, 19)):
        for scale in (None, 0.3):
            out = columns(q, k, w, mask=m, scale=scale)
            want = dense_map(q, k, m, scale) @ (w if w.dim() == 2 else w.unsqueeze(1))
            assert out.dtype == torch.float64
            assert (out - want).abs().max() <= 1e-12


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, LONG), s=st.integers(1, LONG), d=st.integers(1, 17), c=st.integers(1, 20), first=st.integers(0, 1)
)
def test_any_shape_and_rows(n: int, s: int, d: int, c: int, first: int) -> None:
    q, k, _ = qkv(1, 2, n, d, s=s, dtype=torch.float64)
    w, rows = make_weights(s, c), slice(first, n)
    assert (columns(q, k, w, rows=rows) - (dense_map(q, k) @ w)[..., rows, :]).abs().max() <= 1e-12


@pytest.mark.parametrize("n", [12, LONG])
@pytest.mark.parametrize("mask", ["none", "keys", "keys_float", "dead_row"])
def test_gradients_are_those_of_the_written_out_map(n: int, mask: str) -> None:
    q, k, _ = (x.requires_grad_() for x in qkv(n=n, hk=2, dtype=torch.float64))
    m, w, rows = make_mask(mask, 2, 4, n, n), make_weights(n, 2), slice(2, n)
    pull = torch.randn(2, 4, n - 2, 2, generator=torch.Generator().manual_seed(1)).double()
    got = torch.autograd.grad((columns(q, k, w, mask=m, rows=rows) * pull).sum(), (q, k))
    logits = q @ k.repeat_interleave(2, dim=1).transpose(-2, -1) * q.shape[-1] ** -0.5
    if m is not None:
        bias = torch.zeros(m.shape).double().masked_fill(~m, -1e30) if m.dtype == torch.bool else m.double()
        logits = logits + bias
    probs = logits.softmax(-1)
    if mask == "dead_row":
        assert m is not None
        probs = probs * m.any(-1, keepdim=True)
    want = torch.autograd.grad(((probs @ w)[..., rows, :] * pull).sum(), (q, k))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [9, LONG])
def test_half_precision_inputs_give_float32(dtype: torch.dtype, n: int) -> None:
    q, k, _ = qkv(n=n, dtype=dtype)
    w = make_weights(n, 2)
    out = columns(q, k, w, mask=make_mask("keys_float", 2, 4, n, n))
    assert out.dtype == torch.float32
    assert (out - dense_map(q, k, make_mask("keys_float", 2, 4, n, n)) @ w).abs().max() <= 1e-6


@pytest.mark.parametrize("mask", ["none", "keys"])
def test_no_map_is_built_for_a_long_sequence(mask: str) -> None:
    n = 2000
    q, k, _ = (x.requires_grad_() for x in qkv(1, 2, n, 8))
    w = make_weights(n, 3)
    with Largest() as seen:
        columns(q, k, w, mask=make_mask(mask, 1, 1, 1, n)).sum().backward()
    assert any("flash" in name for name in seen.names), seen.names
    assert seen.elements <= 2 * n * 8 * 2 < n * n // 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(8, 2)}, r"weights \(8, 2\) were given for 9 keys"),
        ({"weights": torch.ones(9)}, "were given for 9 keys"),
        ({"weights": torch.ones(9, 0)}, "were given for 9 keys"),
        ({"weights": torch.ones(3, 9, 1)}, "weights for 3 samples"),
        ({"rows": slice(4, 10)}, "rows="),
        ({"rows": slice(4, 4)}, "rows="),
        ({"k": torch.ones(2, 3, 9, 8)}, "key heads"),
        ({"q": torch.ones(4, 9, 8)}, "four dimensions"),
        ({"mask": torch.ones(1, 1, 1, 5)}, "a mask of shape"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    q, k, _ = qkv()
    with pytest.raises(ConfigError, match=message):
        columns(**{"q": q, "k": k, "weights": torch.ones(9, 2), **change})
