"""One clip on its way through a model: which frames, of which size, in which windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.hosts.sizes import cell
from attnctl.core.hosts.textlayout import layout_readings
from attnctl.data.clips import Clip, fit
from attnctl.pipelines.editing.codec import decode, encode, latent_factor
from attnctl.pipelines.editing.inversion import ddim_of, estimate_bytes, invert
from attnctl.pipelines.editing.masks import check_covers, check_mask, region_of
from attnctl.pipelines.editing.probe import check_read_whole
from attnctl.pipelines.editing.running import running_on
from attnctl.processors.editing.fatezero import FateZero
from attnctl.processors.editing.fusion import frame_indices
from attnctl.processors.editing.source import Offload, check_room

__all__ = ["Job"]


class Job:
    """One clip on its way through the model, window by window."""

    def __init__(
        self,
        pipe: Any,
        clip: Clip,
        chosen: range,
        edit: FateZero,
        steps: int,
        size: Any,
        window: int,
        mask: np.ndarray | None = None,
    ) -> None:
        self.pipe, self.clip, self.chosen, self.edit, self.steps = pipe, clip, chosen, edit, steps
        self.size, self.window, self.mask = size, window, mask
        self.denoiser, self.ticks = pipe.unet, 2 * steps
        self.windows = range(0, len(chosen), window)
        self.ddim = ddim_of(pipe.scheduler)
        self.factor = latent_factor(pipe)
        self.multiple = cell(pipe) or self.factor

    def frames(self, first: int) -> range:
        """Return the frames of a window, counted in the clip as chosen."""
        return range(first, min(first + self.window, len(self.chosen)))

    def rows(self, first: int) -> list[int]:
        """Return the frames that go through the model with a window: its own and those that they look at."""
        total, window = len(self.chosen), self.frames(first)
        looked = frame_indices(self.edit.keys, total)
        return sorted({*window, *(f for i in window for f in looked[i])})

    def read(self, rows: list[int]) -> np.ndarray:
        """Read frames, brought to size."""
        return fit(self.clip.read([self.chosen[i] for i in rows]), self.size, self.multiple)

    def _region(self, rows: list[int]) -> Tensor | None:
        return region_of(self.mask, [self.chosen[i] for i in rows], self.chosen, self.size, self.multiple)

    def check(self, offload: Offload, budget: int | None, folder: str | Path | None) -> None:
        """Refuse what cannot run, before anything runs."""
        self.edit.resolve(find_sites(self.pipe.unet), family_of(self.pipe.unet))
        self.edit.plan(self.pipe)
        texts = {"source": self.edit.source, "target": self.edit.target}
        check_read_whole(self.pipe, {w: layout_readings(self.pipe, (t, None, None)) for w, t in texts.items()})
        check_mask(self.mask, self.clip, self.chosen)
        height, width = self.read([0]).shape[1:3]
        self.height, self.width = height, width
        check_covers(
            (self._region(self.rows(first)) for first in self.windows),
            (height // self.factor, width // self.factor),
        )
        rows = max(len(self.rows(first)) for first in self.windows)
        h, w = height // self.factor, width // self.factor
        self.bytes = estimate_bytes(self.pipe.unet, self.edit, rows, h, w, self.steps)[self.edit.store]
        device = next(self.pipe.unet.parameters()).device
        check_room(self.bytes, offload if self.edit.store != "recompute" else "none", device, budget, folder)

    def costs_in_words(self) -> str:
        """Say what the run will cost."""
        return (
            f"{len(self.windows)} window(s) of {self.window} frame(s), {self.width}x{self.height}: {self.steps} calls "
            f"to invert and {self.steps} to edit each; {self.bytes / 2**20:.1f} MiB kept of the source per window"
        )

    def run(
        self, first: int, call: dict[str, Any], offload: Offload, budget: Any, folder: Any, tick: Callable[[], object]
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """Invert and edit one window; return its source frames, its edited frames and the report."""
        rows, pipe, n = self.rows(first), self.pipe, len(self.rows(first))
        source = self.read(rows)
        inversion = invert(
            pipe,
            encode(pipe, source),
            control=self.edit,
            steps=self.steps,
            offload=offload,
            folder=folder,
            budget=budget,
            rows=rows,
            total=len(self.chosen),
            step=tick,
        )
        inversion.region = self._region(rows)
        with (
            inversion,
            torch.no_grad(),
            running_on(pipe, self.ddim, tick) as options,
            attach(pipe, dataclasses.replace(self.edit, inversion=inversion)) as handle,
        ):
            latents = pipe(
                prompt=[self.edit.target] * n,
                negative_prompt=[call["negative_prompt"]] * n,
                guidance_scale=call["guidance_scale"],
                latents=inversion.noise,
                num_inference_steps=self.steps,
                height=self.height,
                width=self.width,
                output_type="latent",
                return_dict=False,
                **options,
            )[0]
            report = handle.report() + f"\nsource: {self.edit.store}, {inversion.nbytes / 2**20:.2f} MiB a window"
        places = [rows.index(i) for i in self.frames(first)]
        return source[places], decode(pipe, latents[places]), report
