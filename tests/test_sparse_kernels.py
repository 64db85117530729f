"""Block-sparse kernels for GPUs, as far as a CPU can tell: lists, masks and arithmetic against float64."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sparse import masked_dense, qkv, random_plan
from torch import Tensor
from torch._dynamo.utils import counters

import attnctl
from attnctl.errors import BackendError
from attnctl.kernels import xformers
from attnctl.kernels.sparse import dispatch as sparse
from attnctl.kernels.sparse import flex, triton, xformers_blocks
from attnctl.kernels.sparse.dispatch import SPARSE, block_sparse, choose_sparse, probe_sparse
from attnctl.plans import BlockPlan

torch.set_num_threads(1)
CPU = torch.device("cpu")
SIZES = [(96, 16, 16, 0, True), (90, 16, 16, 5, True), (90, 32, 16, 5, False), (70, 16, 32, 20, False)]
needs_xformers = pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")


def relative(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def in_plain_torch(q: Tensor, k: Tensor, v: Tensor, *, bias: Any = None, scale: float | None = None) -> Tensor:
    """Stand in for xformers' operator, which has no kernel for CPUs: read the same bias, compute the whole map."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = bias.materialize((q.shape[2], k.shape[2])).to(q.dtype)
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return ((logits + seen).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def xformers_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers, "memory_efficient", in_plain_torch)
    kernel = SPARSE["xformers"]._replace(missing=lambda device: "", declines=lambda *call: "")
    monkeypatch.setitem(SPARSE, "xformers", kernel)
    probe_sparse.cache_clear()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("n", "bq", "bk", "text", "first"), SIZES)
def test_flex_is_the_masked_map(n: int, bq: int, bk: int, text: int, first: bool) -> None:
    plan = random_plan(4, n, bq, bk, n_text=text, text_first=first)
    q, k, v = qkv(4, n + text, hk=2, dv=24, b=2)
    out = attnctl.attention(q, k, v, plan=plan, backend="flex")
    assert relative(out, masked_dense(q, k, v, plan, plan.span(n + text))) <= 1e-5


@pytest.mark.parametrize(("n", "bq", "bk", "text", "first"), SIZES)
def test_flex_lists_are_the_plan(n: int, bq: int, bk: int, text: int, first: bool) -> None:
    """A compiled kernel reads the lists alone and asks the mask in partial blocks only."""
    plan = random_plan(3, n, bq, bk, n_text=text, text_first=first)
    shown = torch.ones(1, text, dtype=torch.bool)
    mask = flex.block_mask(plan, 0, shown)
    assert (bq, bk) == mask.BLOCK_SIZE
    gap, fill = flex._gaps(plan, text)
    assert mask.seq_lengths == (n, n + gap + text + fill)
    assert (n + gap) % bk == 0 or not text
    assert (text + fill) % 128 == 0
    nk = plan.keep.shape[-1]
    blocks = flex.block_mask(plan, 0, shown, backward=True).to_dense()[0].bool()
    assert torch.equal(blocks[..., :nk], plan.keep[0])
    assert blocks[..., nk:].all()
    # Of the image's blocks only the last one is partial, and only where something follows it.
    partial = mask.kv_num_blocks[0]
    kept = plan.keep[0, :, :, -1] & bool(gap)
    after = blocks.shape[-1] - nk
    assert torch.equal(partial, kept.int() + after)
    assert mask.kv_indices.shape == mask.full_kv_indices.shape == (1, 3, blocks.shape[1], blocks.shape[-1])
    assert mask.kv_indices[..., : after + 1].unique().tolist() == [nk - 1, *range(nk, nk + after)]
    assert (mask.kv_indices[..., after] == nk - 1).all()
    # The lists are made once, and those of the backward pass only where it is asked for.
    assert flex.block_mask(plan, 0, shown).full_kv_indices is mask.full_kv_indices
    assert mask.q_indices is None
    assert flex.block_mask(plan, 0, shown, backward=True).q_indices is not None
    assert (flex.tile(96), flex.tile(64), flex.tile(256), flex.tile(48)) == (32, 64, 128, 16)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_reordered_full_and_half_precision() -> None:
    plan = random_plan(2, 60, 16, 16, n_text=3, order=[2, 5], grid=(3, 4, 5))
    q, k, v = qkv(2, 63)
    assert relative(block_sparse(q, k, v, plan, backend="flex"), masked_dense(q, k, v, plan, plan.span(63))) <= 1e-5
    full = BlockPlan.from_mask(torch.ones(2, 4, 4, dtype=torch.bool), 16, [2, 5], 3, grid=(3, 4, 5))
    dense = attnctl.attention(q, k, v)
    assert (block_sparse(q, k, v, full, backend="flex") - dense).abs().max() <= 1e-6
    low = [x.bfloat16() for x in (q, k, v)]
    want = masked_dense(*low, plan, plan.span(63))
    assert relative(block_sparse(*low, plan, backend="flex"), want) <= 8e-3


