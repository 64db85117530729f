"""A denoiser's call with its image cut to one line of tokens, for what depends on the text alone.

Text rows of a call see the image through attention only. A call that is made for its text (to read keys, or to take a
text through the blocks beside the real image) therefore needs hardly any image. One line is kept and not one token,
because pipelines count positions of the text from the longer side of the image (Qwen-Image).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnctl.core.hosts.arguments import main_input, main_name, row_count
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.kinds import text_lengths
from attnctl.core.hosts.readings import read_once
from attnctl.core.sites import Grid

__all__ = ["one_line"]

# What is added to the image inside of the blocks: nothing that is read here depends on it.
_RESIDUALS = re.compile(r"residual|block_samples|controlnet")
_TEXT = re.compile(r"^(encoder|text|txt|cap|prompt|pooled|context)")
# Places of tokens in the sequence, which are numbers of it and no tokens themselves.
_PLACES = re.compile(r"indices|indexes|indicator|input_ids")
_SIZES = ("num_frames", "height", "width")


def one_line(denoiser: torch.nn.Module, family: Family, bound: Mapping[str, Any]) -> dict[str, Any] | None:
    """Cut the image of a call to one frame and one line of tokens, along its longer side.

    Args:
        denoiser: The denoiser.
        family: Its family.
        bound: Arguments of the call by name.

    Returns:
        The arguments of the smaller call, or None where nothing tells how the image's tokens lie in them.
    """
    grid, main = family.grid(denoiser, bound), main_input(bound)
    if grid is None or (main_name(bound) == "x" and not isinstance(main, (list, tuple))):
        return None
    cut = {name: None if _RESIDUALS.search(name) else value for name, value in bound.items()}
    if family.unet:
        return _unet(denoiser, cut)
    keep = _line(grid)
    tokens = math.prod(grid)
    if isinstance(main, Tensor) and main.ndim == 3:
        if main.shape[1] != tokens:  # reference images or padding stand beside the image
            return None
        cut[main_name(bound)] = main[:, keep.start : keep.stop : keep.step]
    else:
        line = _spatial(denoiser, family, bound, grid)
        if line is None:
            return None
        cut[main_name(bound)] = line
    texts, rows = text_lengths(bound), row_count(bound)
    if tokens in texts:
        return None  # image and text cannot be told apart by their lengths
    for name, value in cut.items():
        if name != main_name(bound) and not _TEXT.search(name):
            cut[name] = _cut(name, value, tokens, keep, texts, family.text)
            per_frame = "timestep" in name and isinstance(value, Tensor) and value.ndim > 1
            if per_frame or _PLACES.search(name) or not (cut[name] is not value or _of_whole_call(value, rows)):
                return None
    return _resized(cut, grid)


def _of_whole_call(value: Any, rows: int) -> bool:
    """Tell whether an argument speaks of the whole call, or of each row, and not of places or frames of the image."""
    if isinstance(value, (list, tuple)):
        return not any(isinstance(v, Tensor) for v in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return True
    vectors = value.ndim == 2 and value.is_floating_point() and value.shape[0] == rows
    return vectors or (value.ndim == 1 and value.shape[0] in (1, rows))


def _line(grid: Grid) -> range:
    """Return the places of the tokens of the first frame's first row or column, whichever is longer."""
    _, h, w = grid
    return range(w) if w >= h else range(0, h * w, w)


def _spatial(denoiser: torch.nn.Module, family: Family, bound: Mapping[str, Any], grid: Grid) -> Any:
    """Cut latents that are no sequence: a tensor with rows first, or a list with one per row; None where nothing tells.

    Which axis holds frames, rows and columns shows in the grid of latents that are twice as long there.
    """
    name, main = main_name(bound), main_input(bound)
    listed = isinstance(main, (list, tuple))
    first = main[0] if listed else main
    axes: dict[int, int] = {}
    for axis in range(0 if listed else 1, first.ndim):
        shape = [2 * n if a == axis else n for a, n in enumerate(first.shape)]
        probe = torch.empty(shape, dtype=first.dtype, device="meta")
        other = family.grid(denoiser, {**bound, name: [probe] if listed else probe})
        changed = [i for i in range(3) if other is not None and other[i] != grid[i]]
        if len(changed) == 1:
            axes[changed[0]] = axis
    short = 1 if grid[2] >= grid[1] else 2
    if 1 not in axes or 2 not in axes or (grid[0] > 1 and 0 not in axes) or first.shape[axes[short]] % grid[short]:
        return None

    def line(x: Tensor) -> Tensor:
        if 0 in axes:
            x = x.narrow(axes[0], 0, math.ceil(x.shape[axes[0]] / grid[0]))
        return x.narrow(axes[short], 0, x.shape[axes[short]] // grid[short])

    return type(main)(map(line, main)) if listed else line(main)


def _unet(denoiser: torch.nn.Module, cut: dict[str, Any]) -> dict[str, Any] | None:
    """Keep of a UNet's latents what its stages can halve down to one token."""
    levels = getattr(getattr(denoiser, "config", None), "block_out_channels", None)
    sample = cut.get("sample")
    if levels is None or not isinstance(sample, Tensor):
        return None
    side = 2 ** (len(levels) - 1)
    if min(sample.shape[-2:]) < side:
        return None
    if any(isinstance(x, Tensor) and x.ndim > 3 and x is not sample for x in cut.values()):
        return None  # what is read of an image beside the latents may stand among the keys
    cut["sample"] = sample[..., :side, :side]
    return cut


def _cut(name: str, value: Any, tokens: int, keep: range, texts: set[int], text: str | None) -> Any:
    """Cut an argument to the line; position ids once, because the grid that is read off theirs waits for the device."""
    if not (name.endswith("ids") and isinstance(value, Tensor) and not value.requires_grad):
        return _tokens(value, tokens, keep, texts, text)

    def read(x: Tensor) -> Tensor | None:
        line = _tokens(x, tokens, keep, texts, text)
        return None if line is x else line  # a reading that is its own tensor would keep it alive

    line = read_once(value, f"line of {len(keep)} in {tokens}, {text} {sorted(texts)}", read)
    return value if line is None else line


def _tokens(value: Any, tokens: int, keep: range, texts: set[int], text: str | None) -> Any:
    """Cut whatever has an axis with the image's tokens, or with those and the text's."""
    if isinstance(value, dict):
        return {k: _tokens(v, tokens, keep, texts, text) for k, v in value.items()}
    if type(value) in (list, tuple):
        parts = [_tokens(v, tokens, keep, texts, text) for v in value]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else type(value)(parts)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    line = torch.arange(keep.start, keep.stop, keep.step, device=value.device)
    for axis, length in enumerate(value.shape):
        if length == tokens:
            value = value.index_select(axis, line)
        elif length - tokens in texts and text is not None:
            others = torch.arange(length - tokens, device=value.device)
            places = [others, line + len(others)] if text == "first" else [line, others + tokens]
            value = value.index_select(axis, torch.cat(places))
    return value


def _resized(cut: dict[str, Any], grid: Grid) -> dict[str, Any]:
    """Write the size of the line where a call tells the size of its image in numbers."""
    line = (1, 1, grid[2]) if grid[2] >= grid[1] else (1, grid[1], 1)
    if all(isinstance(cut.get(name), int) for name in _SIZES):
        cut.update(zip(_SIZES, line, strict=True))
    if cut.get("img_shapes"):
        nested = isinstance(cut["img_shapes"][0], list)
        cut["img_shapes"] = [[line] if nested else line for _ in cut["img_shapes"]]
    return cut
