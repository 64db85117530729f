"""The methods written out in float64, map by map, each beside what the package computes: the rows of fidelity.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import zoo
from torch import Tensor

import attnctl
from attnctl import kernels
from attnctl.kernels.bands import Band
from attnctl.kernels.temporal import Layer, guided_maps, weigh
from attnctl.plans import BlockPlan
from attnctl.plans.orders import permutation
from attnctl.processors import SLG, TPG
from attnctl.processors.agent import agent_attention
from attnctl.processors.editing.fusion import CrossEdit, Split, fold_values, self_fuse, take_queries
from attnctl.processors.enhance_video import cross_frame_intensity
from attnctl.processors.latent import losses
from attnctl.processors.nag import normalized_guidance

__all__ = ["GRID", "N_IMAGE", "ROWS", "Both", "draw", "qkv", "row", "softmax_map"]

N_IMAGE, N_TEXT, GRID = 256, 77, (16, 16)
N = N_IMAGE + N_TEXT
IMAGE, TEXT = slice(0, N_IMAGE), slice(N_IMAGE, N)
Both = tuple[Tensor, Tensor]
ROWS: dict[str, tuple[str, Callable[[], Both]]] = {}


def row(name: str, formula: str) -> Callable[[Callable[[], Both]], Callable[[], Both]]:
    """Enter a function that returns what the package computes, and what the formula gives."""

    def enter(function: Callable[[], Both]) -> Callable[[], Both]:
        ROWS[name] = (formula, function)
        return function

    return enter


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(n: int = N, b: int = 1, h: int = 4, d: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values [b, h, n, d]; the queries are large enough for maps that are far from even."""
    return 2 * draw(b, h, n, d), draw(b, h, n, d, seed=1), draw(b, h, n, d, seed=2)


