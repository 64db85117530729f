"""The arguments of a denoiser call: their names, which of them hold one entry per row, and how rows are cut out."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnctl.core.hosts.families import Family
from attnctl.errors import UnsupportedModelError

__all__ = [
    "ROW_LISTS",
    "SHARED",
    "Rows",
    "as_given",
    "bind_call",
    "cut_tensor",
    "main_input",
    "main_name",
    "own_containers",
    "row_alone",
    "row_count",
    "shared_like_rows",
    "take_rows",
    "time_of",
]

# Arguments that all rows share even when their first axis happens to be as long as the batch.
SHARED = frozenset({"txt_ids", "img_ids", "image_rotary_emb", "rotary_emb", "rope_interpolation_scale", "return_dict"})
# Arguments that are Python lists with one entry a row.
ROW_LISTS = frozenset({"x", "cap_feats", "img_shapes", "txt_seq_lens", "shape_list"})
_MAIN = ("sample", "hidden_states", "x", "vision_tokens", "input_ids")


@dataclass(frozen=True)
class Rows:
    """Which rows of a denoiser call carry the prompt.

    Attributes:
        total: Rows of the call.
        cond: Rows with the prompt; empty where the whole call is the negative one.
        uncond: Rows with the negative prompt in the same call, or None.
        role: "all" (every row carries the prompt), "both" (half of the rows are negative), "thirds" (a third carries
            the prompt, beside rows with a picture alone and with neither), "uncond" (the call is the negative half of a
            sequential pair) or "extra" (a call that guidance must leave alone).
    """

    total: int
    cond: slice
    uncond: slice | None = None
    role: str = "all"

    @property
    def prompts(self) -> int:
        """Count the rows that carry the prompt."""
        return len(range(self.total)[self.cond])

    @property
    def groups(self) -> tuple[slice, ...]:
        """Return the rows of each condition, in the order of the batch."""
        count = {"both": 2, "thirds": 3}.get(self.role, 1)
        size = self.total // count
        return tuple(slice(i * size, (i + 1) * size) for i in range(count))

    @classmethod
    def all(cls, total: int) -> Rows:
        """Treat every row as a prompt row."""
        return cls(total, slice(0, total))

    @classmethod
    def halves(cls, total: int, cond_first: bool = False) -> Rows:
        """Treat one half as negative rows and the other, by default the second, as prompt rows."""
        first, second = slice(0, total // 2), slice(total // 2, total)
        return cls(total, first, second, "both") if cond_first else cls(total, second, first, "both")

    @classmethod
    def thirds(cls, total: int, prompt: int) -> Rows:
        """Treat one third as prompt rows, the others as rows without its words."""
        return cls(total, slice(prompt * total // 3, (prompt + 1) * total // 3), None, "thirds")


def bind_call(denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name a call's arguments by the parameters of the denoiser's own forward; its lists and dicts are copies."""
    signature = _signature(type(denoiser).forward)
    arguments: dict[str, Any] = {}
    for name, value in list(signature.bind_partial(denoiser, *args, **kwargs).arguments.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    copies: dict[str, Any] = own_containers(arguments)
    return copies


@functools.cache
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def as_given(
    denoiser: torch.nn.Module, arguments: Mapping[str, Any], positional: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return named arguments as a call gives them, the first so many by position; lists and dicts are copies.

    Tools that wrap a denoiser's `forward` may read its arguments by position (DeepCache does).
    """
    copies = own_containers(dict(arguments))
    parameters = list(_signature(type(denoiser).forward).parameters)[1 : positional + 1]
    names = list(itertools.takewhile(copies.__contains__, parameters))
    return tuple(copies.pop(name) for name in names), copies


def own_containers(value: Any) -> Any:
    """Copy the lists, dicts and tuples of nested arguments, not the tensors in them.

    Hosts empty containers that they are handed (lists of residuals are popped one by one): each pass needs its own.
    """
    if type(value) is dict:
        return {k: own_containers(v) if isinstance(v, _CONTAINERS) else v for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)([own_containers(v) if isinstance(v, _CONTAINERS) else v for v in value])
    return copy.copy(value) if isinstance(value, (list, dict)) else value


_CONTAINERS = (list, tuple, dict)


def main_input(bound: Mapping[str, Any]) -> Any:
    """Return the latents of a call: a tensor with rows first, or a list with one tensor a row."""
    for name in _MAIN:
        if bound.get(name) is not None:
            return bound[name]
    raise UnsupportedModelError(
        f"The denoiser was called without {', '.join(_MAIN)} (got {', '.join(bound) or 'nothing'}): "
        "its rows cannot be told apart."
    )


def given_time(bound: Mapping[str, Any]) -> Any:
    """Return the timestep that a denoiser is called with, as it was given; None where it has none."""
    return next((bound[n] for n in ("timestep", "t", "timesteps") if bound.get(n) is not None), None)


def time_of(bound: Mapping[str, Any]) -> float | None:
    """Return the timestep that a denoiser is called with, the noisiest where rows differ; None where it has none."""
    value = given_time(bound)
    if isinstance(value, torch.Tensor):
        return None if value.is_meta or not value.numel() else float(value.max())
    return float(value) if isinstance(value, (int, float)) else None


def main_name(bound: Mapping[str, Any]) -> str:
    """Name the argument that holds the latents of a call."""
    main_input(bound)
    return next(name for name in _MAIN if bound.get(name) is not None)


def row_count(bound: Mapping[str, Any]) -> int:
    """Count the rows of a call."""
    main = main_input(bound)
    return len(main) if isinstance(main, (list, tuple)) else int(main.shape[0])


def shared_like_rows(state: Any) -> bool:
    """Tell whether a call's argument that all rows share has as many entries as there are rows (times of streams)."""
    values = [state.bound.get(name) for name in state.family.shared]
    total = state.rows.total
    return total > 1 and any(isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == total for x in values)


def take_rows(
    bound: Mapping[str, Any], rows: slice, total: int, frames: int = 1, family: Family | None = None
) -> dict[str, Any]:
    """Slice every batched argument of a call to some of its rows.

    A tensor is batched when its first axis has `total` or `total * frames` entries (rows major) and its name is not
    one that rows share; the family says what is otherwise.
    """
    if rows == slice(0, total):
        return dict(bound)

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return cut_tensor(value, rows, total, (1, frames))
        if isinstance(value, dict):
            return {k: v if k in SHARED else cut(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(cut(v) for v in value)
        return value

    shared = SHARED if family is None else SHARED | family.shared
    listed = any(isinstance(bound.get(name), (list, tuple)) for name in _MAIN)  # then all that has rows is a list
    taken = {}
    for name, value in bound.items():
        if name in shared:
            taken[name] = value
        elif family is not None and name in family.row_axis and isinstance(value, torch.Tensor):
            taken[name] = value.movedim(family.row_axis[name], 0)[rows].movedim(0, family.row_axis[name])
        elif (listed or name in ROW_LISTS) and isinstance(value, (list, tuple)):
            taken[name] = value[rows] if len(value) == total else value
        else:
            taken[name] = cut(value)
    return taken if family is None else taken | family.cut(bound, rows)


def row_alone(q: torch.Tensor, rows: Rows, index: int) -> int | None:
    """Return the row of a denoiser's call that an attention call holds alone, as Mochi's do in order; else None."""
    return index if q.shape[0] == 1 and index < rows.total and rows.total > 1 else None


def cut_tensor(value: torch.Tensor, rows: slice, total: int, multiples: tuple[int, ...]) -> torch.Tensor:
    """Slice the rows of one tensor if its first axis is `total` times one of the multiples."""
    if value.ndim == 0 or value.shape[0] % total or value.shape[0] // total not in multiples:
        return value
    m = value.shape[0] // total
    return value[rows.start * m : rows.stop * m]
