"""FlowEdit: edit a picture or a clip with a text prompt, without inverting it and without its attention.

"FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models", arXiv 2412.08629, algorithm 1. At each
noise level t the source x_0 gets fresh noise, z_s = (1 - t) x_0 + t eps, the edit e the same, z_e = e + z_s - x_0, and

    e += (t' - t) (v(z_e, target) - v(z_s, source))

The pipeline runs on both prompts at once. It applies its own guidance with the target's scale; the source's rows are
changed so that theirs comes to the source's scale. The walk itself is `attnctl.kernels.flow.flow_edit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.outputs import main_output, with_main_output
from attnctl.core.hosts.paths import PathScheduler
from attnctl.core.hosts.sums import three_rows
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.registry import Conflict, knob
from attnctl.core.sites import Site
from attnctl.data.about import About
from attnctl.errors import ConfigError

__all__ = ["FlowEdit"]


@dataclass(frozen=True, kw_only=True)
class FlowEdit(Control):
    """Edit by the difference of two velocities (arXiv 2412.08629).

    `attnctl.pipelines.edit_video` does the whole job.

    Attributes:
        source: The prompt that describes the source.
        target: The prompt that describes the result.
        source_scale: Guidance of the source's velocity.
        target_scale: Guidance of the target's velocity; the pipeline must be called with this scale.
        strength: Share of the steps that edit, counted from the clean end (n_max of n); the rest keeps the source.
        plain: Share of the steps, at the clean end, that only denoise the edit (n_min of n).
        average: Noises to average over per step (n_avg).
        seed: Seed of the noises.

    Example:
        >>> FlowEdit(source="a red car", target="a blue car").describe()
        "FlowEdit(source='a red car', target='a blue car')"
    """

    source: str
    target: str
    source_scale: float = knob(3.5, 0.0)
    target_scale: float = knob(13.5, 0.0)
    strength: float = knob(0.66, 0.0, 1.0)
    plain: float = knob(0.0, 0.0, 1.0)
    average: int = knob(1, 1)
    seed: int = knob(0, 0)

    kinds: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[About] = About(
        does="edits a picture or a clip with a prompt, without inverting it",
        page="flow_edit",
        goal="edit a video or an image with a prompt",
        paper="arXiv 2412.08629",
        cite=(
            "Kulikov et al., *FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models*, "
            "arXiv 2412.08629",
        ),
        group="Editing",
        offered=False,
        sites="no attention: it acts on the prediction",
        needs=("the prompt", "the source's latents"),
    )
    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(("WordEdit", "Inject", "FlowEdit"), "model", "each edits along a path of its own"),
        Conflict("ShareAttention", "model", "the rows are a source and its edit, whose difference is what counts"),
        Conflict("Combining", "model", "source and target are guided by scales of their own here"),
        Conflict("LatentGuidance", "model", "moved latents would count as a part of the edit"),
    )

    def needs_prompt(self) -> bool:
        return True

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if self.sites is not None:
            raise ConfigError(f"FlowEdit acts on the prediction, not on attention: sites={self.sites!r} must be None.")
        return ()

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        return ()

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return _Pairs(self, denoiser, pipe)


class _Pairs(LiveControl):
    """FlowEdit at work: rows of the source and of the edit in one call."""

    def __init__(self, control: FlowEdit, denoiser: torch.nn.Module, pipe: Any) -> None:
        self.control, self.pipe = control, pipe
        scheduler = getattr(pipe, "scheduler", None)
        if not isinstance(scheduler, PathScheduler) or scheduler.route.pairs is None:
            raise ConfigError(
                f"FlowEdit leads pairs of latents along a path of its own, and the pipeline runs on "
                f"{type(scheduler).__name__}. Call attnctl.pipelines.edit_video, which sets it."
            )
        self.embedded = bool(getattr(getattr(denoiser, "config", None), "guidance_embeds", False))
        self.begin_run()

    def begin_run(self) -> None:
        self.point: Tensor | None = None
        self.prompt_half: Tensor | None = None
        self.passes: LiveDenoiser | None = None

    def before_call(self, passes: LiveDenoiser) -> dict[str, Any] | None:
        self.passes, state = passes, passes.state
        if state.rows.role == "extra":
            return None
        if state.rows.role == "thirds":
            raise three_rows(self.control.describe(), passes.pipe)
        first = state.step == 0
        if first and self.point is None:
            self._check(passes)
            self.point = self.pipe.scheduler.first(passes.latents.of(state))
            passes.latents.move(self.point)
        changed = passes.latents.written(state) if first else None
        guidance = state.bound.get("guidance")
        if self.embedded and isinstance(guidance, Tensor) and guidance.ndim == 1 and guidance.shape[0] > 1:
            share = self.control.source_scale / max(self.control.target_scale, 1e-6)
            changed = dict(state.bound) if changed is None else changed
            changed["guidance"] = torch.cat([guidance[:1] * share, guidance[1:]])
        return changed

    def stepping(self, latents: Tensor) -> Tensor:
        point = self.point
        if point is not None and self.passes is not None and self.passes.state.step == 1:
            return point  # the step that ends is the first: the scheduler has begun the walk already
        return latents

    def _check(self, passes: LiveDenoiser) -> None:
        control, state = self.control, passes.state
        prompts = None if state.prompts is None else state.prompts.prompts
        if state.rows.prompts != 2 or prompts not in (None, (control.source, control.target)):
            given = f"{state.rows.prompts} prompt rows" if prompts is None else f"the prompts {list(prompts)}"
            raise ConfigError(
                f"FlowEdit runs source and edit together: call the pipeline with prompt=[{control.source!r}, "
                f"{control.target!r}] and the source's latents twice; the run has {given}."
            )

    def after_call(self, output: Any) -> Any:
        """Bring the guidance of the source's row from the target's scale to its own."""
        assert self.passes is not None
        rows, pred = self.passes.state.rows, main_output(output)
        extra = 1.0 if (family := self.passes.state.family) is not None and family.from_prompt else 0.0
        scale, given = self.control.source_scale + extra, self.control.target_scale + extra
        if self.embedded or not isinstance(pred, Tensor):
            return None
        if rows.role == "both" and rows.uncond is not None:
            source, u = rows.cond.start, pred[rows.uncond.start]
            c = u + scale / given * (pred[source] - u)  # u + given (c' - u) = u + scale (c - u)
            return with_main_output(output, torch.cat([pred[:source], c[None], pred[source + 1 :]]))
        if rows.role == "all":
            self.prompt_half = pred[:1]
        if rows.role == "uncond" and self.prompt_half is not None:
            u = (pred[:1] * (1 - scale) + (scale - given) * self.prompt_half) / (1 - given)
            return with_main_output(output, torch.cat([u, pred[1:]]))
        return None
