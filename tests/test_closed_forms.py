"""The closed forms of the PAG family, each against its dense float64 map."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from dense_maps import (
    LAYOUTS,
    MASKS,
    N_IMAGE,
    N_TEXT,
    TARGETS,
    N,
    bias,
    block_map,
    logits_of,
    make_mask,
    naive_perturb,
    offered,
    qkv,
    target_map,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnctl import kernels
from attnctl.errors import ConfigError
from attnctl.kernels.perturbation.closed_forms import SCOPES

torch.set_num_threads(1)


# ---- every target, scope, mask, head selection


@pytest.mark.parametrize("hk", [4, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_perturb_is_the_definition(target: str, mask: str, layout: str, hk: int) -> None:
    q, k, v = qkv(hk=hk)
    m = make_mask(mask)
    image, text = LAYOUTS[layout]
    scopes = [s for s in SCOPES if (s != "image_block" or target == "identity") and (s != "text" or text)]
    for scope in scopes:
        for heads, u in (
            (None, 1.0),
            (None, 0.25),
            ((1, 2), 1.0),
            ((3, 0), 0.6),
            ((3, 0, 1), (0.1, 1.0, 0.0)),
        ):
            places = {"image": image, "text": text, "mask": m}
            out = kernels.perturb(q, k, v, target=offered(target), u=u, heads=heads, scope=scope, **places)
            want = naive_perturb(q, k, v, target=target, u=u, heads=heads or (0, 1, 2, 3), scope=scope, **places)
            assert out.shape == want.shape
            assert out.dtype == q.dtype
            assert (out - want).abs().max() <= 4e-6, (scope, heads, u)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scope", ["all", "image"])
def test_skipping_changes_nothing(target: str, mask: str, scope: str) -> None:
    q, k, v = qkv(hk=2)
    call = {
        "target": offered(target),
        "heads": (0, 2),
        "scope": scope,
        "image": slice(0, 12),
        "mask": make_mask(mask),
    }
    a, b = (kernels.perturb(q, k, v, u=1.0, skip=skip, **call) for skip in (True, False))
    assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_block_and_rows(mask: str, layout: str) -> None:
    q, k, v = qkv(hk=2)
    m = make_mask(mask)
    image, text = LAYOUTS[layout]
    out = kernels.image_block(q, k, v, m, image=image, text=text)
    wide = v.repeat_interleave(2, dim=1).double()
    assert (out - block_map(q, k, m, image) @ wide).abs().max() <= 4e-6
    if mask == "none" and text is None:
        assert torch.allclose(out, wide.float())
    rows = (logits_of(q, k) + bias(m)).softmax(-1) @ wide
    rows[..., image, :] = wide[..., image, :]
    assert (kernels.image_rows(q, k, v, m, image=image, text=text) - rows).abs().max() <= 2e-6


def test_image_block_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    whole = kernels.image_block(q, k, v, make_mask("dense"), image=slice(5, 17))
    best = kernels.argmax(q, k, v, make_mask("dense"))
    monkeypatch.setattr("attnctl.kernels.checks._MAX_ROWS", 5)
    assert torch.allclose(kernels.image_block(q, k, v, make_mask("dense"), image=slice(5, 17)), whole, atol=1e-6)
    assert torch.equal(kernels.argmax(q, k, v, make_mask("dense")), best)


def test_cross_attention_targets() -> None:
    q, _, _ = qkv(n=9)
    _, k, v = qkv(n=6, seed=1)
    for target in ("uniform", "query_mean", "argmax"):
        want = 0.5 * (logits_of(q, k).softmax(-1) + target_map(target, q, k, None)) @ v.double()
        assert (kernels.perturb(q, k, v, target=target, u=0.5) - want).abs().max() <= 2e-6
    with pytest.raises(ConfigError, match="9 queries and 6 keys"):
        kernels.perturb(q, k, v, target="identity")


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("target", TARGETS)
def test_half_precision(dtype: torch.dtype, atol: float, target: str) -> None:
    q, k, v = qkv(dtype=dtype)
    image, text = LAYOUTS["image_first"]
    for scope in ("all", "image_block") if target == "identity" else ("all",):
        call = {
            "u": 0.4,
            "heads": (0, 3),
            "scope": scope,
            "image": image,
            "text": text,
            "mask": make_mask("keys"),
        }
        out = kernels.perturb(q, k, v, target=offered(target), **call)
        assert out.dtype == dtype
        assert (out - naive_perturb(q, k, v, target=target, **call)).abs().max() <= atol


# ---- properties


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_properties(data: st.DataObject) -> None:
    hk, group, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 14))
    h = hk * group
    q, k, v = qkv(
        data.draw(st.integers(1, 2)),
        h,
        n,
        data.draw(st.integers(1, 8)),
        hk,
        seed=data.draw(st.integers(0, 99)),
    )
    target = offered(data.draw(st.sampled_from(TARGETS)))
    heads = tuple(data.draw(st.permutations(range(h)))[: data.draw(st.integers(1, h))])
    plain = kernels.attention(q, k, v)
    assert torch.equal(kernels.perturb(q, k, v, target=target, u=0.0, heads=heads), plain)
    assert torch.equal(kernels.perturb(q, k, v, target="identity"), v.repeat_interleave(group, dim=1))

    u = tuple(data.draw(st.lists(st.floats(0, 1), min_size=len(heads), max_size=len(heads))))
    out = kernels.perturb(q, k, v, target=target, u=u, heads=heads)
    others = [i for i in range(h) if i not in heads]
    assert torch.allclose(out[:, others], plain[:, others], atol=2e-6)
    order = data.draw(st.permutations(range(len(heads))))
    moved = kernels.perturb(q, k, v, target=target, u=tuple(u[i] for i in order), heads=tuple(heads[i] for i in order))
    assert torch.equal(moved, out)
    tensor = kernels.perturb(q, k, v, target=target, u=torch.tensor(u), heads=torch.tensor(heads))
    assert torch.allclose(tensor, out, atol=1e-5)

    whole = kernels.perturb(q, k, v, target=target, u=1.0, heads=heads, skip=False)
    halfway = kernels.perturb(q, k, v, target=target, u=0.5, heads=heads)
    assert torch.allclose(halfway, (plain + whole) / 2, atol=4e-6)


def test_full_replacement_never_touches_queries_and_keys() -> None:
    v = qkv()[2]
    nan = torch.full_like(v, torch.nan)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("attention was computed")

    assert kernels.perturb(nan, nan, v, plain=refuse) is v
    assert kernels.perturb(nan, nan, v, target="uniform", plain=refuse).isfinite().all()
    some = kernels.perturb(nan, nan, v, heads=(0, 1), plain=lambda q, k, v, m, s: torch.zeros_like(v))
    assert torch.equal(some[:, :2], v[:, :2])
    assert (some[:, 2:] == 0).all()


def test_replaced_heads_skip_their_attention() -> None:
    seen: list[tuple[int, int]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        seen.append((q.shape[1], q.shape[2]))
        return kernels.plain(q, k, v, mask, scale)

    q, k, v = qkv()
    kernels.perturb(q, k, v, heads=(0, 2, 3), plain=spy)
    kernels.perturb(q, k, v, heads=(0, 2, 3), u=0.5, plain=spy)
    kernels.perturb(q, k, v, heads=(0, 2, 3), skip=False, plain=spy)
    kernels.perturb(q, k, v, scope="image_block", image=slice(0, 12), plain=spy)
    kernels.perturb(q, k, v, scope="image_block", heads=(1,), image=slice(0, 12), plain=spy)
    assert seen == [(1, N), (4, N), (4, N), (4, N_TEXT), (1, N_TEXT), (3, N)]


# ---- no N x N tensor


class Largest(TorchDispatchMode):
    """Remember the largest tensor that any operation returns, and any that has two dimensions of N tokens."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.elements, self.squares = n, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
                self.squares += sum(size >= self.n for size in x.shape) >= 2
        return out


