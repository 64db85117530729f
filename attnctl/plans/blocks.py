"""Which blocks of an attention map to compute: one attention's plan, for every head and part of the run.

The image tokens are laid out per head in one of six orders, cut into blocks, and for every block of queries a plan says
which blocks of keys count; the softmax runs over those alone. Text tokens attend and are attended to in full.
"PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation Models",
arXiv 2506.16054.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnctl.errors import PlanError
from attnctl.plans.orders import order_ids

__all__ = ["BlockPlan"]

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BlockPlan:
    """Hold the blocks that one attention computes.

    Make one with `from_mask`, which checks everything.

    Attributes:
        keep: Blocks to compute, bool [groups, heads, query blocks, key blocks], in each head's own order of tokens.
        block_q: Tokens in a block of queries; the last block may be smaller.
        block_k: Tokens in a block of keys; the last block may be smaller.
        order: Number of every head's token order (`attnctl.plans.orders.ORDERS`).
        grid: Frames, rows and columns of the image tokens; None where no head is reordered.
        n_image: Number of image tokens; None for any that makes as many blocks (see `sized`).
        n_text: Number of text tokens that it was made with.
        text_first: Whether the text stands before the image.
        about: Facts for people: metric, density asked for, captured mass.
    """

    keep: Tensor
    block_q: int
    block_k: int
    order: tuple[int, ...]
    grid: Grid | None
    n_image: int | None
    n_text: int = 0
    text_first: bool = True
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_mask(
        cls,
        keep: Tensor,
        block: int = 64,
        order: Sequence[int | str] | None = None,
        n_text: int = 0,
        *,
        block_q: int | None = None,
        grid: Sequence[int] | None = None,
        n_image: int | None = None,
        text_first: bool = True,
        about: Mapping[str, Any] | None = None,
    ) -> BlockPlan:
        """Make a plan of a mask of blocks.

        Args:
            keep: Bool [heads, query blocks, key blocks], or with the parts of the run as a first dimension.
            block: Tokens in a block of keys, and of queries unless `block_q` says otherwise.
            order: Each head's token order by number or name ("FHW", ...); None keeps the model's.
            n_text: Text tokens.
            block_q: Tokens in a block of queries.
            grid: Frames, rows and columns of the image tokens; needed where a head is reordered.
            n_image: Image tokens; None for the grid's, or for any number that makes as many blocks.
            text_first: Whether the text stands before the image.
            about: Facts to be kept with the plan.

        Raises:
            PlanError: A shape, a size or an order does not fit, or a row of blocks keeps no key.
        """
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.dim() not in (3, 4):
            given = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise PlanError(
                f"keep is {given}; expected a bool tensor [heads, query blocks, key blocks], or with step groups first."
            )
        keep = (keep if keep.dim() == 4 else keep[None]).detach().cpu()
        groups, heads, nq, nk = keep.shape
        bq = block if block_q is None else block_q
        for name, value, least in (("block", block, 1), ("block_q", bq, 1), ("n_text", n_text, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PlanError(f"{name}={value!r} was given; expected a whole number, {least} or more.")
        if not groups or not heads or not nq or not nk:
            raise PlanError(f"keep has the shape {list(keep.shape)}: a plan needs at least one head and one block.")
        ids = (0,) * heads if order is None else order_ids(order, heads)
        where = None if grid is None else _grid(grid)
        n = math.prod(where) if where is not None else n_image
        if n_image is not None and n_image != n:
            raise PlanError(f"n_image={n_image} was given with the grid {where}, which has {n} tokens.")
        if any(ids) and where is None:
            raise PlanError("A head is reordered, so grid=(frames, rows, columns) must be given.")
        _check_size(keep, n, bq, block)
        empty = (~keep.any(-1)).nonzero()
        if len(empty):
            g, h, row = empty[0].tolist()
            raise PlanError(
                f"Query block {row} of head {h} in step group {g} keeps no key block ({len(empty)} such rows): its "
                "attention is undefined. Keep at least the largest block of every row."
            )
        return cls(
            keep=keep, block_q=bq, block_k=block, order=ids, grid=where, n_image=n, n_text=n_text,
            text_first=text_first, about=dict(about or {}),
        )  # fmt: skip

    def __repr__(self) -> str:
        """Tell the sizes; the mask itself fills screens."""
        nq, nk = self.keep.shape[-2:]
        return (
            f"BlockPlan({self.heads} heads, {self.groups} step groups, {nq} x {nk} blocks of {self.block_q} x "
            f"{self.block_k} tokens, density {self.density:.3f})"
        )

    @property
    def groups(self) -> int:
        """Return the number of parts of the run that have blocks of their own."""
        return int(self.keep.shape[0])

    @property
    def heads(self) -> int:
        """Return the number of heads."""
        return int(self.keep.shape[1])

    def group_at(self, step: int, steps: int) -> int:
        """Return which part of the run a step lies in; steps beyond the end lie in the last."""
        return min(max(step, 0) * self.groups // max(steps, 1), self.groups - 1)

    @cached_property
    def density(self) -> float:
        """Share of the whole map that is computed, text included, averaged over heads and parts of the run."""
        n, t = self.n_image or self.keep.shape[-1] * self.block_k, self.n_text
        rows = _sizes(n, self.block_q)
        columns = _sizes(n, self.block_k)
        image = float((self.keep.double() * rows[:, None] * columns).sum((-2, -1)).mean())
        return (image + t * (2 * n + t)) / (n + t) ** 2

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What kernels have derived from this plan, by their own keys; it goes when the plan does."""
        return {}

    def sized(self, n_image: int) -> BlockPlan:
        """Return this plan for a number of image tokens: itself, unless it was made for any.

        Raises:
            PlanError: It was made for another number, or that number makes more or fewer blocks.
        """
        if self.n_image == n_image:
            return self
        if self.n_image is not None:
            raise PlanError(f"The plan is for {self.n_image} image tokens; this attention has {n_image}.")
        if ("sized", n_image) not in self.cache:
            _check_size(self.keep, n_image, self.block_q, self.block_k)
            self.cache["sized", n_image] = replace(self, n_image=n_image)
        found: BlockPlan = self.cache["sized", n_image]
        return found

    def span(self, tokens: int) -> slice:
        """Return where the image tokens lie in a sequence; the text may be longer or shorter than the plan's.

        Raises:
            PlanError: The sequence is too short for the plan's image.
        """
        image = tokens - self.n_text if self.n_image is None else self.n_image
        text = tokens - image
        if image < 1 or text < 0 or bool(text) != bool(self.n_text):
            raise PlanError(
                f"The plan is for {self.n_image or 'any number of'} image and {self.n_text} text tokens; the sequence "
                f"has {tokens} tokens."
            )
        return slice(text, tokens) if self.text_first else slice(0, image)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the plan into a folder (JSON and safetensors) and return the folder."""
        from attnctl.plans.model import ModelPlan

        return ModelPlan(plans={"": self}).save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], *, revision: str | None = None) -> BlockPlan:
        """Read a plan of one attention from a folder or a Hub repository.

        Raises:
            PlanError: A file is missing, damaged, hostile or of another schema, or holds plans of several sites.
        """
        from attnctl.plans.model import ModelPlan

        plans = ModelPlan.from_pretrained(path_or_repo, revision=revision).plans
        if len(plans) != 1:
            raise PlanError(
                f"{path_or_repo} holds plans of {len(plans)} sites: read it with "
                "attnctl.plans.ModelPlan.from_pretrained."
            )
        return next(iter(plans.values()))


def _grid(grid: Sequence[int]) -> Grid:
    whole = len(grid) == 3 and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid)
    if not whole:
        raise PlanError(f"grid={tuple(grid)!r} was given; expected (frames, rows, columns) as whole numbers.")
    return int(grid[0]), int(grid[1]), int(grid[2])


def _check_size(keep: Tensor, n: int | None, block_q: int, block_k: int) -> None:
    """Raise PlanError unless n tokens make the blocks of the mask; None means that some number must."""
    nq, nk = keep.shape[-2:]
    if n is None:
        if max((nq - 1) * block_q, (nk - 1) * block_k) >= min(nq * block_q, nk * block_k):
            raise PlanError(f"No number of tokens makes {nq} x {nk} blocks of {block_q} x {block_k} tokens.")
    elif (-(-n // block_q), -(-n // block_k)) != (nq, nk):
        raise PlanError(
            f"keep has {nq} x {nk} blocks; {n} image tokens make {-(-n // block_q)} x {-(-n // block_k)} blocks of "
            f"{block_q} x {block_k} tokens."
        )


def _sizes(n: int, block: int) -> Tensor:
    """Return the number of tokens in every block, float64."""
    count = -(-n // block)
    sizes = torch.full((count,), float(block), dtype=torch.float64)
    sizes[-1] = n - (count - 1) * block
    return sizes
