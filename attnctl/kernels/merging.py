"""Token merging for self-attention: match tokens to one token of each cell, average the matched, copy back.

"Token Merging for Fast Stable Diffusion" (ToMe), arXiv 2303.17604, as "Agent Attention: On the Integration of Softmax
and Linear Attention", arXiv 2312.08874, uses it. One destination token is chosen in every cell of the grid; every other
token goes to the destination that it resembles most, and the most alike are merged. Averaging is linear, so queries,
keys and values may be merged after their projections as well as the features before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import ConfigError
from attnctl.kernels.checks import wide_dtype

__all__ = ["Merge", "Partners", "match_tokens", "merged_count", "pool_cells"]


@dataclass(frozen=True, slots=True)
class Partners:
    """Which tokens may be merged into which.

    Attributes:
        src: Indices of the tokens that may go, [S].
        dst: Indices of the tokens that stay, one a cell, [T].
        best: For each token of `src` its destination, as an index into `dst`, [B, S].
        order: Places in `src`, the most alike first, [B, S].
    """

    src: Tensor
    dst: Tensor
    best: Tensor
    order: Tensor

    def merge(self, count: int) -> Merge:
        """Merge the `count` tokens that resemble their destinations most."""
        gone, rest = self.order[:, :count], self.order[:, count:]
        target = self.best.gather(1, gone)
        ones = torch.ones(len(target), len(self.dst), device=target.device)
        counts = ones.scatter_add(1, target, torch.ones_like(target, dtype=ones.dtype))
        return Merge(self.src[rest], self.src[gone], self.dst, target, counts)


@dataclass(frozen=True, slots=True)
class Merge:
    """A choice of tokens to merge.

    Attributes:
        kept: Indices of the source tokens that stay themselves, [B, U].
        gone: Indices of those that are merged, [B, R].
        dst: Indices of the destinations, [T].
        target: For each token that is merged its destination, as an index into `dst`, [B, R].
        counts: How many tokens each destination stands for, [B, T].
    """

    kept: Tensor
    gone: Tensor
    dst: Tensor
    target: Tensor
    counts: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Average tokens, [B, N, C] -> [B, U + T, C], the kept sources first."""
        mean = x.index_select(1, self.dst)
        if self.gone.shape[1]:
            wide = wide_dtype(x.dtype)
            index = _rows(self.target, mean.shape[1])[:, None].expand(-1, x.shape[-1])
            gone = _take(x, self.gone).flatten(0, 1).to(wide)
            sums = mean.flatten(0, 1).to(wide).scatter_add(0, index, gone)
            mean = (sums.view(mean.shape) / self.counts[..., None]).to(x.dtype)
        return torch.cat([_take(x, self.kept), mean], 1) if self.kept.shape[1] else mean

    def undo(self, y: Tensor) -> Tensor:
        """Copy every merged token back to the places that it stands for, [B, U + T, C] -> [B, N, C]."""
        unmerged = self.kept.shape[1]
        n = unmerged + self.gone.shape[1] + len(self.dst)
        # Where each of the n tokens is found among the merged ones: one gather instead of three scatters.
        place = self.kept.new_empty(y.shape[0], n)
        place[:, self.dst] = torch.arange(unmerged, y.shape[1], device=y.device)
        place.scatter_(1, self.kept, torch.arange(unmerged, device=y.device).expand_as(self.kept))
        place.scatter_(1, self.gone, self.target + unmerged)
        return _take(y, place)


def merged_count(n: int, ratio: float, sources: int) -> int:
    """Count the tokens that a ratio merges: int(n ratio), as many as there are sources at most."""
    return min(sources, int(n * ratio))


def match_tokens(
    metric: Tensor, grid: tuple[int, int], cell: tuple[int, int], choice: Tensor | None = None
) -> Partners:
    """Choose a destination in every cell and match all other tokens to the most alike destination.

    Args:
        metric: What tokens are compared by (cosine), [B, N, C].
        grid: Rows and columns of the N tokens.
        cell: Rows and columns of a cell; tokens beyond the last whole cell are sources.
        choice: The place chosen in each cell, 0 to rows * columns - 1 in reading order, [cells down, cells across];
            None for the first.

    Raises:
        ConfigError: The grid does not hold N tokens, or holds no whole cell.
    """
    (h, w), (sy, sx), n = grid, cell, metric.shape[1]
    if h * w != n or h < sy or w < sx:
        raise ConfigError(
            f"Token merging: a grid of {h} x {w} was given for {n} tokens and cells of {sy} x {sx}; expected as many "
            "tokens as the grid holds, and at least one whole cell."
        )
    if choice is None:
        src, dst = _first_split(h, w, sy, sx, metric.device)
    else:
        src, dst = _split(h, w, sy, sx, choice.to(metric.device, non_blocking=True))
    # The destination that a token resembles most does not depend on the token's own length, so only few are normalised;
    # and all tokens are compared, since leaving the destinations out would copy the others.
    unit = F.normalize(metric.index_select(1, dst), dim=-1)
    score, best = (metric @ unit.transpose(1, 2)).max(-1)
    score = score / torch.linalg.vector_norm(metric, dim=-1).clamp_min(1e-12)
    score, best = score.index_select(1, src), best.index_select(1, src)
    return Partners(src, dst, best, score.argsort(dim=-1, descending=True, stable=True))


def pool_cells(x: Tensor, grid: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """Average the tokens of every cell, the cut ones at the edges included, [B, N, C] -> [B, cells, C]."""
    planes = x.transpose(1, 2).unflatten(2, grid)
    pooled = F.avg_pool2d(planes, cell, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens of each sample, [B, N, C] by [B, S] -> [B, S, C]: whole rows, which gather would copy one by one."""
    return x.flatten(0, 1).index_select(0, _rows(index, x.shape[1])).view(*index.shape, x.shape[-1])


def _rows(index: Tensor, n: int) -> Tensor:
    """Number the tokens of a batch through: [B, S] indices among n -> [B S]."""
    return (index + n * torch.arange(len(index), device=index.device)[:, None]).flatten()


def _split(h: int, w: int, sy: int, sx: int, choice: Tensor) -> tuple[Tensor, Tensor]:
    down, across = h // sy, w // sx
    choice = choice.reshape(down, across)
    rows = torch.arange(down, device=choice.device)[:, None] * sy + choice // sx
    columns = torch.arange(across, device=choice.device)[None] * sx + choice % sx
    dst = (rows * w + columns).flatten()
    free = torch.ones(h * w, dtype=torch.bool, device=choice.device)
    free[dst] = False
    # argsort, because the number of sources is known: nonzero would wait for the device.
    src = free.to(torch.uint8).argsort(dim=0, descending=True, stable=True)[: h * w - len(dst)]
    return src, dst


@lru_cache(maxsize=16)
def _first_split(h: int, w: int, sy: int, sx: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for calls in any mode
        return _split(h, w, sy, sx, torch.zeros(h // sy, w // sx, dtype=torch.long, device=device))
