"""Agent attention: a few pooled queries stand between the queries and the keys.

"Agent Attention: On the Integration of Softmax and Linear Attention" (arXiv 2312.08874), equations 4 to 8. Agents T are
the queries pooled to a small grid; V_A = softmax(s T K^T + B1) V gathers, softmax(s Q T^T + B2) V_A hands back, and a
depthwise convolution of the values restores the rank. The cost is linear in the number of tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn
from torch.jit import Final

from attnctl.backbones.modules.attend import attend
from attnctl.backbones.modules.resize import fit_axis
from attnctl.errors import ConfigError, require

__all__ = ["AgentAttention2d", "AgentCore", "agent_mix", "key_bias", "pool_agents", "query_bias", "resize_agents"]


def pool_agents(q: Tensor, h: int, w: int, ah: int, aw: int) -> Tensor:
    """Pool the query map to the agents: [B, h * w, C] -> [B, ah * aw, C]."""
    b, _, c = q.shape
    pooled = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(b, c, h, w), (ah, aw))
    return pooled.flatten(2).transpose(1, 2)


def agent_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    bias_k: Tensor | None,
    bias_q: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Gather into the agents, then hand back to the queries (equation 5).

    Shapes: q [B, H, N, D]; k, v [B, H, Nk, D]; agents [B, H, A, D]; bias_k [1, H, A, Nk]; bias_q [1, H, N, A].
    """
    gathered = attend(agents, k, v, bias_k, scale, dropout, backend)
    return attend(q, agents, gathered, bias_q, scale, dropout, backend)


def resize_agents(bias: Tensor, ah: int, aw: int) -> Tensor:
    """Resize a bias [H, A, h, w] over a square grid of A agents to a grid of ah x aw: -> [H, ah * aw, h, w]."""
    m, n, h, w = bias.shape
    side = int(n**0.5 + 0.5)
    if ah == side and aw == side:
        return bias
    x = bias.reshape(m, side, side, h * w).permute(0, 3, 1, 2)
    x = F.interpolate(x, [ah, aw], mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1).reshape(m, ah * aw, h, w)


def key_bias(an: Tensor, ah: Tensor, aw: Tensor, h: int, w: int, agents: tuple[int, int]) -> Tensor:
    """Build B1 for keys on a map of h x w: block bias and axis biases, -> [1, H, agents, h * w].

    Shapes: an [H, A, 7, 7]; ah [1, H, A, h0, 1]; aw [1, H, A, 1, w0].
    """
    axes = (ah + aw)[0]
    if axes.shape[-2] != h or axes.shape[-1] != w:
        axes = F.interpolate(axes, [h, w], mode="bilinear", align_corners=False)
    block = F.interpolate(an, [h, w], mode="bilinear", align_corners=False)
    if agents[0] * agents[1] == an.shape[1] and agents[0] == agents[1]:
        return (block + axes).flatten(2).unsqueeze(0)
    return resize_agents(block + axes, agents[0], agents[1]).flatten(2).unsqueeze(0)


def query_bias(na: Tensor, ha: Tensor, wa: Tensor, h: int, w: int, agents: tuple[int, int]) -> Tensor:
    """Build B2 for queries on a map of h x w, -> [1, H, h * w, agents].

    Shapes: na [H, A, 7, 7]; ha [1, H, h0, 1, A]; wa [1, H, 1, w0, A].
    """
    return key_bias(na, ha.permute(0, 1, 4, 2, 3), wa.permute(0, 1, 4, 2, 3), h, w, agents).transpose(-2, -1)