def test_no_map_is_ever_built() -> None:
    n, t, h = 1536, 16, 2
    q, k, v = qkv(1, h, n + t, 8)
    image, keys = slice(0, n), torch.arange(n + t).view(1, 1, 1, -1) < n + 9
    calls = {
        "identity": partial(kernels.perturb, u=0.5),
        "uniform": partial(kernels.perturb, target="uniform", u=0.5, mask=keys),
        "query_mean": partial(kernels.perturb, target="query_mean", u=0.5, mask=keys),
        "argmax": partial(kernels.perturb, target="argmax", u=1.0, mask=keys),
        "image_block": partial(kernels.perturb, scope="image_block", image=image, heads=(1,), mask=keys),
        "image_rows": partial(kernels.image_rows, image=image),
        "temperature": partial(kernels.temperature, x=2.0),
        "math": partial(kernels.attention, mask=keys, backend="math"),
        "blur": lambda q, k, v: kernels.blur_queries(q, (48, 32), 3.0, image),
    }
    for name, call in calls.items():
        with Largest(n) as watched:
            call(q, k, v)
        assert watched.squares == 0, name
        assert watched.elements <= h * 256 * (n + t), name
    with Largest(n) as watched:
        logits_of(q, k)
    assert watched.squares > 0, "the watcher must notice a map"


# ---- gradients and torch.compile


@pytest.mark.parametrize("target", ["identity", "uniform", "query_mean", "temperature", "image_block"])
@pytest.mark.parametrize("u", [0.3, 1.0])
def test_gradients(target: str, u: float) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 5, 3, dtype=torch.float64))
    how: dict = {"u": u, "heads": (1,), "mask": make_mask("keys", 1, 2, 5)}
    how |= {"scope": target, "image": slice(0, 3)} if target == "image_block" else {"target": offered(target)}
    assert torch.autograd.gradcheck(lambda *x: kernels.perturb(*x, **how), (q, k, v))


