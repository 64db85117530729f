"""The grid of each attention of a backbone, as its calls come."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attnctl.backbones.grid import GridRecorder, grid_of_shape, watch_grid
from attnctl.backbones.look.frames import Frame
from attnctl.backbones.look.sites import BackboneSite, owner_of
from attnctl.errors import UnsupportedModelError

__all__ = ["GridWatch"]

Grid = tuple[int, int]


class GridWatch:
    """Finds the token grid of every site: its call, its frame, the patch embedding, or the shape of the images.

    Until `undo` closes, hooks note what the modules around the sites are called with.
    """

    def __init__(self, model: nn.Module, sites: Sequence[BackboneSite], undo: contextlib.ExitStack) -> None:
        self._owners = {s.name: owner_of(model, s.name) for s in sites}
        self._recorders: dict[nn.Module, GridRecorder] = {}
        self._batches: dict[nn.Module, int] = {}
        self._images: dict[nn.Module, Grid] = {}
        self._framed: dict[nn.Module, Grid] = {}
        for owner in dict.fromkeys(self._owners.values()):
            undo.callback(owner.register_forward_pre_hook(self._note_batch).remove)
            if hasattr(owner, "patch_embed"):
                self._recorders[owner], hook = watch_grid(owner)
                undo.callback(hook.remove)
        for frame in {s.frame.module: s.frame for s in sites if s.frame is not None}.values():
            undo.callback(self._watch(frame).remove)

    def __call__(self, site: BackboneSite, args: tuple[Any, ...]) -> Grid:
        """Return (height, width) in tokens of a call of a site.

        Raises: UnsupportedModelError where nothing shows how the tokens lie, or places are folded into the batch in a
        way that is not known here.
        """
        x, frame = args[0], site.frame
        parts = 1
        if frame is not None:
            grid = self._framed[frame.module]
            parts = 1 if frame.places is None else frame.places(*grid).shape[0]
        elif x.ndim == 4:
            grid = (x.shape[2], x.shape[3]) if site.reading.channels_first else (x.shape[1], x.shape[2])
        elif site.reading.sized and len(args) > 1 and args[1] is not None:
            grid = (int(args[1][0]), int(args[1][1]))
        else:
            grid = self._of_sequence(site, x.shape[1] - site.prefix)
        images = self._batches.get(self._owners[site.name], x.shape[0])
        if x.shape[0] != images * parts:
            raise UnsupportedModelError(
                f"{site.name} was called with a batch of {x.shape[0]} for {images} images: the model folds places into "
                "the batch, and which ones is not known here. Leave this site out."
            )
        return grid

    def _of_sequence(self, site: BackboneSite, tokens: int) -> Grid:
        """Find the grid of a sequence: from the patch embedding, or of the shape that the images have."""
        owner = self._owners[site.name]
        live = self._recorders[owner].grid if owner in self._recorders else None
        grids = [live or getattr(getattr(owner, "patch_embed", None), "grid_size", None)]
        height, width = self._images.get(owner, (1, 1))
        # A pool may be given the class and register tokens or not.
        counts = [tokens, tokens + site.prefix] if site.reading.pool is not None else [tokens]
        for count in counts:
            for size in (*grids, grid_of_shape((height, width), count)):
                if size is not None and size[0] * size[1] == count:
                    return int(size[0]), int(size[1])
        raise UnsupportedModelError(f"Nothing shows how the {tokens} tokens of {site.name} lie on the image.")

    def _note_batch(self, owner: nn.Module, args: Any) -> None:
        if args and torch.is_tensor(args[0]):
            self._batches[owner] = args[0].shape[0]
            if args[0].ndim == 4:
                self._images[owner] = (args[0].shape[2], args[0].shape[3])

    def _watch(self, frame: Frame) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            if module is frame.module:  # and not that of a copy, which takes the hook along
                self._framed[module] = frame.grid(args)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module is frame.module:
                self._framed[module] = frame.grid(output)

        if frame.shown == "input":
            return frame.module.register_forward_pre_hook(before)
        return frame.module.register_forward_hook(after)
