"""attention(): backends, masks, grouped heads, choice, errors; each against a dense float64 map."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnctl import kernels
from attnctl.errors import BackendError, ConfigError
from attnctl.kernels import dispatch, xformers
from attnctl.kernels import math as reference

torch.set_num_threads(1)
MASKS = ("none", "keys", "keys_float", "keys_2d", "dense", "heads_float", "dead_row")


def qkv(b=2, h=4, n=9, d=8, *, hk=None, s=None, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hk, s = hk or h, s or n
    shapes = (b, h, n, d), (b, hk, s, d), (b, hk, s, d)
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def make_mask(kind: str, b: int, h: int, n: int, s: int) -> Tensor | None:
    g = torch.Generator().manual_seed(7)
    keys = torch.rand(b, 1, 1, s, generator=g) < 0.7
    keys[..., 0] = True
    dense = torch.rand(b, 1, n, s, generator=g) < 0.6
    dense |= torch.eye(n, s, dtype=torch.bool)
    match kind:
        case "none":
            return None
        case "keys":
            return keys
        case "keys_float":
            return (~keys).double() * -10000.0
        case "keys_2d":
            return dense[0, 0]
        case "dense":
            return dense
        case "heads_float":
            return torch.randn(b, h, n, s, generator=g)
        case "dead_row":
            dense[:, :, 1] = False
            return dense
    raise AssertionError(kind)


def dense_map(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Build the whole map in float64, as the formula says; a row that may attend to nothing is zero."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double()
    logits = q.double() @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        add = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
        logits = logits + add.double()
    return logits.softmax(-1).nan_to_num(0.0)


def values(v: Tensor, heads: int) -> Tensor:
    return v.repeat_interleave(heads // v.shape[1], dim=1).double()


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("hk", "s"), [(4, 9), (2, 9), (1, 5)])
def test_attention_is_the_dense_map(backend: str, mask: str, hk: int, s: int) -> None:
    q, k, v = qkv(hk=hk, s=s)
    m = make_mask(mask, 2, 4, 9, s)
    for scale in (None, 0.3):
        out = kernels.attention(q, k, v, mask=m, scale=scale, backend=backend)
        want = dense_map(q, k, m, scale) @ values(v, 4)
        assert out.dtype == q.dtype
        assert (out - want).abs().max() <= 2e-6


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 2),
    hk=st.integers(1, 3),
    group=st.integers(1, 3),
    n=st.integers(1, 12),
    s=st.integers(1, 12),
    d=st.integers(1, 9),
    kind=st.sampled_from(MASKS[:-1]),
)
def test_backends_agree_on_any_shape(b: int, hk: int, group: int, n: int, s: int, d: int, kind: str) -> None:
    q, k, v = qkv(b, hk * group, n, d, hk=hk, s=s)
    m = make_mask(kind, b, hk * group, n, s)
    if m is not None and m.dtype == torch.bool and not m.any(-1).all():
        m = m | ~m.any(-1, keepdim=True)
    a, c = (kernels.attention(q, k, v, mask=m, backend=name) for name in ("sdpa", "math"))
    assert torch.allclose(a, c, atol=2e-6)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_half_precision(dtype: torch.dtype, atol: float, backend: str) -> None:
    q, k, v = qkv(n=33, dtype=dtype)
    # A float32 mask is accepted and cast.
    m = make_mask("heads_float", 2, 4, 33, 33)
    out = kernels.attention(q, k, v, mask=m, backend=backend)
    assert out.dtype == dtype
    assert (out - dense_map(q, k, m) @ v.double()).abs().max() <= atol


def test_math_in_chunks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(n=50)
    m = make_mask("dense", 2, 4, 50, 50)
    whole = reference.run(q, k, v, m)
    monkeypatch.setattr("attnctl.kernels.checks._MAX_ROWS", 7)
    assert torch.allclose(reference.run(q, k, v, m), whole, atol=1e-6)


def test_dead_rows_are_zero_and_differentiable() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float64))
    m = make_mask("dead_row", 2, 4, 9, 9)
    out = kernels.attention(q, k, v, mask=m, backend="math")
    assert (out[:, :, 1] == 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_gradients(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 4, 3, hk=1, dtype=torch.float64))
    m = make_mask("keys", 1, 2, 4, 4)
    assert torch.autograd.gradcheck(lambda *x: kernels.attention(*x, mask=m, backend=backend), (q, k, v))


def test_choice_on_cpu_is_sdpa_and_visible() -> None:
    q, k, v = qkv()
    assert kernels.choose(q, k, v) == "sdpa"
    assert kernels.choose(q, k, v, None, "math") == "math"
    found = kernels.backends("cpu")
    assert [b for b in found if found[b].available] == ["sdpa", "math"]
    assert "CUDA" in found["xformers"].reason


def test_forced_backend_that_cannot_run_names_the_reason_and_the_others() -> None:
    q, k, v = qkv()
    with pytest.raises(BackendError, match=r"xformers.*CUDA only.*'cpu'.*can: 'sdpa', 'math'"):
        kernels.attention(q, k, v, backend="xformers")
    with pytest.raises(BackendError, match=r"expected 'auto' or one of.*Did you mean 'sdpa'"):
        kernels.attention(q, k, v, backend="spda")


def test_plan_must_be_a_plan() -> None:
    with pytest.raises(ConfigError, match=r"expected an attnctl\.plans\.BlockPlan"):
        kernels.attention(*qkv(), plan=object())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 9, 8), (2, 9, 8), (2, 9, 8)), "four dimensions"),
        (((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 7, 8)), "do not belong together"),
        (((2, 4, 9, 8), (2, 4, 9, 6), (2, 4, 9, 6)), "do not belong together"),
        (((1, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8)), "do not belong together"),
        (((2, 4, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8)), "divides the number of query heads"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kernels.attention(*(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize("shape", [(2, 9), (2, 4, 9, 8), (3, 1, 1, 9), (1, 2, 4, 9, 9)])
def test_mask_that_does_not_broadcast(shape: tuple) -> None:
    with pytest.raises(ConfigError, match=r"\[B, H, Nq, Nk\] = \[2, 4, 9, 9\]"):
        kernels.attention(*qkv(), mask=torch.ones(shape, dtype=torch.bool))


def test_import_and_probe_are_silent_and_leave_xformers_alone() -> None:
    code = (
        "import sys, torch\nfrom attnctl import kernels\nkernels.backends('cpu'); kernels.backends('cuda')\n"
        "assert torch.cuda.is_available() or not any(m.split('.')[0] == 'xformers' for m in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_probe_reports_what_a_broken_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object) -> Tensor:
        raise OSError("libcudart.so.12: cannot open\nmore")

    def wrong(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        return v * 2

    nothing = dispatch._KERNELS["math"]
    for run, reason in (
        (raises, "OSError: libcudart.so.12: cannot open"),
        (wrong, "differs from the reference"),
    ):
        monkeypatch.setitem(dispatch._KERNELS, "broken", nothing._replace(run=run))
        said = dispatch.probe.__wrapped__("broken", "cpu", torch.float32, 8)
        assert said.endswith(reason)


class _StandIn:
    """xformers.ops' documented contract: [B, N, H, D], expanded bias in q's dtype with aligned rows."""

    @staticmethod
    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        if attn_bias is not None:
            assert attn_bias.dtype == q.dtype
            assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            assert attn_bias.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
            assert attn_bias.isfinite().all()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("mask", [m for m in MASKS if m != "keys_2d"])
def test_xformers_layout_and_bias_rules(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers, "_ops", lambda: _StandIn)
    q, k, v = qkv(hk=2)
    m = make_mask(mask, 2, 4, 9, 9)
    out = xformers.run(q.transpose(-2, -1).contiguous().transpose(-2, -1), k, v, m, 0.3)
    assert (out - dense_map(q, k, m, 0.3) @ values(v, 4)).abs().max() <= 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", [m for m in MASKS if m != "keys_2d"])
def test_on_cuda_every_able_backend_agrees(dtype: torch.dtype, mask: str) -> None:
    q, k, v = (x.cuda() for x in qkv(n=70, d=64, hk=2, dtype=dtype))
    m = make_mask(mask, 2, 4, 70, 70)
    want = dense_map(q.cpu(), k.cpu(), m) @ values(v.cpu(), 4)
    m = None if m is None else m.cuda()
    able = [b.name for b in kernels.backends("cuda", dtype).values() if b.available]
    assert "sdpa" in able
    for name in ("auto", *able):
        out = kernels.attention(q, k, v, mask=m, backend=name)
        assert (out.cpu() - want).abs().max() <= 2e-2, name


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    q, k, v = qkv(hk=2)
    m = make_mask("keys", 2, 4, 9, 9)
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: kernels.attention(*x, mask=m, backend=backend), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), kernels.attention(q, k, v, mask=m, backend=backend))


def test_public_names() -> None:
    assert all(hasattr(kernels, name) for name in kernels.__all__)