def test_gradients_of_argmax_blur_and_strength() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 6, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda v: kernels.argmax(q, k, v), v)
    assert torch.autograd.gradcheck(lambda q: kernels.blur_queries(q, (2, 3), 0.8), q)
    u = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: kernels.perturb(q, k, v, u=u), u)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("target", "scope"),
    [(t, s) for t in TARGETS for s in ("all", "image")] + [("identity", "image_block")],
)
def test_compiles_without_graph_breaks(target: str, scope: str) -> None:
    q, k, v = qkv(hk=2)
    strengths = torch.tensor([0.2, 0.7])
    places = {"scope": scope, "image": slice(0, 12), "mask": make_mask("keys")}

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        go = partial(kernels.perturb, q, k, v, target=offered(target), **places)
        return go(u=1.0), go(u=0.5, heads=(1, 2)), go(u=1.0, heads=(0,)), go(u=u, heads=(3, 1))

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for got, want in zip(compiled(q, k, v, strengths), run(q, k, v, strengths), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


# ---- blurred queries


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blur_is_a_reflected_gaussian(sigma: float, layout: str) -> None:
    image, _ = LAYOUTS[layout]
    grid = (3, 4) if layout != "image_only" else (1, N)
    q, _, _ = qkv()
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    taps = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
    kernel = np.outer(taps, taps) / np.outer(taps, taps).sum()
    want = q.double().clone()
    for b, h, c in np.ndindex(2, 4, 8):
        plane = np.pad(q[b, h, image, c].reshape(grid).double().numpy(), size // 2, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(plane, (size, size))
        want[b, h, image, c] = torch.from_numpy((windows * kernel).sum((-1, -2)).reshape(-1).copy())
    out = kernels.blur_queries(q, grid, sigma, image)
    assert (out - want).abs().max() <= 2e-6


def test_blur_limits() -> None:
    q, _, _ = qkv()
    image = slice(0, N_IMAGE)
    assert torch.equal(kernels.blur_queries(q, (3, 4), 0.0, image), q)
    out = kernels.blur_queries(q, (3, 4), math.inf, image)
    assert torch.allclose(out[..., image, :], q[..., image, :].mean(2, keepdim=True).expand(-1, -1, 12, -1))
    assert torch.equal(out[..., N_IMAGE:, :], q[..., N_IMAGE:, :])
    with pytest.raises(ConfigError, match=r"grid=\(4, 4\) was given for 12 image tokens"):
        kernels.blur_queries(q, (4, 4), 1.0, image)
    for sigma in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="sigma="):
            kernels.blur_queries(q, (3, 4), sigma, image)


# ---- bad input


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"u": 1.3}, r"u=1\.3 was given"),
        ({"u": -0.1}, "from 0 .* to 1"),
        ({"u": math.nan}, "u=nan"),
        ({"u": (0.1, 0.2)}, "2 strengths u were given for 4"),
        ({"u": torch.tensor([0.1, 0.2])}, "one per selected head"),
        ({"u": torch.tensor([0.1, 2.0, 0.0, 0.0])}, "from 0 .* to 1"),
        ({"heads": (0, 4)}, "from 0 to 3"),
        ({"heads": (-1,)}, "from 0 to 3"),
        ({"heads": (1, 1)}, "different whole numbers"),
        ({"heads": ()}, "at least one"),
        ({"heads": torch.tensor([7])}, "from 0 to 3"),
        ({"target": "identty"}, "Did you mean 'identity'"),
        ({"scope": "imge_block"}, "Did you mean 'image_block'"),
        ({"scope": "image"}, "without image="),
        ({"scope": "image_block"}, "without image="),
        ({"scope": "text", "image": slice(0, 12)}, "without text="),
        ({"scope": "image", "image": slice(0, 40)}, "for 17 tokens"),
        ({"scope": "image", "image": slice(3, 3)}, "first < end"),
        ({"scope": "image", "image": slice(0, 12), "text": slice(10, 17)}, "cover all"),
        ({"scope": "image", "image": slice(0, 12), "text": slice(12, 16)}, "cover all"),
        ({"scope": "image_block", "image": slice(0, 12), "target": "uniform"}, "a target of its own"),
    ],
)
def test_bad_input(how: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kernels.perturb(*qkv(), **how)


def test_image_scopes_need_the_same_tokens() -> None:
    q, _, _ = qkv(n=9)
    _, k, v = qkv(n=6)
    with pytest.raises(ConfigError, match="same tokens"):
        kernels.perturb(q, k, v, target="uniform", scope="image", image=slice(0, 4))
    with pytest.raises(ConfigError, match="same tokens"):
        kernels.image_block(q, k, v, image=slice(0, 4))
