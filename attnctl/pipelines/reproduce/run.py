"""Run an experiment: make what is missing of its pictures, alone or as one of several processes.

Pictures are made in pipeline calls that depend on the experiment alone, and call number i belongs to process i modulo
their number. So processes need not agree on what is there already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnctl.data.specs import parse_control
from attnctl.errors import ConfigError
from attnctl.pipelines.generate import Call, sample
from attnctl.pipelines.models import Loaded
from attnctl.pipelines.reproduce.prompts import Asked, controls_of
from attnctl.pipelines.reproduce.recipes import Experiment, Variant
from attnctl.pipelines.reproduce.store import Store
from attnctl.pipelines.workers import Workers

__all__ = ["Job", "calls", "heads_of", "row_seconds"]

_CALIBRATED = 2  # prompts that a plan is made from, as the paper's


def calls(experiment: Experiment, variant: Variant, wanted: Sequence[Asked]) -> Iterator[tuple[Asked, ...]]:
    """Cut what is asked for into pipeline calls: prompts whose controls differ do not share one."""
    unit: list[Asked] = []
    before: list[str] = []
    for one in wanted:
        controls = controls_of(experiment, variant, one)
        if unit and (len(unit) == experiment.batch or controls != before):
            yield tuple(unit)
            unit = []
        unit.append(one)
        before = controls
    if unit:
        yield tuple(unit)


@dataclass
class Job:
    """One process's part in an experiment.

    Attributes:
        experiment: The experiment.
        loaded: Its pipeline.
        wanted: What is asked for.
        store: Where finished pictures lie.
        crew: The processes that share the work.
        heads: Heads that take the place of the recipe's: what SoftPAG takes.
        command: The command line, for records.
        say: Called with what happens, in words.
        tick: Called after each picture that is done or was there.
    """

    experiment: Experiment
    loaded: Loaded
    wanted: Sequence[Asked]
    store: Store
    crew: Workers
    heads: Any = None
    command: str = ""
    say: Callable[[str], object] = field(default=lambda text: None)
    tick: Callable[[], object] = field(default=lambda: None)

    def run(self) -> None:
        """Make every picture that is missing, and wait for the other processes."""
        for variant in self.experiment.variants:
            plan = self._plan(variant)
            for n, unit in enumerate(calls(self.experiment, variant, self.wanted)):
                if n % self.crew.size != self.crew.rank:
                    continue
                missing = [one for one in unit if not self.store.has(variant, one)]
                if missing:
                    self._make(variant, missing, plan)
                for _ in unit:
                    self.tick()
        self.store.log.close()
        self.crew.wait()

    def _make(self, variant: Variant, unit: Sequence[Asked], plan: str) -> None:
        controls = controls_of(self.experiment, variant, unit[0], plan, self.heads)
        gpu = _gpu_of(self.loaded.pipe)
        if gpu is not None:
            torch.cuda.reset_peak_memory_stats(gpu)
        began = time.perf_counter()
        if self.experiment.edits:
            (one,) = unit
            self._edit(variant, one, parse_control(controls[0]))
            seconds = time.perf_counter() - began
        else:
            done = sample(self.loaded, self._call(variant, unit, controls))
            seconds = (time.perf_counter() - began) / len(unit)
            made = [(one, image, i) for i, (one, image) in enumerate(zip(unit, done.images, strict=True))]
            self.store.put(variant, made, done.record)
        gigabytes = None if gpu is None else torch.cuda.max_memory_allocated(gpu) / 1e9 / len(unit)
        for one in unit:
            self.store.note(variant, one, seconds, gigabytes)

    def _call(self, variant: Variant, unit: Sequence[Asked], controls: Sequence[str]) -> Call:
        e = self.experiment
        return Call(
            prompts=tuple(one.prompt for one in unit), seeds=tuple(one.seed for one in unit), steps=e.steps,
            guidance=e.guidance if variant.guidance is None else variant.guidance, negative=e.negative,
            width=e.width, height=e.height, options=dict(e.options),
            controls=tuple(parse_control(text) for text in controls), command=self.command,
        )  # fmt: skip

    def _edit(self, variant: Variant, one: Asked, control: Any) -> None:
        from attnctl.pipelines.editing.edit import edit_video

        edit_video(
            self.loaded.pipe, one.clip, control, steps=self.experiment.steps, guidance_scale=self.experiment.guidance,
            size=self.experiment.height, out=self.store.path(variant, one), force=True, keep=False, progress=False,
            model=self.loaded.name, command=self.command,
        )  # fmt: skip

    def _plan(self, variant: Variant) -> str:
        """Calibrate a variant's block plan, or find the one that an earlier run has left; return its folder."""
        if variant.density is None or all(self.store.has(variant, one) for one in self.wanted):
            return ""
        from attnctl.pipelines.calibration.calibrate import calibrate

        folder = self.store.folder / f"plan-{variant.density:g}"
        if not (folder / "attnctl_blocks.json").exists():
            self.say(f"Calibrating {variant.name} on {_CALIBRATED} prompts")
            call = self._call(variant, self.wanted[:1], ())
            settings = {
                "num_inference_steps": call.steps, "guidance_scale": call.guidance, "height": call.height,
                "width": call.width, **call.options,
            }  # fmt: skip
            calibration = calibrate(
                self.loaded.pipe, _calibration_prompts(self.experiment), density=variant.density,
                block=self.experiment.block, call={k: v for k, v in settings.items() if v is not None},
                out=folder / "measured", model=self.loaded.name, quiet=True, seed=1_000_000,
            )  # fmt: skip
            self.crew.wait()  # no process may still look for the plan when the first one writes it
            if not self.crew.rank:
                calibration.plan.save_pretrained(folder)
        self.crew.wait()
        return folder.as_posix()


def _calibration_prompts(experiment: Experiment) -> list[str]:
    """Return prompts that no picture is measured on."""
    if experiment.toy:
        from attnctl.shapes import clip_prompts

        return list(clip_prompts(1, _CALIBRATED))
    return [
        "a ferry turns round in a harbour while gulls circle above it",
        "a boy on a swing goes higher and higher in a garden",
    ]


def row_seconds(experiment: Experiment, loaded: Loaded, wanted: Sequence[Asked]) -> float:
    """Time the denoiser: seconds per row and step, from one step of the first variant."""
    first = experiment.variants[0]
    one = wanted[0]
    call = Call(
        prompts=(one.prompt,), seeds=(one.seed,), steps=1, guidance=experiment.guidance, width=experiment.width,
        height=experiment.height, options=dict(experiment.options),
    )  # fmt: skip
    sample(loaded, call)  # pays for what is only done once
    began = time.perf_counter()
    sample(loaded, call)
    return (time.perf_counter() - began) / first.rows


def _gpu_of(pipe: Any) -> Any:
    """Return the GPU that a pipeline runs on, or None."""
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
    return device if device.type == "cuda" else None


def heads_of(path: Path | None) -> Any:
    """Read a head set that a search has left, as the pairs that a control takes as text.

    Raises:
        ConfigError: There is none.
    """
    if path is None:
        return None
    from attnctl.plans import HeadSet

    if not path.exists():
        raise ConfigError(f"There are no heads in {path}; expected the result of `attnctl hunt`, a folder or a file.")
    return HeadSet.from_pretrained(path).pairs
