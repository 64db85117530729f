"""One clip or picture on its way through a transformer: checked and costed before anything is computed, then edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.core.hosts.autoencoders import Coded, Coder
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites
from attnctl.core.hosts.paths import PathScheduler, Route, base_of
from attnctl.core.hosts.sizes import largest
from attnctl.data.clips import Clip, fit
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.pipelines.editing.costs import Shape, calls_of, flow_costs, in_words
from attnctl.pipelines.editing.flow_inversion import (
    call_of,
    check_guided,
    check_noise,
    check_solver,
    invert_flow,
    reconstruct,
    rule_of,
)
from attnctl.pipelines.editing.masks import check_covers, check_mask, region_of
from attnctl.pipelines.editing.probe import Probed, check_read_whole, first_call
from attnctl.pipelines.editing.running import running_on
from attnctl.processors.editing.exchange import Exchange
from attnctl.processors.editing.fatezero import FateZero
from attnctl.processors.editing.flow_edit import FlowEdit
from attnctl.processors.editing.prompts import WordEdit
from attnctl.processors.editing.source import Offload, check_room

__all__ = ["FlowJob"]


class FlowJob:
    """One clip on its way through a transformer, window by window.

    Args:
        pipe: The pipeline.
        clip: The source.
        chosen: Its frames.
        edit: FateZero, Inject or FlowEdit.
        steps: Steps of the path.
        size: What frames are brought to.
        window: Most frames at once; None for all that belong together.
        solver: The rule of the inversion.
        noise: Where its noise begins: "own" or "drawn".
        mask: Where changes are allowed, bool [height, width] or [frames, height, width]; None for everywhere.
        check: Whether to measure the inversion's own reconstruction.
        options: Further arguments of the pipeline's call.
    """

    def __init__(
        self,
        pipe: Any,
        clip: Clip,
        chosen: range,
        edit: Any,
        steps: int,
        size: Any,
        window: int | None,
        solver: str,
        noise: str = "own",
        mask: np.ndarray | None = None,
        check: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = dict(options or {})
        self.pipe, self.clip, self.chosen, self.edit, self.steps = pipe, clip, chosen, edit, steps
        self.size, self.solver, self.noise, self.mask, self.check_error = size, solver, noise, mask, check
        check_noise(solver, noise)
        self.denoiser = pipe.transformer
        self.coder = Coder(pipe)
        # Pipelines of images take the frames one by one; those of videos all that are given, unless cut.
        self.window = 1 if not self.coder.video else (window or len(chosen))
        self.windows = range(0, len(chosen), self.window)
        self.ddim = base_of(pipe.scheduler)
        self.rule = rule_of(solver)
        self.multiple = self.coder.multiple
        self.costs: dict[str, Any] = {}
        self._coded: dict[int, Coded] = {}

    def frames(self, first: int) -> range:
        """Return the frames of a window, counted in the clip as chosen."""
        return range(first, min(first + self.window, len(self.chosen)))

    def read(self, rows: list[int]) -> np.ndarray:
        """Read frames, brought to size."""
        return fit(self.clip.read([self.chosen[i] for i in rows]), self.size, self.multiple)

    @property
    def ticks(self) -> int:
        """Return the evaluations of the denoiser per window, as calls of the pipeline."""
        up, down = calls_of(self.rule, self.steps)
        if isinstance(self.edit, FlowEdit):
            return self._edited() * self.edit.average
        stored = down if getattr(self.edit, "store", "recompute") != "recompute" else 0
        return up + down * (2 if self.check_error else 1) + stored

    def _edited(self) -> int:
        return max(1, round(self.steps * self.edit.strength))

    def check(self, offload: Offload, budget: int | None, folder: str | Path | None) -> None:
        """Refuse what cannot run, and find out what the run will cost, before anything runs.

        Raises:
            ConfigError: A word is in no prompt, a size does not fit, frames or masks do not match.
            UnsupportedModelError: The model cannot be edited.
        """
        edit, pipe = self.edit, self.pipe
        family = family_of(self.denoiser)
        sites = find_sites(self.denoiser)
        chosen = edit.resolve(sites, family)
        check_guided(pipe)
        self._shrink()
        height, width = self.read([0]).shape[1:3]
        self.height, self.width = height, width
        self.coder.check_size(height, width)
        self._check_frames()
        coded = self._encoded(0)
        probes = [self._probe(coded, text) for text in (edit.source, edit.target)]
        check_read_whole(pipe, {"source": probes[0].readings, "target": probes[1].readings})
        if isinstance(edit, WordEdit):
            Exchange(edit, probes[0].readings, probes[1].readings)
            check_solver(self.solver, edit)
        if self.mask is not None and not isinstance(edit, FateZero):
            raise ConfigError(f"A mask keeps the source outside by FateZero; {type(edit).__name__} takes none.")
        check_mask(self.mask, self.clip, self.chosen)
        if self.mask is not None and probes[1].grid is not None:
            check_covers(
                (self._region(f, self.coder.frames(len(self.frames(f)))) for f in self.windows), probes[1].grid
            )
        self._cost(coded, probes[1], chosen)
        self.bytes = self.costs["bytes"]
        device = coded.latents.device
        if getattr(edit, "store", "recompute") != "recompute":
            check_room(self.bytes, offload, device, budget, folder)
        elif budget is not None:
            check_room(self.bytes, "cpu", device, budget, folder)

    def _shrink(self) -> None:
        """Bring frames that are larger than the model has places for to the largest size, where none was asked for."""
        most, (height, width) = largest(self.pipe), self.clip.read([self.chosen[0]]).shape[1:3]
        if self.size is None and most is not None and max(height, width) > most:
            scale = most / max(height, width)
            self.size = max(self.multiple, int(height * scale)), max(self.multiple, int(width * scale))

    def _check_frames(self) -> None:
        most = getattr(self.denoiser.config, "sample_frames", None)
        learned = getattr(self.denoiser.config, "use_learned_positional_embeddings", False)
        rotary = getattr(self.denoiser.config, "use_rotary_positional_embeddings", True)
        count = max(len(self.frames(first)) for first in self.windows)
        if self.coder.video and most is not None and (learned or not rotary) and self.coder.frames(count) > most:
            raise ConfigError(
                f"{type(self.pipe).__name__}'s model knows places for {most} frames, and {count} were given. Take "
                f"fewer (count, every), or cut the clip into windows of {most} or fewer (window), edited apart."
            )

    def _region(self, first: int, frames: int) -> Tensor | None:
        rows = [self.chosen[i] for i in self.frames(first)]
        region = region_of(self.mask, rows + [rows[-1]] * (frames - len(rows)), self.chosen, self.size, self.multiple)
        return None if region is None else region.to(next(self.denoiser.parameters()).device)

    # Costs -----------------------------------------------------------------------------------------------------

    def _probe(self, coded: Coded, prompt: str) -> Probed:
        call = call_of(self.pipe, prompt, coded, coded.latents, self.steps, 1.0) | self.options
        return first_call(self.pipe, self.ddim, call)

    def _cost(self, coded: Coded, probe: Probed, chosen: Any) -> None:
        """Count evaluations, rows and bytes of the run."""
        latents, size = coded.latents, next(self.denoiser.parameters()).element_size()
        shape = Shape(probe.image, probe.text, latents.numel(), latents.element_size(), size)
        self.costs = flow_costs(self.edit, chosen, shape, self.steps, self.rule)

    def costs_in_words(self) -> str:
        """Say what the run will cost."""
        return (
            f"{len(self.windows)} run(s) of {self.coder.frames(len(self.frames(0)))} frame(s), "
            f"{self.width}x{self.height}: {self.costs['tokens']} image and {self.costs['text_tokens']} text tokens\n"
            f"{in_words(self.costs)}"
        )

    # The run ---------------------------------------------------------------------------------------------------

    def _encoded(self, first: int) -> Coded:
        if first not in self._coded:
            rows = list(self.frames(first))
            rows += [rows[-1]] * (self.coder.frames(len(rows)) - len(rows))  # filled up with the last frame
            self._coded = {first: self.coder.encode(self.read(rows))}
        return self._coded[first]

    def run(
        self, first: int, call: dict[str, Any], offload: Offload, budget: Any, folder: Any, tick: Callable[[], object]
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """Edit one window; return its source frames, its edited frames and the report."""
        source, coded = self.read(list(self.frames(first))), self._encoded(first)
        edit = self._flow_edit if isinstance(self.edit, FlowEdit) else self._inverted
        made, report = edit(first, coded, call, offload, folder, tick)
        frames = np.asarray(made)
        frames = frames[-1] if frames.ndim == 5 else frames[-1:]
        edited = (np.clip(frames[: len(source)], 0, 1) * 255).round().astype(np.uint8)
        if edited.shape != source.shape:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} returned frames of {edited.shape[1:3]} where {source.shape[1:3]} went in."
            )
        return source, edited, report

    def _call(self, prompt: Any, coded: Coded, latents: Tensor, call: dict[str, Any]) -> dict[str, Any]:
        guidance, negative = call["guidance_scale"], call["negative_prompt"]
        made = call_of(self.pipe, prompt, coded, latents, self.steps, guidance, negative)
        return made | self.options | {"output_type": "np"}

    def _inverted(
        self, first: int, coded: Coded, call: dict[str, Any], offload: Offload, folder: Any, tick: Callable[[], object]
    ) -> tuple[Any, str]:
        pipe, edit = self.pipe, self.edit
        options: dict[str, Any] = {"steps": self.steps, "solver": self.solver, "noise": self.noise}
        options |= {"offload": offload, "folder": folder, "step": tick, "options": self.options}
        with invert_flow(pipe, coded, edit.source, edit=edit, **options) as inversion, torch.no_grad():
            inversion.region = self._region(first, coded.frames or 1)
            if self.check_error:
                reconstruct(pipe, inversion, coded, tick, self.options)
            control = dataclasses.replace(edit, inversion=inversion)
            start = self.coder.again(inversion.noise.to(coded.latents), coded)
            with running_on(pipe, inversion.way_back(), tick) as more, attach(pipe, control) as handle:
                made = pipe(**self._call(edit.target, coded, start, call) | more)[0]
                return made, handle.report()

    def _flow_edit(
        self, first: int, coded: Coded, call: dict[str, Any], offload: Offload, folder: Any, tick: Callable[[], object]
    ) -> tuple[Any, str]:
        pipe, edit = self.pipe, self.edit
        draw = torch.Generator("cpu").manual_seed(edit.seed + first)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=draw, dtype=torch.float32).to(like)

        skipped = self.steps - self._edited()
        plain = min(round(self.steps * edit.plain), self._edited())
        path = PathScheduler(self.ddim, Route(first=skipped, pairs=noise, average=edit.average, plain=plain))
        twice = torch.cat([coded.latents, coded.latents])
        with torch.no_grad(), running_on(pipe, path, tick) as more, attach(pipe, edit) as handle:
            made = pipe(**self._call([edit.source, edit.target], coded, twice, call) | more)[0]
            return made, handle.report()
