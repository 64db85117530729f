"""The grid of every attention to be swapped: before the swap, by one dry run, and while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from attnctl.backbones.grid import FrameRecorder, GridRecorder, GridSource, ImageRecorder, grid_of_shape, watch_grid
from attnctl.backbones.kernel_hosts import KERNEL_HOSTS
from attnctl.backbones.look.frames import Frame, prefix_of
from attnctl.backbones.modes import evaluating
from attnctl.backbones.places import is_sequence
from attnctl.errors import SiteError, UnsupportedModelError

__all__ = ["dry_run", "grids_of", "image_size", "modules_around", "sources_of", "trunk_of"]

Grid = tuple[int, int]


def trunk_of(model: nn.Module) -> nn.Module:
    """Return the module that embeds patches: the model, or what timm's feature extractor holds."""
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "patch_embed") else model


def _embed_with_grid(trunk: nn.Module) -> nn.Module | None:
    embed = getattr(trunk, "patch_embed", None)
    return embed if getattr(embed, "grid_size", None) else None


def modules_around(model: nn.Module, name: str) -> list[nn.Module]:
    """List the modules around a dotted name, the innermost first and the model last."""
    parts = name.split(".")[:-1]
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]


def grids_of(
    model: nn.Module,
    places: dict[str, nn.Module],
    chosen: list[str],
    given: Grid | None,
    frames: dict[str, Frame | None],
) -> dict[str, Grid]:
    """Find the grid of every chosen place: given, from the patch embedding, or seen in one forward pass."""
    trunk = trunk_of(model)
    size: Any = given or getattr(_embed_with_grid(trunk), "grid_size", None)
    if size and all(is_sequence(places[n]) and frames[n] is None for n in chosen):
        return dict.fromkeys(chosen, (int(size[0]), int(size[1])))
    seen: dict[str, Grid] = {}
    images = ImageRecorder()
    shown = {n: FrameRecorder(_tokens_of(f)) for n, f in frames.items() if f is not None}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            first = bool(getattr(KERNEL_HOSTS.get(type(places[name])), "channels_first", False))
            if args[0].ndim == 4:
                seen[name] = (args[0].shape[2 if first else 1], args[0].shape[3 if first else 2])
            elif name in shown:
                seen[name] = shown[name].grid or (1, 1)
            elif len(args) > 1 and isinstance(args[1], (tuple, list, torch.Size)):
                seen[name] = (int(args[1][0]), int(args[1][1]))
            elif (grid := images.grid(args[0].shape[1] - prefix_of(trunk))) is not None:
                seen[name] = grid

        return hook

    with contextlib.ExitStack() as hooks:
        hooks.callback(trunk.register_forward_pre_hook(images).remove)
        for name, recorder in shown.items():
            hooks.callback(_watch(frames[name], recorder).remove)  # type: ignore[arg-type]
        for name in chosen:
            hooks.callback(places[name].register_forward_pre_hook(note(name)).remove)
        dry_run(model, image_size(model))
    missing = [n for n in chosen if n not in seen]
    if missing:
        raise SiteError(
            f"The grid of {missing[0]!r} cannot be told from {type(model).__name__}. "
            "Give grid=(height, width) in tokens."
        )
    return seen


def _tokens_of(frame: Frame) -> Callable[[Any], Grid]:
    """Return what computes the grid of one call's tokens from what a frame shows: a part of the map where it is cut."""
    if frame.places is None:
        return frame.grid

    def part(shown: Any) -> Grid:
        h, w = frame.grid(shown)
        _, tokens = frame.places(h, w).shape  # type: ignore[misc]
        return grid_of_shape((h, w), tokens) or (1, tokens)

    return part


def _watch(frame: Frame, recorder: FrameRecorder) -> Any:
    if frame.shown == "input":
        return frame.module.register_forward_pre_hook(recorder)
    return frame.module.register_forward_hook(recorder)


def sources_of(
    trunk: nn.Module,
    chosen: list[str],
    grids: dict[str, Grid],
    frames: dict[str, Frame | None],
    given: bool,
) -> tuple[dict[str, GridSource], list[RemovableHandle]]:
    """Return where each sequence finds its grid when it runs, and the hooks on what shows it."""
    hooks: list[RemovableHandle] = []
    embed = None if given else _embed_with_grid(trunk)
    live: GridRecorder | None = None
    images: ImageRecorder | None = None
    if any(frame is None for frame in frames.values()):
        if getattr(trunk, "patch_embed", None) is not None and getattr(trunk, "dynamic_img_size", False):
            live, hook = watch_grid(trunk)
            hooks.append(hook)
        elif embed is None and not given:
            images = ImageRecorder()
            hooks.append(trunk.register_forward_pre_hook(images))
    sources = {}
    for name in chosen:
        frame = frames.get(name)
        if frame is None:
            sources[name] = GridSource(grids[name], embed, live, images)
            continue
        recorder = FrameRecorder(_tokens_of(frame))
        hooks.append(_watch(frame, recorder))
        sources[name] = GridSource(grids[name], None, recorder)
    return sources, hooks


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """Return the size (channels, height, width) of the images that a model was built or resized for."""
    trunk = trunk_of(model)
    cfg = getattr(trunk, "pretrained_cfg", None) or {}
    first = next((m for m in trunk.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(trunk, "in_chans", None) or (first.in_channels if first else cfg.get("input_size", (3,))[0])
    size = (
        getattr(getattr(trunk, "patch_embed", None), "img_size", None)
        or getattr(trunk, "img_size", None)
        or (getattr(trunk, "_traits", None) or {}).get("img_size")  # timm 1.0.31 notes it on every model
        or cfg.get("input_size", (3, 224, 224))[1:]
    )
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def dry_run(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Run one image without gradients, keeping the modes and running statistics.

    Raises: UnsupportedModelError if the model refuses an image of that size.
    """
    first = next(model.parameters())
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *size, device=first.device, dtype=first.dtype))
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on an image of {size[0]} x {size[1]} x {size[2]}, the size that it "
            f"seems to be built for: {error}"
        ) from error
