"""What every control is: an immutable description that a session resolves against a model.

A control says where it acts (`sites`), when (`start`, `stop`), and what it does to an attention call: wrap the kernel
in the base pass (`wrap`), or guide with a perturbed extra pass (`Guidance.branch`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch

from attnctl.core.call import CallState, Wrapper
from attnctl.core.guidance import Branch
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.published import Default, published_in, unpublished
from attnctl.core.live import LiveControl
from attnctl.core.registry import Conflict, declared, knob, register
from attnctl.core.sites import Selector, Site, plain_selector, select
from attnctl.errors import ConfigError, check_short, number

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

    sites: Selector | None = knob(None, hint="blank: published", shown=True, last=True)
    start: float = knob(0.0, 0.0, 1.0, shown=True, last=True)
    stop: float = knob(1.0, 0.0, 1.0, shown=True, last=True)

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint", "temporal", "dual")
    """The kinds of attention that the control can act on."""
    about: ClassVar[Any] = None
    """What readers are told about the method, a `data.about.About`."""
    conflicts: ClassVar[tuple[Conflict, ...]] = ()
    """What it cannot act together with, besides what its bases and the other controls declare."""
    presets: ClassVar[tuple[Any, ...]] = ()
    """Settings for the shipped models, each a `data.about.Preset`, which the page and the demo offer."""
    published: ClassVar[Mapping[str, Default]] = {}
    """Sites of its own in some families, by the family's name; others are in the table of families."""
    skips_blocks: ClassVar[bool] = False
    """Whether it leaves attention alone and skips whole blocks, which can be done to a part of the tokens."""
    moves_latents: ClassVar[bool] = False
    """Whether it moves the latents, so that a second such control starts where the first has moved them."""
    _label: ClassVar[str] = "Control"
    """The name of its class, by which messages call it."""

    def __init_subclass__(cls, *, abstract: bool = False, **more: Any) -> None:
        """Enter the class in the registry, unless it is `abstract` (a base) or private (a name that begins with _)."""
        super().__init_subclass__(**more)
        cls._label = cls.__name__
        if not abstract and not cls.__name__.startswith("_"):
            register(cls)

    def __post_init__(self) -> None:
        for name, bounds in declared(type(self)).items():
            value, what = getattr(self, name), f"{self._label}: {name}"
            if isinstance(value, range) and name != "sites":
                check_short(value, what)
            if bounds is not None:
                object.__setattr__(self, name, bounds.checked(value, what))
        object.__setattr__(self, "sites", plain_selector(self.sites))
        if self.start > self.stop:
            raise ConfigError(
                f"{self._label}: start={self.start} lies after stop={self.stop}. Both are fractions of the run: "
                "step i of n is controlled when start <= i/n < stop."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be a processor: `set_attn_processor` takes whatever it is given, and calls it in a run."""
        raise ConfigError(
            f"{self.describe()} is a control, not an attention processor. Use attnctl.control(pipe, {self._label}()) "
            f"or model.set_attn_processor(attnctl.attn_processors(model, {self._label}()))."
        )

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
        """Choose the published default.

        Raises:
            SiteError: No publication names any for the family.
        """
        default = published_in(type(self), family, sites)
        if default is None:
            raise unpublished(self._label, self.kinds, family.name, sites)
        return default.of(sites, self.kinds, self._label)

    def default_source(self, family: Family) -> str | None:
        """Name the publication that the default sites come from."""
        default = published_in(type(self), family)
        return None if default is None else default.source

    def in_window(self, state: CallState) -> bool:
        """Tell whether the current step lies in [start, stop)."""
        return self.start <= state.progress < self.stop

    def acts(self, state: CallState) -> bool:
        """Tell whether the control does something at the current step."""
        return self.in_window(state)

    def is_off(self) -> bool:
        """Tell whether the control is switched off by a weight of zero."""
        return False

    def in_window_at(self, step: int, steps: int | None) -> bool:
        """Tell whether a step of the run lies in [start, stop)."""
        return self.start <= (step / steps if steps else 0.0) < self.stop

    def needs_steps(self) -> bool:
        """Tell whether this control must know the step of the run."""
        return self.start > 0.0 or self.stop < 1.0

    def needs_prompt(self) -> bool:
        """Tell whether `CallState.prompts` must be filled."""
        return False

    def alike_anywhere(self, site: Site) -> bool:
        """Tell whether it does the same to all tokens and heads of a site, in whatever order the tokens are."""
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
        values = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        shown = ", ".join(f"{f.name}={value!r}" for f, value in values if value != f.default)
        return f"{self._label}({shown})"


@dataclass(frozen=True, kw_only=True)
class Guidance(Control, abstract=True):
    """Base of controls that guide away from a perturbed prediction: pred += scale * (c - p).

    Attributes:
        scale: Guidance weight w; 0 switches the control off.
        adaptive: How fast the weight falls along the run; 0 keeps it constant.
        adaptive_form: "knob": w (1 - a^4 (1000 - t)) with a in [0, 1] (the form of ComfyUI's PAG node); "timestep":
            w - a (1000 - t) with a in weight units per timestep (diffusers' `pag_adaptive_scale`). t runs from 1000
            (noise) to 0; the weight stops at 0.
        every: Compute the perturbed pass on every m-th step and reuse its c - p on the steps between.
        combine: "add" gives u + d, c + d; "rescale_safe" gives c, u - d / (s - 1), exact under guidance rescale;
            "auto" takes the second if the pipeline rescales.
    """

    scale: float = knob(3.0, -math.inf, span=(0.0, 10.0, 0.1), shown=True)
    adaptive: float = knob(0.0, kind="free", values="0 to 1; with 'timestep' 0 or more")
    adaptive_form: AdaptiveForm = knob("knob", options=AdaptiveForm)
    every: int = knob(1, 1, unit="steps", span=(1, 10, 1), shown=True, last=True)
    combine: Combine = knob("auto", options=Combine)

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1.0 if self.adaptive_form == "knob" else math.inf
        object.__setattr__(self, "adaptive", number(self.adaptive, f"{self._label}: adaptive", 0.0, most))

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

    def acts(self, state: CallState) -> bool:
        return self.weight(state) != 0

    def is_off(self) -> bool:
        return self.scale == 0

    def needs_steps(self) -> bool:
        return super().needs_steps() or self.adaptive > 0 or self.every > 1

    def branch(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> Branch:
        """Describe the perturbed pass."""
        raise TypeError(f"{self._label} defines no branch")
