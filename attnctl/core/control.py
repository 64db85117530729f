"""What every control is: an immutable description that a session resolves against a model.

A control says where it acts (`sites`), when (`start`, `stop`), and what it does to an attention call: wrap the kernel
in the base pass (`wrap`), or guide with a perturbed extra pass (`Guidance.branch`).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from attnctl.core.call import CallState, Wrapper
from attnctl.core.guidance import Branch
from attnctl.core.hosts.families import Family
from attnctl.core.live import LiveControl
from attnctl.core.sites import Selector, Site, select
from attnctl.errors import ConfigError, SiteError

__all__ = ["AdaptiveForm", "Combine", "Control", "Guidance"]

Combine = Literal["auto", "add", "rescale_safe"]
AdaptiveForm = Literal["knob", "timestep"]


@dataclass(frozen=True, kw_only=True)
class Control:
    """Base of all controls.

    Attributes:
        sites: Selector of attention sites; None for the method's published default in the model's family.
        start: Fraction of the run at which the control begins, in [0, 1].
        stop: Fraction at which it ends: step i of n is controlled when start <= i/n < stop.
    """

    sites: Selector | None = None
    start: float = 0.0
    stop: float = 1.0

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "temporal", "dual")

    def __post_init__(self) -> None:
        self._check_number("start", 0.0, 1.0)
        self._check_number("stop", 0.0, 1.0)
        if self.start > self.stop:
            raise ConfigError(
                f"{self._label}: start={self.start} lies after stop={self.stop}. Both are fractions of the run: "
                "step i of n is controlled when start <= i/n < stop."
            )

    @property
    def _label(self) -> str:
        return type(self).__name__

    def _check_number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            top = "" if math.isinf(high) else f" to {high:g}"
            bounds = "a finite number" if math.isinf(low) else f"a number from {low:g}{top}"
            raise ConfigError(f"{self._label}: {name}={value!r} is out of range: give {bounds}.")
        if abs(value) > sys.float_info.max:  # whole numbers, too, can be more than any float
            raise ConfigError(f"{self._label}: {name}={value!r:.40} is infinite: give a finite number.")

    def _check_choice(self, name: str, literal: Any) -> None:
        value, options = getattr(self, name), get_args(literal)
        if value not in options:
            raise ConfigError(f"{self._label}: {name}={value!r} is unknown. Choose one of {', '.join(options)}.")

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        """Choose this control's sites in a model.

        Raises:
            SiteError: The selector matches nothing that this control can act on, or the family has no published
                default and `sites` is None.
        """
        if self.sites is not None:
            return select(sites, self.sites, kinds=self.kinds, what=self._label)
        return self.default_sites(sites, family)

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        """Choose the published default."""
        raise SiteError(f"{self._label} has no default sites: pass `sites=`.")

    def default_source(self, family: Family) -> str | None:
        """Name the publication that the default sites come from."""
        return None

    def in_window(self, state: CallState) -> bool:
        """Tell whether the current step lies in [start, stop)."""
        return self.start <= state.progress < self.stop

    def in_window_at(self, step: int, steps: int | None) -> bool:
        """Tell whether a step of the run lies in [start, stop)."""
        return self.start <= (step / steps if steps else 0.0) < self.stop

    def needs_steps(self) -> bool:
        """Tell whether this control must know the step of the run."""
        return self.start > 0.0 or self.stop < 1.0

    def needs_prompt(self) -> bool:
        """Tell whether `CallState.prompts` must be filled."""
        return False

    def wants_block_input(self) -> bool:
        """Tell whether `AttnCall.block_call` and `block_input` must be filled at this control's sites."""
        return False

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper | None:
        """Return what wraps the kernel at this control's sites in the base pass, or None."""
        return None

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl | None:
        """Return what this control keeps while it is attached to a denoiser, or None where `wrapper` says it all."""
        return None

    def describe(self) -> str:
        """Name the control with the fields that differ from their defaults."""
        shown = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"{self._label}({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True)
class Guidance(Control):
    """Base of controls that guide away from a perturbed prediction: pred += scale * (c - p).

    Attributes:
        scale: Guidance weight w; 0 switches the control off.
        adaptive: How fast the weight falls along the run; 0 keeps it constant.
        adaptive_form: "knob": w (1 - a^4 (1000 - t)) with a in [0, 1] (the form of ComfyUI's PAG node); "timestep":
            w - a (1000 - t) with a in weight units a timestep (diffusers' `pag_adaptive_scale`). t runs from 1000
            (noise) to 0; the weight stops at 0.
        every: Compute the perturbed pass on every m-th step and reuse its c - p on the steps between.
        combine: "add" gives u + d, c + d; "rescale_safe" gives c, u - d / (s - 1), exact under guidance rescale;
            "auto" takes the second where the pipeline rescales.
    """

    scale: float = 3.0
    adaptive: float = 0.0
    adaptive_form: AdaptiveForm = "knob"
    every: int = 1
    combine: Combine = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("scale", -math.inf, math.inf)
        self._check_choice("adaptive_form", AdaptiveForm)
        self._check_number("adaptive", 0.0, 1.0 if self.adaptive_form == "knob" else math.inf)
        self._check_choice("combine", Combine)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigError(f"{self._label}: every={self.every!r} must be a whole number of steps, 1 or more.")

    def weight(self, state: CallState) -> float:
        """Compute the guidance weight of the current step; 0.0 means that no pass is needed."""
        if self.scale == 0 or not self.in_window(state):
            return 0.0
        if self.adaptive == 0:
            return float(self.scale)
        if state.timestep is None:
            raise ConfigError(
                f"{self._label}: adaptive={self.adaptive} needs the scheduler's timestep, which a bare model call does "
                "not tell. Call handle.set_step(i, n, timestep=t) before each call, or pass a pipeline to control()."
            )
        fall = 1000.0 - state.timestep
        drop = self.scale * self.adaptive**4 * fall if self.adaptive_form == "knob" else self.adaptive * fall
        return max(float(self.scale) - drop, 0.0)

    def needs_steps(self) -> bool:
        return super().needs_steps() or self.adaptive > 0 or self.every > 1

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        """Describe the perturbed pass."""
        raise TypeError(f"{self._label} defines no branch")

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        default = family.perturb
        if default is None:
            candidates = [s.name for s in sites if s.kind in self.kinds]
            shown = ", ".join(candidates[:3] + (["...", candidates[-1]] if len(candidates) > 3 else []))
            raise SiteError(
                f"{self._label}: no publication names layers to perturb in {family.name} models, so `sites` must be "
                f"given. Candidates: {shown}. `attnctl.find_sites(pipe)` lists them all."
            )
        if default.sites is not None:
            return select(sites, default.sites, kinds=("self",), what=self._label)
        blocks = [s for s in sites if s.kind in ("self", "joint")]
        assert default.depth is not None
        # Exact for the published size (13 of 24), proportional for its siblings.
        index = min(int(default.depth * len(blocks) + 1e-9), len(blocks) - 1)
        return (blocks[index],)

    def default_source(self, family: Family) -> str | None:
        return family.perturb.source if family.perturb else None
