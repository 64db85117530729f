"""Bi-level routing attention: attend to the tokens of the few windows that matter.

"BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv 2303.08810), equations 3 to 6. Queries and keys
are averaged over windows, each window keeps the k windows with the largest affinity, and its tokens attend to the
tokens of those windows only. The gather is one flat `index_select`: its gradient has the size of the keys, while the
gradient of an expanded gather is p^2 times larger.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.jit import Final

from attnctl.backbones.modules.attend import attend, ceil_div
from attnctl.backbones.modules.routed_flex import routed_flex
from attnctl.errors import ConfigError, require

__all__ = ["BiLevelRoutingAttention", "gather_windows", "merge_windows", "split_windows", "top_windows", "window_means"]

PADS = ("none", "pre", "post", "mask")
POOLS = ("identity", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool")


def split_windows(x: Tensor, wh: int, ww: int) -> Tensor:
    """Cut a map into windows, row by row: [B, H, W, C] -> [B, windows, wh * ww, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // wh, wh, w // ww, ww, c).transpose(2, 3)
    return x.reshape(b, (h // wh) * (w // ww), wh * ww, c)


def merge_windows(x: Tensor, wh: int, ww: int, h: int, w: int) -> Tensor:
    """Undo `split_windows`: [B, windows, wh * ww, C] -> [B, h, w, C]."""
    b, c = x.shape[0], x.shape[-1]
    x = x.reshape(b, h // wh, w // ww, wh, ww, c).transpose(2, 3)
    return x.reshape(b, h, w, c)


def window_means(x: Tensor, real: Tensor | None = None) -> Tensor:
    """Average the tokens of each window: [B, windows, tokens, C] -> [B, windows, C].

    real: [1, windows, tokens, 1], 1 for the tokens that count; every token counts if None.
    """
    if real is None:
        return x.mean(dim=2)
    return (x * real).sum(dim=2) / real.sum(dim=2).clamp(min=1)


def top_windows(q_mean: Tensor, k_mean: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Choose for each window the windows it attends to.

    Shapes: q_mean, k_mean [B, windows, C] -> weights (softmax of the chosen affinities) and indices,
    both [B, windows, topk].
    """
    affinity = (q_mean * scale) @ k_mean.transpose(-2, -1)
    score, index = affinity.topk(topk, dim=-1)
    return score.float().softmax(dim=-1).to(score.dtype), index


def gather_windows(x: Tensor, index: Tensor) -> Tensor:
    """Collect chosen windows: x [B, windows, tokens, C], index [B, windows, k] -> [B, windows, k * tokens, C]."""
    b, n, t, c = x.shape
    start = torch.arange(b, device=x.device).reshape(b, 1, 1) * n
    rows = x.reshape(b * n, t * c).index_select(0, (index + start).flatten())
    return rows.reshape(b, n, index.shape[-1] * t, c)


def check_projections(dim: int, qk_dim: int, num_heads: int, scale: str, side_dwconv: int) -> None:
    """Raise ConfigError for heads that do not divide the channels, an unknown scale, an even kernel."""
    require(
        num_heads >= 1 and dim % num_heads == 0 and qk_dim % num_heads == 0,
        ConfigError,
        f"num_heads={num_heads} was given; it must divide dim={dim} and qk_dim={qk_dim}.",
    )
    require(scale in ("dim", "head"), ConfigError, f"scale={scale!r} was given; expected 'dim' or 'head'.")
    require(
        side_dwconv == 0 or (side_dwconv > 0 and side_dwconv % 2 == 1),
        ConfigError,
        f"side_dwconv={side_dwconv} was given; expected 0 or an odd kernel size.",
    )


def check_routing(soft: bool, differentiable: bool, learned: bool) -> None:
    """Raise ConfigError for kinds of routing that exclude each other."""
    require(
        differentiable or not learned,
        ConfigError,
        "param_routing=True learns a projection, but diff_routing=False cuts its gradient. Set both.",
    )
    require(
        soft or not differentiable,
        ConfigError,
        "diff_routing=True needs soft_routing=True: a hard choice of windows has no gradient.",
    )


def check_windows(pad: str, kv_pool: str, in_place: bool, weighed: bool) -> None:
    """Raise ConfigError for unknown ways to pad and pool, and for those that exclude each other.

    in_place: keys and values are read where they lie; weighed: routing weights or dropout change them.
    """
    require(pad in PADS, ConfigError, f"pad={pad!r} was given; expected one of {', '.join(map(repr, PADS))}.")
    require(
        kv_pool in POOLS, ConfigError, f"kv_pool={kv_pool!r} was given; expected one of {', '.join(map(repr, POOLS))}."
    )
    require(
        kv_pool == "identity" or pad in ("none", "pre"),
        ConfigError,
        f"kv_pool={kv_pool!r} with pad={pad!r}: pooled windows know no padded tokens. Use pad='none' or 'pre'.",
    )
    require(
        not in_place or not (weighed or kv_pool != "identity"),
        ConfigError,
        "backend='flex' reads keys and values where they lie: it knows no soft_routing, attn_drop or kv_pool.",
    )


def window_sides(n_win: int, window_size: int | tuple[int, int] | None, topk: int | None) -> tuple[int, int]:
    """Return the fixed (height, width) of windows, zeros where their number is fixed instead.

    Raises: ConfigError for sizes and counts below 1, and more windows to keep than there are.
    """
    require(n_win >= 1, ConfigError, f"n_win={n_win} was given; expected at least 1.")
    if window_size is None:
        require(
            topk is None or 1 <= topk <= n_win * n_win,
            ConfigError,
            f"topk={topk} was given; n_win={n_win} makes {n_win * n_win} windows: expected 1 to {n_win * n_win}.",
        )
        return 0, 0
    window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
    require(
        len(window) == 2 and min(window) >= 1,
        ConfigError,
        f"window_size={window_size!r} was given; expected a positive size or a pair of them.",
    )
    require(topk is None or topk >= 1, ConfigError, f"topk={topk} was given; expected at least 1, or None for all.")
    return window[0], window[1]


class FusedQKV(nn.Module):
    """One projection to queries, keys and values, under the name that released weights use."""

    def __init__(
        self, dim: int, qk_dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., dim] -> [..., 2 qk_dim + dim], in the order q, k, v."""
        return self.qkv(x)


class Router(nn.Module):
    """A shared projection of the window means before they are compared."""

    def __init__(self, qk_dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.emb = nn.Linear(qk_dim, qk_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Project window means [B, windows, qk_dim]."""
        return self.emb(x)


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention over a map [B, H, W, C] of any size (arXiv 2303.08810, equations 3 to 6).

    Args:
        dim: channels. num_heads: divides dim and qk_dim.
        n_win: windows per side; the windows grow with the map. window_size: (height, width) of a window in tokens
            instead; the number of windows grows with the map, and the cost stays linear in it.
        topk: windows that each window attends to, 1 to the number of windows; None = all of them.
        qk_dim: channels of queries and keys, dim if None.
        scale: "dim" = qk_dim ** -0.5, as released weights need; "head" = (qk_dim / num_heads) ** -0.5.
        side_dwconv: kernel of the depthwise branch on the values, 0 for none.
        pad: "none" refuses a map that the windows do not divide; "pre" pads before the projection and lets padded
            tokens take part (released classification and segmentation weights); "post" pads after it, with means
            over real tokens (the refactored release); "mask" also keeps padded tokens out of the attention.
        kv_pool: "identity", or how keys and values shrink inside each window: "ada_avgpool"/"ada_maxpool" to
            kv_per_win tokens per side, "avgpool"/"maxpool" by kv_ratio.
        soft_routing: weigh keys and values by the routing weights. diff_routing: let gradients reach the routing.
        param_routing: learn a projection for it; needs diff_routing. out_proj: project the result.
        backend: a kernel of `attnctl.attention`, or "flex", which reads the chosen windows where they lie instead of
            copying them (CUDA; no soft routing, pooling or dropout).

    Raises: ConfigError for settings that exclude each other and for maps that do not fit them.
    """

    num_heads: Final[int]
    pad: Final[str]
    kv_pool: Final[str]
    scale: Final[float]
    has_lepe: Final[bool]
    soft_routing: Final[bool]
    diff_routing: Final[bool]
    backend: Final[str]
    in_place: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        *,
        topk: int | None = 4,
        window_size: int | tuple[int, int] | None = None,
        qk_dim: int | None = None,
        scale: str = "dim",
        side_dwconv: int = 3,
        pad: str = "pre",
        kv_pool: str = "identity",
        kv_per_win: int = 1,
        kv_ratio: int = 1,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        out_proj: bool = True,
        attn_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        qk_dim = qk_dim or dim
        self.in_place = backend == "flex"
        check_projections(dim, qk_dim, num_heads, scale, side_dwconv)
        check_routing(soft_routing, diff_routing, param_routing)
        check_windows(pad, kv_pool, self.in_place, weighed=soft_routing or attn_drop > 0)
        self.window_h, self.window_w = window_sides(n_win, window_size, topk)
        self.dim, self.qk_dim, self.num_heads, self.n_win = dim, qk_dim, num_heads, n_win
        self.topk = 0 if topk is None else topk
        self.scale = qk_dim**-0.5 if scale == "dim" else (qk_dim // num_heads) ** -0.5
        self.pad, self.kv_pool, self.backend = pad, kv_pool, "auto" if self.in_place else backend
        self.kv_per_win, self.kv_ratio = kv_per_win, kv_ratio
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        self.has_lepe = side_dwconv > 0
        self.qkv = FusedQKV(dim, qk_dim, device=device, dtype=dtype)
        self.router = Router(qk_dim, device=device, dtype=dtype) if param_routing else nn.Identity()
        self.lepe = (
            nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, device=device, dtype=dtype)
            if side_dwconv
            else nn.Identity()
        )
        self.wo = nn.Linear(dim, dim, device=device, dtype=dtype) if out_proj else nn.Identity()
        self.attn_drop = attn_drop

    def window_of(self, h: int, w: int) -> tuple[int, int]:
        """Tell the window (height, width) in tokens for a map of this size."""
        if self.window_h > 0:
            return self.window_h, self.window_w
        if self.pad == "post" and h >= self.n_win and w >= self.n_win:
            return h // self.n_win, w // self.n_win
        return ceil_div(h, self.n_win), ceil_div(w, self.n_win)

    def padded_size(self, h: int, w: int) -> tuple[int, int]:
        """Tell the size to which a map is padded, so that windows divide it."""
        wh, ww = self.window_of(h, w)
        if self.window_h == 0 and self.pad == "pre":
            return wh * self.n_win, ww * self.n_win
        return ceil_div(h, wh) * wh, ceil_div(w, ww) * ww

    def _check(self, h: int, w: int, ph: int, pw: int, windows: int) -> None:
        if self.pad == "none" and (ph != h or pw != w or (self.window_h == 0 and (h % self.n_win or w % self.n_win))):
            cut = f"n_win={self.n_win}" if self.window_h == 0 else f"window_size={(self.window_h, self.window_w)}"
            raise ConfigError(
                f"A map of {h}x{w} tokens was given, but {cut} does not divide it. "
                "Set pad='mask' (exact), 'pre' or 'post' (as released), or resize the input."
            )
        if self.pad == "post" and self.window_h == 0 and min(h, w) < self.n_win:
            raise ConfigError(
                f"A map of {h}x{w} tokens was given, smaller than n_win={self.n_win} windows per side, "
                "which pad='post' cannot cut. Set pad='mask' or a smaller n_win."
            )
        if self.window_h > 0 and self.topk > windows:
            raise ConfigError(
                f"topk={self.topk} was given, but a map of {h}x{w} tokens holds only {windows} windows of "
                f"{self.window_h}x{self.window_w}. Lower topk, shrink window_size, or set topk=None for all windows."
            )

    def _pool(self, kv: Tensor, wh: int, ww: int) -> Tensor:
        b, n, _, c = kv.shape
        x = kv.reshape(b * n, wh, ww, c).permute(0, 3, 1, 2)
        if self.kv_pool == "ada_avgpool":
            x = F.adaptive_avg_pool2d(x, (self.kv_per_win, self.kv_per_win))
        elif self.kv_pool == "ada_maxpool":
            x = F.adaptive_max_pool2d(x, (self.kv_per_win, self.kv_per_win))
        elif self.kv_ratio > 1:
            if self.kv_pool == "avgpool":
                x = F.avg_pool2d(x, self.kv_ratio)
            else:
                x = F.max_pool2d(x, self.kv_ratio)
        return x.flatten(2).transpose(1, 2).reshape(b, n, -1, c)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the output with the routing: x [B, H, W, C] -> out, weights and indices [B, windows, topk]."""
        h, w = x.shape[1], x.shape[2]
        wh, ww = self.window_of(h, w)
        ph, pw = self.padded_size(h, w)
        windows = (ph // wh) * (pw // ww)
        if not torch.jit.is_scripting():
            self._check(h, w, ph, pw, windows)
        topk = min(self.topk, windows) if self.topk > 0 else windows
        padding = ph != h or pw != w
        if padding and self.pad == "pre":
            x = F.pad(x, [0, 0, 0, pw - w, 0, ph - h])
        qkv = self.qkv(x)
        v_map = qkv[..., 2 * self.qk_dim :]
        real: Tensor | None = None
        if padding and self.pad != "pre":
            qkv = F.pad(qkv, [0, 0, 0, pw - w, 0, ph - h])
            real = F.pad(torch.ones([1, h, w, 1], dtype=x.dtype, device=x.device), [0, 0, 0, pw - w, 0, ph - h])
            real = split_windows(real, wh, ww)
        q, k, v = split_windows(qkv, wh, ww).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        q_mean, k_mean = window_means(q, real), window_means(k, real)
        if not self.diff_routing:
            q_mean, k_mean = q_mean.detach(), k_mean.detach()
        weight, index = top_windows(self.router(q_mean), self.router(k_mean), topk, self.qk_dim**-0.5)
        kv = torch.cat([k, v], dim=-1)
        if self.kv_pool != "identity":
            kv = self._pool(kv, wh, ww)
        if topk == windows and not self.soft_routing:
            # Every window reads every token: one plain attention, no copies.
            out = self._dense(q, kv, real)
        elif self.in_place:
            out = self._in_place(q, k, v, index, real)
        else:
            out = self._sparse(q, kv, weight, index, real)
        out = merge_windows(out, wh, ww, ph, pw)
        if self.has_lepe:
            side = self.lepe(v_map.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            if out.shape[1] != side.shape[1] or out.shape[2] != side.shape[2]:
                out = out[:, :h, :w]
            out = out + side
        out = self.wo(out)
        if padding:
            out = out[:, :h, :w]
        return out, weight, index

    def _heads(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.reshape(b, n, self.num_heads, c // self.num_heads).transpose(1, 2)

    def _dense(self, q: Tensor, kv: Tensor, real: Tensor | None) -> Tensor:
        b, n, t, c = q.shape
        k, v = kv.reshape(b, -1, kv.shape[-1]).split([self.qk_dim, self.dim], dim=-1)
        mask: Tensor | None = None
        if real is not None and self.pad == "mask":
            mask = real.reshape(1, 1, 1, -1) > 0
        drop = self.attn_drop if self.training else 0.0
        heads = (self._heads(q.reshape(b, n * t, c)), self._heads(k), self._heads(v))
        out = attend(heads[0], heads[1], heads[2], mask, self.scale, drop, self.backend)
        return out.transpose(1, 2).reshape(b, n, t, self.dim)

    def _sparse(self, q: Tensor, kv: Tensor, weight: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
        b, n, t, _ = q.shape
        tokens = kv.shape[2]
        chosen = gather_windows(kv, index)
        if self.soft_routing:
            chosen = chosen * weight.repeat_interleave(tokens, dim=-1).unsqueeze(-1)
        k, v = chosen.flatten(0, 1).split([self.qk_dim, self.dim], dim=-1)
        mask: Tensor | None = None
        if real is not None and self.pad == "mask":
            keep = gather_windows(real.expand(b, -1, -1, -1), index)
            mask = keep.reshape(b * n, 1, 1, -1) > 0
        drop = self.attn_drop if self.training else 0.0
        out = attend(self._heads(q.flatten(0, 1)), self._heads(k), self._heads(v), mask, self.scale, drop, self.backend)
        return out.transpose(1, 2).reshape(b, n, t, self.dim)

    @torch.jit.unused
    def _in_place(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor, real: Tensor | None) -> Tensor:
        b, n, t, _ = q.shape
        seen = real.flatten() > 0 if real is not None and self.pad == "mask" else None
        heads = [self._heads(x.flatten(1, 2)) for x in (q, k, v)]
        out = routed_flex(heads[0], heads[1], heads[2], index, seen, self.scale)
        return out.transpose(1, 2).reshape(b, n, t, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map: [B, H, W, C] -> [B, H, W, C]."""
        return self.routed(x)[0]