def softmax_map(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Write the map out in float64."""
    return (q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


# Guidance


@row("PAG", "A = I")
def pag() -> Both:
    q, k, v = qkv()
    return kernels.perturb(q, k, v), torch.eye(N).double() @ v.double()


@row("PAG, image_block", "A = softmax over the token itself and the text")
def pag_block() -> Both:
    q, k, v = qkv()
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    others = ~torch.eye(N_IMAGE, dtype=torch.bool)
    logits[..., IMAGE, IMAGE] = logits[..., IMAGE, IMAGE].masked_fill(others, -math.inf)
    got = kernels.perturb(q, k, v, scope="image_block", image=IMAGE, text=TEXT)
    return got, logits.softmax(-1) @ v.double()


def softpag(target: str, goal: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Both]:
    """Lean half of the heads towards a target map."""

    def both() -> Both:
        q, k, v = qkv()
        a = softmax_map(q, k)
        a[:, :2] = 0.5 * a[:, :2] + 0.5 * goal(q, k, a).expand_as(a)[:, :2]
        return kernels.perturb(q, k, v, target=target, u=0.5, heads=(0, 1)), a @ v.double()

    return both


TARGETS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "identity": ("I", lambda q, k, a: torch.eye(N).double()),
    "uniform": ("1 / N", lambda q, k, a: torch.full_like(a, 1 / N)),
    "query_mean": ("softmax(mean(q) k^T)", lambda q, k, a: softmax_map(q.double().mean(2, keepdim=True), k)),
    "argmax": ("one-hot(argmax A)", lambda q, k, a: F.one_hot(a.argmax(-1), N).double()),
}
for _name, (_formula, _goal) in TARGETS.items():
    row(f"SoftPAG, {_name}", f"A' = (1 - u) A + u T on some heads, T = {_formula}")(softpag(_name, _goal))


@row("SEG", "q blurred by a Gaussian with reflected edges")
def seg() -> Both:
    q, k, v = qkv(N_IMAGE)
    sigma, side = 1.5, 9
    taps = torch.exp(-0.5 * ((torch.arange(side).double() - side // 2) / sigma) ** 2)
    window = (taps[:, None] * taps / taps.sum() ** 2).expand(1, 1, side, side)
    planes = q.double().mT.reshape(-1, 1, *GRID)
    blurred = F.conv2d(F.pad(planes, [side // 2] * 4, mode="reflect"), window).reshape(1, 4, 32, N_IMAGE).mT
    got = kernels.attention(kernels.blur_queries(q, GRID, sigma), k, v)
    return got, softmax_map(blurred, k) @ v.double()


def blocks(control: Any, change: str) -> Both:
    """Guide a tiny PixArt in float32; skip a block or shuffle its tokens by hand in float64."""
    site = "transformer_blocks.2"
    model, inputs = zoo.build("pixart")
    with torch.no_grad(), attnctl.control(model, control, layout="cond"):
        got = zoo.call(model, inputs)
    model, inputs = zoo.build("pixart", dtype=torch.float64)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))

    def shuffle(module: Any, args: Any, kwargs: Any) -> Any:
        return ((args[0][:, order], *args[1:]), kwargs) if args else (args, _shuffled(kwargs, order))

    def skip(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    with torch.no_grad():
        plain = zoo.call(model, inputs)
        block = model.get_submodule(site)
        hook = (
            block.register_forward_hook(skip, with_kwargs=True)
            if change == "skip"
            else block.register_forward_pre_hook(shuffle, with_kwargs=True)
        )
        damaged = zoo.call(model, inputs)
        hook.remove()
    return got, plain + (plain - damaged)


def _shuffled(kwargs: dict[str, Any], order: Tensor) -> dict[str, Any]:
    return kwargs | {"hidden_states": kwargs["hidden_states"][:, order]}


@row("SLG", "c + w (c - p), p without a block (whole model)")
def slg() -> Both:
    return blocks(SLG(scale=1.0, sites="transformer_blocks.2.attn1", start=0.0, stop=1.0), "skip")


@row("TPG", "c + w (c - p), p with a block's tokens shuffled (whole model)")
def tpg() -> Both:
    return blocks(TPG(scale=1.0, sites="transformer_blocks.2.attn1", seed=5), "shuffle")


@row("NAG", "z = a z~ min(r, t) / r + (1 - a) z+")
def nag() -> Both:
    p, n = draw(2, 4, N, 32), draw(2, 4, N, 32, seed=1)
    x, y = p.double(), n.double()
    far = x + 2.0 * (x - y)
    ratio = far.abs().sum((1, 3), keepdim=True) / x.abs().sum((1, 3), keepdim=True)
    bounded = far * ratio.clamp_max(2.5) / ratio
    return normalized_guidance(p, n, 2.0, 2.5, 0.5), 0.5 * bounded + 0.5 * x


# Words


@row("Capture", "A @ columns of words")
def capture() -> Both:
    q, k, _ = qkv()
    words = torch.zeros(N, 3)
    words[N_IMAGE + 2, 0] = words[N_IMAGE + 5, 1] = 1
    words[N_IMAGE + 7 : N_IMAGE + 9, 2] = 0.5
    return kernels.columns(q, k, words, rows=IMAGE), softmax_map(q, k)[..., IMAGE, :] @ words.double()


@row("A-STAR", "segregation and retention")
def astar() -> Both:
    maps = draw(2, 3, *GRID).sigmoid()
    masks = (maps > 0.6).float()
    want = torch.zeros(2, 2).double()
    for b in range(2):
        a, m = maps[b].double(), masks[b].double()
        for i in range(3):
            want[1, b] += 1 - torch.minimum(a[i], m[i]).sum() / (a[i] + m[i]).sum()
            for j in range(i):
                want[0, b] += torch.minimum(a[i], a[j]).sum() / (a[i] + a[j]).sum()
    return torch.stack([losses.segregation(maps), losses.retention(maps, masks)]), want


@row("Attend-and-Excite", "max over concepts of 1 - max A")
def attend_excite() -> Both:
    maps = draw(2, 3, *GRID).sigmoid()
    return losses.attend_excite(maps), torch.stack([(1 - m.double().flatten(1).amax(1)).amax() for m in maps])


# Editing and video


@row("FateZero, self-attention", "M A_edit v + (1 - M) A_source v")
def fatezero() -> Both:
    (q, k, v), f = qkv(N_IMAGE, b=3), 3
    qs, ks = draw(f, 4, N_IMAGE, 32, seed=4) * 2, draw(f, 4, N_IMAGE, 32, seed=5)
    mask = torch.rand(f, N_IMAGE, generator=torch.Generator().manual_seed(6)) < 0.4

    def attend(own: bool, at: Tensor | None) -> Tensor:
        return kernels.attention(take_queries(q if own else qs, at), k if own else ks, v)

    keep = mask[:, None, :, None].double()
    want = keep * (softmax_map(q, k) @ v.double()) + (1 - keep) * (softmax_map(qs, ks) @ v.double())
    return self_fuse(attend, Split.of(mask)), want


@row("FateZero, prompt-to-prompt, cross-attention", "(w R + (1 - w) A_edit) v")
def cross() -> Both:
    q, _, _ = qkv(N_IMAGE)
    qs, (_, k, v) = draw(1, 4, N_IMAGE, 32, seed=4) * 2, qkv(N_TEXT)
    _, ks, _ = (x.flip(2) for x in qkv(N_TEXT))
    order = torch.randperm(N_TEXT, generator=torch.Generator().manual_seed(7))
    known = (torch.arange(N_TEXT) % 5 > 0).float()
    weight, follow = torch.ones(N_TEXT), (torch.arange(N_TEXT) % 3 > 0).float()
    weight[7] = 10
    how = CrossEdit.refine(order, known, weight)
    from_source, from_edit = fold_values(v, how, follow)
    got = kernels.attention(qs, ks, from_source) + kernels.attention(q, k, from_edit)
    source, edit = softmax_map(qs, ks), softmax_map(q, k)
    result = (source[..., order] * known.double() + (1 - known.double()) * edit) * weight.double()
    return got, (follow.double() * result + (1 - follow.double()) * edit) @ v.double()


@row("BroadWay", "high band of A times beta, by FFT")
def broadway() -> Both:
    frames, tau, beta = 16, 7, 1.5
    q, k, v = qkv(frames, b=64)
    pieces, _ = guided_maps(q, k, Layer(1, (8, 8), slice(0, 1)), None, band=Band.of(frames, tau))
    got = weigh(pieces, v, Band.of(frames, tau), beta)
    spectrum = torch.fft.fft(softmax_map(q, k), dim=-1)
    spectrum[..., frames // 2 - tau : frames // 2 + tau + 1] *= beta
    filtered = torch.fft.ifft(spectrum, dim=-1).real
    return got, filtered / filtered.sum(-1, keepdim=True) @ v.double()


@row("Enhance-A-Video", "mean of A off its diagonal")
def enhance() -> Both:
    q, k, _ = qkv(8 * 64)
    a, b = (x.unflatten(2, (8, 64)).transpose(2, 3) for x in (q, k))
    return cross_frame_intensity(q, k, 8), softmax_map(a, b)[..., ~torch.eye(8, dtype=torch.bool)].flatten(1).mean(1)


# Cheaper attention


@row("AgentAttention", "softmax(s^0.3 q A^T) softmax(s A k^T) v + 0.075 v")
def agents() -> Both:
    q, k, v = qkv(N_IMAGE)
    a, s = q[:, :, ::16], 32**-0.5
    want = softmax_map(q, a, s**0.3) @ (softmax_map(a, k) @ v.double()) + 0.075 * v.double()
    return agent_attention(q, a, k, v), want


@row("PARO", "A where a plan keeps blocks of reordered tokens")
def paro() -> Both:
    q, k, v = qkv()
    g = torch.Generator().manual_seed(3)
    keep = (torch.rand(4, 16, 16, generator=g) < 0.4) | torch.eye(16, dtype=torch.bool)
    orders = [0, 2, 4, 5]
    plan = BlockPlan.from_mask(keep, 16, orders, N_TEXT, grid=(4, 8, 8))
    whole, image = torch.ones(4, N, N, dtype=torch.bool), plan.span(N)
    tokens = keep.repeat_interleave(16, 1).repeat_interleave(16, 2)
    for h, order in enumerate(orders):
        place = permutation((4, 8, 8), order).argsort()
        whole[h, image, image] = tokens[h][place][:, place]
    logits = q.double() @ k.double().mT * 32**-0.5
    got = attnctl.attention(q, k, v, plan=plan)
    return got, logits.masked_fill(~whole, -math.inf).softmax(-1) @ v.double()
