"""Run the Triton kernel step by step on a CPU and print its errors as JSON; test_sparse_kernels.py runs this.

Triton decides at import whether to interpret, so this is a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import sys

import torch
from test_sparse import masked_dense, qkv, random_plan
from torch import Tensor

from attnctl.errors import BackendError
from attnctl.kernels.sparse import triton
from attnctl.kernels.sparse.dispatch import block_sparse, probe_sparse
from attnctl.kernels.sparse.select import keep_density
from attnctl.plans import BlockPlan
from attnctl.plans.blocks import Blocks

torch.set_num_threads(1)


def relative(out: Tensor, want: Tensor) -> float:
    """Return the L2 norm of the error over that of what is wanted."""
    return float((out.double() - want).norm() / want.norm())


def cases() -> dict[str, BlockPlan]:
    """Return plans: ragged, tall and wide blocks, several tiles in a block, text first and last, reordered, full."""
    full = torch.ones(2, 3, 3, dtype=torch.bool)
    one = torch.eye(3, dtype=torch.bool).expand(2, 3, 3).contiguous()
    return {
        "ragged": random_plan(2, 41, 16, 16, density=0.3),
        "tall, text first": random_plan(2, 41, 32, 16, n_text=5),
        "wide, text last": random_plan(2, 60, 16, 32, n_text=20, text_first=False),
        "several tiles": random_plan(1, 150, 256, 128, density=0.5),
        "reordered": random_plan(2, 60, 16, 16, n_text=3, order=[2, 5], grid=(3, 4, 5)),
        "full": BlockPlan.from_mask(full, 16, ["WFH", "HWF"], 3, grid=(2, 4, 5)),
        "one block a row": BlockPlan.from_mask(one, 16, n_image=48),
    }


def means() -> dict[str, float]:
    """Return errors of the kernel's sums, and of blocks left out that count as their means, in tiles of the grid."""
    q, k, v = qkv(2, 73, 16)
    g = torch.Generator().manual_seed(0)
    keep = keep_density(torch.rand(1, 2, 5, 5, generator=g), 0.4, by_row=True)
    blocks = Blocks(keep=keep, block_q=16, block_k=16, order=(2, 6), grid=(2, 5, 7), n_image=70, n_text=3, rest=True)
    out, want = (block_sparse(q, k, v, blocks, backend=name) for name in ("triton", "reference"))
    plain = BlockPlan.from_mask(keep, 16, [0, 0], 3, n_image=70)
    _, sums = triton.run_with_sums(q, k, v, plain, 0, slice(3, 73), None)
    tokens = keep[0].repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :70, :70]
    seen = torch.nn.functional.pad(tokens, (3, 0), value=True)
    logits = (q[:, :, 3:].double() @ k.double().mT / 4).masked_fill(~seen, -torch.inf)
    return {"means": relative(out, want.double()), "sums": float((logits.logsumexp(-1) - sums).abs().max())}


def main() -> int:
    """Print relative errors of every case and kernel, and what becomes of NaN, of infinities and of bad calls."""
    found: dict[str, object] = {
        "probe": {n: probe_sparse(n, "cpu", torch.float32, 16) for n in ("triton", "triton_int8")}
    }
    errors: dict[str, dict[str, float]] = {}
    for name, plan in cases().items():
        assert plan.n_image is not None
        n = plan.n_image + plan.n_text
        q, k, v = qkv(plan.heads, n, 24, dv=20, hk=1, b=2 if name == "ragged" else 1)
        k = k + 3 * torch.linspace(-1, 1, 24)  # an uneven mean, as real keys have
        want = masked_dense(q, k, v, plan, plan.span(n))
        errors[name] = {
            kernel: relative(block_sparse(q, k, v, plan, backend=kernel), want) for kernel in ("triton", "triton_int8")
        }
        if plan.n_text:
            words = torch.arange(plan.n_text).expand(len(q), -1) != 1
            for kernel in ("triton", "triton_int8"):
                out, want = (block_sparse(q, k, v, plan, words=words, backend=x) for x in (kernel, "reference"))
                errors[f"{name}, padded"] = errors.get(f"{name}, padded", {}) | {kernel: relative(out, want.double())}
        if name == "reordered":
            low = [x.half() for x in (q, k, v)]
            want = masked_dense(*low, plan, plan.span(n))
            errors[name]["float16"] = relative(block_sparse(*low, plan, backend="triton"), want)
    found["errors"] = errors
    plan = BlockPlan.from_mask(torch.eye(4, dtype=torch.bool)[None].expand(2, 4, 4).contiguous(), 16, n_image=60)
    q, k, v = qkv(2, 60)
    signed = [block_sparse(q, k, v, plan, scale=s, backend=x) for s in (-0.3, 0.0) for x in ("triton", "reference")]
    found["any scale"] = max(relative(signed[i], signed[i + 1].double()) for i in (0, 2))
    for x in (k, v):
        x[:, :, 16:32] = torch.nan
    rows = torch.cat([torch.arange(16), torch.arange(32, 60)])
    found["nan stays out"] = bool(block_sparse(q, k, v, plan, backend="triton")[:, :, rows].isfinite().all())
    big = block_sparse(300 * q, 300 * q, q, plan, backend="triton")
    found["large logits"] = bool(big.isfinite().all())
    zero = block_sparse(*(torch.zeros_like(q) for _ in range(3)), plan, backend="triton_int8")
    found["zeros"] = float(zero.abs().max())
    found["refused"] = []
    odd = random_plan(2, 60, 24, 16)
    for call in (
        lambda: block_sparse(*qkv(2, 60), odd, backend="triton"),
        lambda: block_sparse(*(x.double() for x in qkv(2, 60)), plan, backend="triton"),
        lambda: block_sparse(*(x.bfloat16() for x in qkv(2, 60)), plan, backend="triton"),
        lambda: block_sparse(*(x.requires_grad_() for x in qkv(2, 60)), plan, backend="triton"),
    ):
        try:
            call()
        except BackendError as error:
            found["refused"].append(str(error))  # type: ignore[attr-defined]
    # Without taking the mean off, uneven keys cost precision.
    q, k, v = qkv(2, 48)
    uneven = k + 8 * torch.linspace(-1, 1, 16)
    plan = cases()["one block a row"]
    smooth = block_sparse(q, uneven, v, plan, backend="triton_int8")
    found["smoothing"] = relative(smooth, masked_dense(q, uneven, v, plan, plan.span(48)))
    q8, scales, k8, k_scales = triton.quantised(q, uneven, plan, 0, slice(0, 48))
    found["int8"] = [str(q8.dtype), list(scales.shape), str(k8.dtype), list(k_scales.shape)]
    found |= means()
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