@pytest.mark.slow
@pytest.mark.compile
def test_flex_compiled_reads_the_lists_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask that allows everything, what is left out is what the lists leave out; one graph serves all layers."""
    torch.compiler.reset()
    counters.clear()

    def everything(*given: Any) -> Any:
        return lambda b, h, row, column: column >= 0

    monkeypatch.setattr(flex, "_kept", everything)
    none = torch.ones(1, 0, dtype=torch.bool)
    q, k, v = qkv(2, 200)
    for seed in (0, 1, 2):
        plan = random_plan(2, 200, 64, 64, seed=seed)
        mask = flex.block_mask(plan, 0, none)
        with torch.inference_mode():
            out = flex.compiled()(q, k, v, block_mask=mask)
        assert relative(out, masked_dense(q, k, v, plan, slice(0, 200))) <= 1e-5
    apart = BlockPlan.from_mask(torch.eye(4, dtype=torch.bool).expand(2, 4, 4).contiguous(), 64, n_image=200)
    for x in (k, v):
        x[:, :, 64:128] = torch.nan
    with torch.inference_mode():
        out = flex.compiled()(q, k, v, block_mask=flex.block_mask(apart, 0, none))
    assert torch.cat([out[:, :, :64], out[:, :, 128:]], 2).isfinite().all()
    assert counters["stats"]["unique_graphs"] == 1
    monkeypatch.undo()
    graphs = []
    for text in (3, 50, 128):  # prompts of any length are one shape
        plan = random_plan(2, 200, 64, 64, n_text=text)
        q, k, v = qkv(2, 200 + text)
        monkeypatch.setattr(flex, "eager", lambda: lambda *x, **options: flex.compiled()(*x, **options))
        with torch.inference_mode():
            out = block_sparse(q, k, v, plan, backend="flex")
        monkeypatch.undo()
        assert relative(out, masked_dense(q, k, v, plan, plan.span(200 + text))) <= 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


@needs_xformers
@pytest.mark.parametrize("copies", [1 << 30, 20_000, 1])
@pytest.mark.parametrize(("n", "bq", "bk", "text", "first"), SIZES)
def test_xformers_is_the_masked_map(
    n: int,
    bq: int,
    bk: int,
    text: int,
    first: bool,
    copies: int,
    xformers_on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xformers_blocks, "_COPY_BYTES", copies)
    plan = random_plan(4, n, bq, bk, n_text=text, text_first=first)
    q, k, v = qkv(4, n + text, hk=2, dv=24, b=2)
    out = attnctl.attention(q, k, v, plan=plan, backend="xformers")
    assert relative(out, masked_dense(q, k, v, plan, plan.span(n + text))) <= 1e-5


@needs_xformers
def test_xformers_reordered_full_gradients_and_nan(xformers_on_cpu: None) -> None:
    plan = random_plan(2, 60, 16, 16, n_text=3, order=[2, 5], grid=(3, 4, 5))
    ours, theirs = ([x.double().requires_grad_() for x in qkv(2, 63)] for _ in range(2))
    block_sparse(*ours, plan, backend="xformers").square().sum().backward()
    masked_dense(*theirs, plan, plan.span(63)).square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-12
    full = BlockPlan.from_mask(torch.ones(2, 4, 4, dtype=torch.bool), 16, [2, 5], 3, grid=(3, 4, 5))
    q, k, v = qkv(2, 63)
    assert (block_sparse(q, k, v, full, backend="xformers") - attnctl.attention(q, k, v)).abs().max() <= 1e-6
    apart = BlockPlan.from_mask(torch.eye(4, dtype=torch.bool)[None].expand(2, 4, 4).contiguous(), 16, n_image=60)
    q, k, v = qkv(2, 60)
    k[:, :, 16:32] = torch.nan
    parts = xformers_blocks.sequences(apart, 0, 0, 100, CPU)
    assert len(parts) > 1
    assert sum(p.keys for p in parts) == 120
    assert torch.cat([p.rows() for p in parts]).tolist() == list(range(120))
    rows = torch.cat([torch.arange(16), torch.arange(32, 60)])
    # The stand-in for xformers' operator sees masked keys, so each query block goes alone.
    alone = torch.cat(
        [
            in_plain_torch(*(x[0, 0, p.rows()][None, :, None] for x in (q, k, v)), bias=p.bias)
            for p in xformers_blocks.sequences(apart, 0, 0, 1, CPU)[:4]
        ],
        1,
    )
    assert alone[0, rows].isfinite().all()


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(Path(attnctl.__file__).parents[1])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, str(here / "interpreted_triton.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_triton_is_the_masked_map(interpreted: dict[str, Any]) -> None:
    limits = {"triton": 1e-5, "triton_int8": 2.5e-2, "float16": 2e-3}
    assert interpreted["probe"] == {"triton": "", "triton_int8": ""}
    assert len(interpreted["errors"]) == 7 + 4  # those with text again, with padding among it
    for case, errors in interpreted["errors"].items():
        for kernel, error in errors.items():
            assert error <= limits[kernel], (case, kernel, error)


def test_triton_joins_means_by_its_sums(interpreted: dict[str, Any]) -> None:
    assert interpreted["means"] <= 1e-5
    assert interpreted["sums"] <= 1e-5


def test_triton_with_odd_numbers(interpreted: dict[str, Any]) -> None:
    assert interpreted["nan stays out"]
    assert interpreted["large logits"]
    assert interpreted["any scale"] <= 1e-5
    assert interpreted["zeros"] == 0
    assert interpreted["smoothing"] <= 2.5e-2
    assert interpreted["int8"] == ["torch.int8", [1, 2, 3], "torch.int8", [1, 2, 3]]
    blocks, dtype, bits, gradient = interpreted["refused"]
    assert "block_q=24" in blocks
    assert "float64" in dtype
    assert "multiplies the bits of bfloat16" in bits
    assert "no backward pass" in gradient


@pytest.mark.parametrize(
    ("backend", "message"),
    [("triton", "Triton compiles for GPUs"), ("triton_int8", "Triton compiles for GPUs"), ("xformers", "CUDA only")],
)
def test_kernels_that_cannot_run_say_so(backend: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plan = random_plan(2, 60, 16, 16)
    if importlib.util.find_spec(backend.split("_")[0]) is None and backend != "xformers":
        message = "not installed"
    with pytest.raises(BackendError, match=f"{message}.*Kernels that can: 'gather'") as error:
        attnctl.attention(*qkv(2, 60), plan=plan, backend=backend)
    assert "Or leave the choice to 'auto'" in str(error.value)


def test_declines() -> None:
    plan = random_plan(2, 60, 20, 20)
    q, k, v = (x.to("meta") for x in qkv(2, 60))
    assert "block_q=20" in triton.declines(q, k, v, plan)
    assert flex.missing("mps")
    asked = qkv(2, 60)
    asked[0].requires_grad_()
    with pytest.raises(BackendError, match="no backward pass on CPU"):
        block_sparse(*asked, plan, backend="flex")
    wide = [torch.zeros(1, 2, 60, 512)] * 3
    assert "up to 256 wide" in triton.declines(*wide, random_plan(2, 60, 16, 16))


def test_the_choice_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is gather on a CPU; where the others run, the first that is right, and never the rounded one."""
    plan = random_plan(2, 60, 16, 16)
    q, k, v = qkv(2, 60)
    assert choose_sparse(q, k, v, plan) == "gather"
    monkeypatch.setattr(sparse, "refusal", lambda name, *call: "" if name != "flex" else "no compiler")

    class OnCuda:
        device, dtype, shape = torch.device("cuda"), q.dtype, q.shape

    assert choose_sparse(OnCuda(), k, v, plan) == "triton"  # type: ignore[arg-type]
    monkeypatch.setattr(sparse, "refusal", lambda name, *call: "" if name.startswith("triton_") else "no")
    monkeypatch.setattr(sparse, "_WARNED", set())
    with pytest.warns(UserWarning, match=r"attention under a plan is dense \(flex: no; triton: no\)") as seen:
        assert [choose_sparse(OnCuda(), k, v, plan) for _ in range(3)] == ["dense"] * 3  # type: ignore[arg-type]
    assert len(seen) == 1
    with pytest.raises(BackendError, match="Kernels that can: 'triton_int8'"):
        choose_sparse(q, k, v, plan, "flex")


