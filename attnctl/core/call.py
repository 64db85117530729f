"""What the current denoiser call is: its step, its rows, its token grid.

One plain `CallState` per denoiser is written by the session's hooks and read by controls. It is an ordinary shared
object on purpose: gradient checkpointing recomputes attention in autograd's own threads, where context variables and
thread locals are empty.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attnctl.core.hosts.families import Family
from attnctl.core.hosts.prompt import PromptCall
from attnctl.core.sites import Grid
from attnctl.errors import UnsupportedModelError

__all__ = ["CallState", "Rows", "bind_call", "main_input", "main_name", "row_count", "take_rows"]

# Arguments that all rows share even when their first axis happens to be as long as the batch.
_SHARED = frozenset({"txt_ids", "img_ids", "image_rotary_emb", "rotary_emb", "rope_interpolation_scale", "return_dict"})
# Arguments that are Python lists with one entry a row.
_ROW_LISTS = frozenset({"x", "cap_feats", "img_shapes", "txt_seq_lens"})
_MAIN = ("sample", "hidden_states", "x")


@dataclass(frozen=True)
class Rows:
    """Which rows of a denoiser call carry the prompt.

    Attributes:
        total: Rows of the call.
        cond: Rows with the prompt; empty where the whole call is the negative one.
        uncond: Rows with the negative prompt in the same call, or None.
        role: "all" (every row carries the prompt), "both" (half of the rows are negative), "uncond" (the call is the
            negative half of a sequential pair) or "extra" (a call that guidance must leave alone).
    """

    total: int
    cond: slice
    uncond: slice | None = None
    role: str = "all"

    @property
    def prompts(self) -> int:
        """Count the rows that carry the prompt."""
        return len(range(self.total)[self.cond])

    @classmethod
    def all(cls, total: int) -> Rows:
        """Treat every row as a prompt row."""
        return cls(total, slice(0, total))

    @classmethod
    def halves(cls, total: int, cond_first: bool = False) -> Rows:
        """Treat one half as negative rows and the other, by default the second, as prompt rows."""
        first, second = slice(0, total // 2), slice(total // 2, total)
        return cls(total, first, second, "both") if cond_first else cls(total, second, first, "both")


@dataclass
class CallState:
    """The current denoiser call, as controls see it.

    Attributes:
        step: Index of the scheduler step, from 0; counted by calls of `scheduler.step`, not read off timesteps.
        steps: Steps of the run, or None where nothing tells.
        timestep: The scheduler's timestep, 0 to 1000 (1000 = noise), or None.
        rows: Rows of the call.
        phase: "base" or the name of the guidance branch that is running.
        call: Number of the denoiser call; the same while autograd computes a part of it again.
        prompts: The texts of the pipeline call, where a control asked to hear them and the pipeline was given text.
        scratch: What controls keep from one site to the next; emptied when the call and its perturbed passes are over.
    """

    step: int = 0
    steps: int | None = None
    timestep: float | None = None
    rows: Rows = field(default_factory=lambda: Rows.all(1))
    phase: str = "base"
    call: int = 0
    prompts: PromptCall | None = None
    denoiser: torch.nn.Module | None = None
    family: Family | None = None
    bound: Mapping[str, Any] = field(default_factory=dict)
    scratch: dict[Any, Any] = field(default_factory=dict)
    last_grid: Grid | None = None
    _grid: Grid | None = None
    _grid_known: bool = False
    _image_tokens: int | None = None
    _image_tokens_known: bool = False

    @property
    def progress(self) -> float:
        """Return the fraction of the run that is done, 0 <= i/n < 1."""
        return self.step / self.steps if self.steps else 0.0

    def begin_call(self, denoiser: torch.nn.Module, family: Family, bound: Mapping[str, Any]) -> None:
        """Forget the last call and describe a new one."""
        self.denoiser, self.family, self.bound = denoiser, family, bound
        self._grid, self._grid_known = None, False
        self._image_tokens, self._image_tokens_known = None, False
        self.phase = "base"
        self.call += 1
        _ = self.image_tokens  # here and not at a site, where a compiled block would have to trace it

    def end_call(self) -> None:
        """Drop references to the call's tensors."""
        if self.last_grid is None:  # reading it may wait for the device: once is enough for a report
            self.last_grid = self.grid
        self.bound = {}

    @property
    def grid(self) -> Grid | None:
        """Return frames, rows and columns of the token grid, or None for a family without a rule."""
        if not self._grid_known:
            self._grid_known = True
            if self.family is not None and self.denoiser is not None:
                self._grid = self.family.grid(self.denoiser, self.bound)
        return self._grid

    @property
    def image_tokens(self) -> int | None:
        """Return the number of image tokens in a packed sequence, or None where nothing tells."""
        if self.family is None or self.denoiser is None:
            return None
        if not self._image_tokens_known and self.bound:
            self._image_tokens_known = True
            if self.family.image_tokens is not None:
                self._image_tokens = self.family.image_tokens(self.denoiser, self.bound)
            elif (grid := self.grid) is not None:
                self._image_tokens = grid[0] * grid[1] * grid[2]
        return self._image_tokens


def bind_call(denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name a call's arguments by the parameters of the denoiser's own forward."""
    bound = inspect.signature(type(denoiser).forward).bind_partial(denoiser, *args, **kwargs)
    arguments = dict(bound.arguments)
    arguments.pop("self", None)
    extra = arguments.pop("kwargs", None)
    if isinstance(extra, dict):
        arguments.update(extra)
    return arguments


def main_input(bound: Mapping[str, Any]) -> Any:
    """Return the latents of a call: a tensor with rows first, or a list with one tensor a row."""
    for name in _MAIN:
        if bound.get(name) is not None:
            return bound[name]
    raise UnsupportedModelError(
        f"The denoiser was called without {', '.join(_MAIN)} (got {', '.join(bound) or 'nothing'}): "
        "its rows cannot be told apart."
    )


def main_name(bound: Mapping[str, Any]) -> str:
    """Name the argument that holds the latents of a call."""
    main_input(bound)
    return next(name for name in _MAIN if bound.get(name) is not None)


def row_count(bound: Mapping[str, Any]) -> int:
    """Count the rows of a call."""
    main = main_input(bound)
    return len(main) if isinstance(main, (list, tuple)) else int(main.shape[0])


def take_rows(bound: Mapping[str, Any], rows: slice, total: int, frames: int = 1) -> dict[str, Any]:
    """Slice every batched argument of a call to some of its rows.

    A tensor is batched when its first axis has `total` or `total * frames` entries (rows major) and its name is not
    one that rows share.
    """
    if rows == slice(0, total):
        return dict(bound)

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return cut_tensor(value, rows, total, (1, frames))
        if isinstance(value, dict):
            return {k: v if k in _SHARED else cut(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(cut(v) for v in value)
        return value

    taken = {}
    for name, value in bound.items():
        if name in _SHARED:
            taken[name] = value
        elif name in _ROW_LISTS and isinstance(value, (list, tuple)):
            taken[name] = value[rows] if len(value) == total else value
        else:
            taken[name] = cut(value)
    return taken


def cut_tensor(value: torch.Tensor, rows: slice, total: int, multiples: tuple[int, ...]) -> torch.Tensor:
    """Slice the rows of one tensor if its first axis is `total` times one of the multiples."""
    if value.ndim == 0 or value.shape[0] % total or value.shape[0] // total not in multiples:
        return value
    m = value.shape[0] // total
    return value[rows.start * m : rows.stop * m]