class AgentCore(nn.Module):
    """What every form of agent attention shares: the biases and the two softmaxes.

    The axis biases are sized for `grid` and resized when a map of another size comes.
    """

    num_heads: Final[int]
    prefix: Final[int]
    has_prefix: Final[bool]
    backend: Final[str]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        num_agents: int,
        key_grid: tuple[int, int] | None = None,
        prefix: int = 0,
        agent_grid: tuple[int, int] | None = None,
        attn_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(
            num_heads >= 1 and dim % num_heads == 0,
            ConfigError,
            f"num_heads={num_heads} was given; it must divide dim={dim}.",
        )
        side = int(num_agents**0.5 + 0.5)
        require(
            num_agents >= 1 and side * side == num_agents,
            ConfigError,
            f"num_agents={num_agents} was given; agents lie on a square grid, so expected 1, 4, 9, 16, 25, 36, 49, ...",
        )
        require(min(grid) >= 1, ConfigError, f"grid={grid} was given; expected a positive (height, width) in tokens.")
        self.dim, self.num_heads, self.prefix, self.backend = dim, num_heads, prefix, backend
        self.has_prefix = prefix > 0
        self.grid = grid
        self.agent_grid = agent_grid or (side, side)
        self.scale = (dim // num_heads) ** -0.5
        self.attn_drop = attn_drop
        kh, kw = key_grid or grid
        h, w = grid

        def bias(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.an_bias = bias(num_heads, num_agents, 7, 7)
        self.na_bias = bias(num_heads, num_agents, 7, 7)
        self.ah_bias = bias(1, num_heads, num_agents, kh, 1)
        self.aw_bias = bias(1, num_heads, num_agents, 1, kw)
        self.ha_bias = bias(1, num_heads, h, 1, num_agents)
        self.wa_bias = bias(1, num_heads, 1, w, num_agents)
        if prefix:
            self.ac_bias = bias(1, num_heads, num_agents, prefix)
            self.ca_bias = bias(1, num_heads, prefix, num_agents)
        self.reset_biases()

    def reset_biases(self, std: float = 0.02) -> None:
        """Draw the biases from a truncated normal distribution, or zero them with std=0."""
        for name, p in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                trunc_normal_(p, std=std) if std else nn.init.zeros_(p)

    def key_biases(self, h: int, w: int) -> Tensor:
        """Build B1 for keys on an h x w map: [1, H, agents, prefix + h * w]."""
        bias = key_bias(self.an_bias, self.ah_bias, self.aw_bias, h, w, self.agent_grid)
        if self.has_prefix:
            bias = torch.cat([self._prefix_bias(self.ac_bias), bias], dim=-1)
        return bias

    def query_biases(self, h: int, w: int) -> Tensor:
        """Build B2 for queries on an h x w map: [1, H, prefix + h * w, agents]."""
        bias = query_bias(self.na_bias, self.ha_bias, self.wa_bias, h, w, self.agent_grid)
        if self.has_prefix:
            first = self._prefix_bias(self.ca_bias.transpose(-2, -1)).transpose(-2, -1)
            bias = torch.cat([first, bias], dim=-2)
        return bias

    def _prefix_bias(self, bias: Tensor) -> Tensor:
        m, n, p = bias.shape[1], bias.shape[2], bias.shape[3]
        return resize_agents(bias.reshape(m, n, p, 1), self.agent_grid[0], self.agent_grid[1]).reshape(1, m, -1, p)

    def heads(self, x: Tensor) -> Tensor:
        """Split channels into heads: [B, N, C] -> [B, H, N, D]."""
        b, n, c = x.shape
        return x.reshape(b, n, self.num_heads, c // self.num_heads).transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, h: int, w: int, kh: int, kw: int) -> Tensor:
        """Compute agent attention of tokens [B, prefix + h * w, C] and keys of [B, prefix + kh * kw, C]."""
        ah, aw = self.agent_grid
        agents = self.heads(pool_agents(q[:, self.prefix :], h, w, ah, aw))
        bias_k, bias_q = self.key_biases(kh, kw).to(q.dtype), self.query_biases(h, w).to(q.dtype)
        drop = self.attn_drop if self.training else 0.0
        out = agent_mix(
            self.heads(q), self.heads(k), self.heads(v), agents, bias_k, bias_q, self.scale, drop, self.backend
        )
        return out.transpose(1, 2).reshape(q.shape)

    @torch.jit.unused
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # The axis biases keep the five dimensions of released weights, the first of them 1. `fn` gets four: torch
        # converts tensors of four and five dimensions to channels_last, and fails on five.
        def on_four(x: Tensor) -> Tensor:
            return fn(x[0]).unsqueeze(0) if x.dim() == 5 else fn(x)

        return super()._apply(on_four, recurse)

    @torch.jit.ignore
    def set_grid(self, grid: tuple[int, int], key_grid: tuple[int, int] | None = None) -> None:
        """Resize the axis biases for another map, each along its own axis (linear, as the authors' loader does)."""
        kh, kw = key_grid or grid
        with torch.no_grad():
            for name, axis, size in (
                ("ah_bias", 3, kh),
                ("aw_bias", 4, kw),
                ("ha_bias", 2, grid[0]),
                ("wa_bias", 3, grid[1]),
            ):
                old = getattr(self, name)
                if old.shape[axis] != size:
                    setattr(self, name, nn.Parameter(fit_axis(old, axis, size), requires_grad=old.requires_grad))
        self.grid = grid


@register_notrace_module
class AgentAttention2d(AgentCore):
    """Agent attention with projections, over tokens [B, N, C] or a map [B, H, W, C] (arXiv 2312.08874).

    Args:
        dim: channels. num_heads: divides dim. grid: (height, width) in tokens that the axis biases are sized for;
            maps of other sizes resize them on the fly. num_agents: a square number.
        prefix: class and register tokens at the start of the sequence; they are not pooled and not convolved.
        agent_grid: pool to (height, width) agents instead of the square grid, with resized biases.
        split_qkv: separate `q` and `kv` projections, and sr_ratio: a strided convolution before `kv`, as in PVT.
        qkv_bias: as in timm, and so are attn_drop and proj_drop.
        backend: a kernel of `attnctl.attention`.

    Raises: ConfigError for heads that do not divide, agents off a square grid, tokens that do not fit the grid.
    """

    # TorchScript reads the annotations of the class itself, not those it inherits.
    num_heads: Final[int]  # type: ignore[misc]
    prefix: Final[int]  # type: ignore[misc]
    has_prefix: Final[bool]  # type: ignore[misc]
    backend: Final[str]  # type: ignore[misc]
    split_qkv: Final[bool]
    sr_ratio: Final[int]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        grid: tuple[int, int] = (14, 14),
        num_agents: int = 49,
        *,
        qkv_bias: bool = True,
        prefix: int = 0,
        agent_grid: tuple[int, int] | None = None,
        split_qkv: bool = False,
        sr_ratio: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        grid = (grid[0], grid[1])
        key_grid = (grid[0] // sr_ratio, grid[1] // sr_ratio)
        super().__init__(
            dim, num_heads, grid, num_agents, key_grid, prefix, agent_grid, attn_drop, backend, device, dtype
        )
        require(
            sr_ratio == 1 or (split_qkv and prefix == 0),
            ConfigError,
            f"sr_ratio={sr_ratio} was given; a reduction needs split_qkv=True and no prefix tokens.",
        )
        self.split_qkv, self.sr_ratio = split_qkv, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype) if split_qkv else nn.Identity()
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype) if split_qkv else nn.Identity()
        self.qkv = nn.Identity() if split_qkv else nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, device=device, dtype=dtype) if sr_ratio > 1 else nn.Identity()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype) if sr_ratio > 1 else nn.Identity()
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.grid_source: object | None = None

    @torch.jit.ignore
    def set_feature_size(self, grid: tuple[int, int]) -> None:
        """Resize the axis biases for another map."""
        self.set_grid(grid, (grid[0] // self.sr_ratio, grid[1] // self.sr_ratio))

    def _grid_of(self, n: int) -> tuple[int, int]:
        h, w = self.grid
        if not torch.jit.is_scripting():
            live = getattr(self.grid_source, "grid", None)
            if live is not None:
                h, w = live
            if n != h * w:
                raise ConfigError(
                    f"{n} patch tokens were given, but the grid is {h}x{w}. Pass grid=(height, width), "
                    "give a map [B, H, W, C], or call set_input_size on the model."
                )
        return h, w

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Mix tokens [B, prefix + h * w, C], or a map [B, H, W, C] without prefix tokens, to the same shape.

        attn_mask, is_causal: as timm's blocks pass them; agents see every token, so both must be left out.
        """
        if not torch.jit.is_scripting() and (attn_mask is not None or is_causal):
            raise ConfigError("attn_mask or is_causal was given; agents mix all tokens, so a mask cannot be kept.")
        shape = x.shape
        if x.dim() == 4:
            h, w = x.shape[1], x.shape[2]
            x = x.flatten(1, 2)
        elif grid is not None:
            h, w = grid
        else:
            h, w = self._grid_of(x.shape[1] - self.prefix)
        b, _, c = x.shape
        kh, kw = h, w
        if self.split_qkv:
            q = self.q(x)
            if self.sr_ratio > 1:
                small = self.sr(x.transpose(1, 2).reshape(b, c, h, w))
                kh, kw = small.shape[2], small.shape[3]
                k, v = self.kv(self.norm(small.flatten(2).transpose(1, 2))).chunk(2, dim=-1)
            else:
                k, v = self.kv(x).chunk(2, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = self.mix(q, k, v, h, w, kh, kw)
        v_map = v[:, self.prefix :].transpose(1, 2).reshape(b, c, kh, kw)
        if kh != h or kw != w:
            v_map = F.interpolate(v_map, [h, w], mode="bilinear", align_corners=False)
        side = self.dwc(v_map).flatten(2).transpose(1, 2)
        if self.has_prefix:
            out = torch.cat([out[:, : self.prefix], out[:, self.prefix :] + side], dim=1)
        else:
            out = out + side
        return self.proj_drop(self.proj(out)).reshape(shape)