def test_a_kernel_with_wrong_numbers_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, *rest: Any) -> Tensor:
        return q[:, :, 3:] + 1

    def breaks(*call: Any) -> Tensor:
        raise OSError("no such symbol\nand more")

    probe_sparse.cache_clear()
    monkeypatch.setitem(SPARSE, "flex", SPARSE["flex"]._replace(run=wrong))
    assert "away from the reference" in probe_sparse("flex", "cpu", torch.float32, 16)
    monkeypatch.setitem(SPARSE, "triton", SPARSE["triton"]._replace(run=breaks, missing=lambda device: ""))
    assert "OSError: no such symbol" in probe_sparse("triton", "cpu", torch.float32, 16)
    probe_sparse.cache_clear()


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (16, 16), (128, 64), (256, 128)])
def test_the_probe_runs_what_calls_run(block_q: int, block_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For 128 queries or fewer flex compiles flex-decoding, a kernel that no picture or video reaches."""
    seen: list[tuple[Tensor, Any, slice]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, plan: Any, group: int, image: slice, *rest: Any) -> Tensor:
        seen.append((q, plan, image))
        return SPARSE["reference"].run(q, k, v, plan, group, image, *rest)

    probe_sparse.cache_clear()
    for name in ("flex", "triton"):
        monkeypatch.setitem(SPARSE, name, SPARSE[name]._replace(run=noted, missing=lambda device: ""))
        assert probe_sparse(name, "cpu", torch.float32, 16, block_q, block_k) == ""
    probe_sparse.cache_clear()
    assert len(seen) == 2
    for q, plan, image in seen:
        n = image.stop - image.start
        assert n > 128
        assert q.shape[2] - n > 0  # text is there
        assert (plan.block_q, plan.block_k) == (block_q, block_k)
        assert n > max(block_q, block_k)
        assert n % block_q  # the last blocks are partial
        assert n % block_k
        assert plan.keep.any(-1).all()
        assert not plan.keep.all()
