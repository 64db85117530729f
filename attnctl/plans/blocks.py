"""Which blocks of an attention map to compute: one attention's plan, for every head and part of the run.

The image tokens are laid out per head in one of several orders, cut into blocks, and for every block of queries a plan
says which blocks of keys count; the softmax runs over those alone. Text tokens attend and are attended to in full.
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

from attnctl.errors import PlanError, unboxed, whole
from attnctl.plans.block_files import read_masks, write_masks
from attnctl.plans.orders import order_ids

__all__ = ["BlockPlan", "Blocks"]

Grid = tuple[int, int, int]
_LARGEST = 1 << 40  # tokens: far beyond any sequence, and far from where products of sizes overflow


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Blocks:
    """The blocks that one attention computes, as kernels read them: nothing is checked, and nothing leaves the device.

    Attributes:
        keep: Blocks to compute, bool [groups, heads, query blocks, key blocks], in each head's own order of tokens.
        block_q: Tokens in a block of queries; the last block may be smaller.
        block_k: Tokens in a block of keys; the last block may be smaller.
        order: Number of every head's token order (`attnctl.plans.orders.LAYOUTS`).
        grid: Frames, rows and columns of the image tokens; None where no head is reordered.
        n_image: Number of image tokens; None for any that makes as many blocks (see `sized`).
        n_text: Number of text tokens that it was made with.
        text_first: Whether the text stands before the image.
        rest: Whether each block that is left out still counts as its mean key and its mean value.
    """

    keep: Tensor
    block_q: int
    block_k: int
    order: tuple[int, ...]
    grid: Grid | None
    n_image: int | None
    n_text: int = 0
    text_first: bool = True
    rest: bool = False

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
        image = float((self.keep.cpu().double() * rows[:, None] * columns).sum((-2, -1)).mean())
        return (image + t * (2 * n + t)) / (n + t) ** 2

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What kernels have derived from these blocks, by their own keys; it goes when they do."""
        return {}

    def sized(self, n_image: int) -> Blocks:
        """Return these blocks for a number of image tokens: themselves, unless they were made for any.

        Raises:
            PlanError: They were made for another number, or that number makes more or fewer blocks.
        """
        if self.n_image == n_image:
            return self
        if self.n_image is not None:
            raise PlanError(f"The plan is for {self.n_image} image tokens; this attention has {n_image}.")
        if ("sized", n_image) not in self.cache:
            _check_size(self.keep, n_image, self.block_q, self.block_k)
            self.cache["sized", n_image] = replace(self, n_image=n_image)
        blocks: Blocks = self.cache["sized", n_image]
        return blocks

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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BlockPlan(Blocks):
    """Hold the blocks that one attention computes, checked, in the memory of the CPU, and in files.

    Make one with `from_mask`, which brings its arguments into this form.

    Attributes:
        about: Facts for people: metric, density asked for, captured mass.
    """

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
            about: Facts to be stored with the plan.

        Raises:
            PlanError: A shape, a size or an order does not fit, or a row of blocks keeps no key.
        """
        keep = _checked_keep(keep)
        ids = (0,) * keep.shape[1] if order is None else order_ids(order, keep.shape[1])
        where = None if grid is None else _checked_grid(grid)
        n = math.prod(where) if where is not None else n_image
        if n_image is not None and n_image != n:
            raise PlanError(f"n_image={n_image} was given with the grid {where}, which has {n} tokens.")
        return cls(
            keep=keep, block_q=block if block_q is None else block_q, block_k=block, order=ids, grid=where, n_image=n,
            n_text=n_text, text_first=text_first, about={} if about is None else about,
        )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every field: sizes that do not fit would index out of range in a kernel."""
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        heads = self.keep.shape[1]
        for field_name, name, least in (("block_k", "block", 1), ("block_q", "block_q", 1), ("n_text", "n_text", 0)):
            value = whole(getattr(self, field_name), name, least, _LARGEST, error=PlanError)
            object.__setattr__(self, field_name, value)
        if self.n_image is not None:
            object.__setattr__(self, "n_image", whole(self.n_image, "n_image", 1, _LARGEST, error=PlanError))
        object.__setattr__(self, "order", order_ids(self.order, heads))
        if self.grid is not None:
            object.__setattr__(self, "grid", _checked_grid(self.grid))
            if math.prod(self.grid) != self.n_image:
                raise PlanError(f"n_image={self.n_image} was given with the grid {self.grid}.")
        if any(self.order) and self.grid is None:
            raise PlanError("A head is reordered, so grid=(frames, rows, columns) must be given.")
        if not isinstance(self.text_first, bool) or not isinstance(self.about, Mapping):
            raise PlanError(f"text_first={self.text_first!r:.40} should be a bool, and about={self.about!r:.40} facts.")
        object.__setattr__(self, "about", dict(self.about))
        _check_size(self.keep, self.n_image, self.block_q, self.block_k)
        empty = (~self.keep.any(-1)).nonzero()
        if len(empty):
            g, h, row = empty[0].tolist()
            raise PlanError(
                f"Query block {row} of head {h} in step group {g} keeps no key block ({len(empty)} such rows): its "
                "attention is undefined. Keep at least the largest block of every row."
            )

    def __repr__(self) -> str:
        """Tell the sizes; the mask itself fills screens."""
        nq, nk = self.keep.shape[-2:]
        return (
            f"BlockPlan({self.heads} heads, {self.groups} step groups, {nq} x {nk} blocks of {self.block_q} x "
            f"{self.block_k} tokens, density {self.density:.3f})"
        )

    def to_mask(self, site: str = "") -> tuple[Tensor, dict[str, Any]]:
        """Return the mask and what else a file holds of this plan, under the name of its site."""
        facts = {
            "site": site, "block_q": self.block_q, "block_k": self.block_k, "order": list(self.order),
            "grid": None if self.grid is None else list(self.grid), "n_image": self.n_image, "n_text": self.n_text,
            "text_first": self.text_first, "about": dict(self.about),
        }  # fmt: skip
        return self.keep, facts

    def save_pretrained(self, folder: str | os.PathLike[str], *, force: bool = True) -> Path:
        """Write the plan into a folder (JSON and safetensors) and return it; another one there is replaced as a whole.

        Raises:
            FileExists: Another plan is there, and `force` is False.
            WriteError: The disk is full, or the folder cannot be written.
        """
        return write_masks(folder, [self.to_mask()], None, {}, force=force)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], *, revision: str | None = None) -> BlockPlan:
        """Read a plan of one attention from a folder or a Hub repository.

        Raises:
            PlanError: A file is missing, damaged, hostile or of another schema, or holds plans of several sites.
        """
        sites, _, _ = read_masks(path_or_repo, revision)
        if not sites:
            raise PlanError(f"{path_or_repo} holds no plan: a model's plan needs the plan of at least one site.")
        if len(sites) != 1:
            raise PlanError(
                f"{path_or_repo} holds plans of {len(sites)} sites: read it with "
                "attnctl.plans.ModelPlan.from_pretrained."
            )
        _, keep, fields = sites[0]
        return cls.from_mask(keep, **fields)


def _checked_keep(keep: Any) -> Tensor:
    """Return a mask as bool [groups, heads, query blocks, key blocks] in the memory of the CPU."""
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.dim() not in (3, 4):
        given = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise PlanError(
            f"keep is {given}; expected a bool tensor [heads, query blocks, key blocks], or with step groups first."
        )
    keep = (keep if keep.dim() == 4 else keep[None]).detach().cpu()
    if not keep.numel():
        raise PlanError(f"keep has the shape {list(keep.shape)}: a plan needs at least one head and one block.")
    return keep


def _checked_grid(grid: Any) -> Grid:
    sizes = [unboxed(n) for n in grid] if isinstance(grid, Sequence) else []
    if len(sizes) != 3 or not all(type(n) is int and 0 < n <= _LARGEST for n in sizes):
        raise PlanError(f"grid={grid!r:.80} was given; expected (frames, rows, columns) as whole numbers.")
    return sizes[0], sizes[1], sizes[2]


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
