"""What a `LatentGuidance` is given and what a method of it defines: its fields, their checks, its loss and its steps.

They stand apart from `LatentGuidance`, which makes an engine, so that the engine can read them without a circle of
imports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnctl.core.call import CallState
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.registry import knob
from attnctl.core.sites import Site
from attnctl.errors import ConfigError, SiteError, unboxed
from attnctl.processors.capture.refine import partners
from attnctl.processors.latent.losses import MapNorm, normalise, smooth, token_softmax

__all__ = ["GradTransform", "LatentFields", "Schedule", "Update", "checked_concepts", "step_sizes", "transformed"]

GradTransform = Literal["none", "l2", "sign"]
Schedule = Literal["sqrt", "constant"]
Update = Literal["latents", "velocity"]


def step_sizes(size: float, step: int, steps: int, schedule: Schedule = "sqrt") -> float:
    """Compute alpha of step i of n: size * sqrt(linspace(1, 0.5, n)[i]), Attend-and-Excite's schedule, or constant."""
    if schedule == "constant" or steps == 1:
        return size
    return size * math.sqrt(1.0 - 0.5 * step / (steps - 1))


def transformed(grad: Tensor, how: GradTransform) -> Tensor:
    """Scale a gradient: as it is, to length 1 a sample ("l2"), or to its signs; [B, ...] -> the same."""
    if how == "sign":
        return grad.sign()
    if how == "l2":
        length = grad.flatten(1).norm(dim=1).reshape(-1, *[1] * (grad.ndim - 1))
        return grad / torch.where(length > 0, length, torch.ones_like(length))
    return grad


@dataclass(frozen=True, kw_only=True)
class LatentFields(Control, abstract=True):
    """Hold and check the fields of a `LatentGuidance`, whose docstring describes them, and what a method defines."""

    concepts: tuple[Any, ...] = knob((), hint="blank: the nouns", shown=True)
    prompt: str | tuple[str, ...] | None = None
    step_size: float = knob(20.0, 0.0, span=(0.0, 40.0, 0.1), shown=True)
    schedule: Schedule = knob("sqrt", options=Schedule)
    grad_transform: GradTransform = knob("none", options=GradTransform, shown=True)
    update: Update = knob("latents", options=Update)
    iterations: int = knob(1, 1, unit="gradient steps")
    map_norm: MapNorm = knob("max", options=MapNorm)
    smoothing: float = knob(0.5, 0.0)
    early_exit: bool = True
    checkpoint: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")
    moves_latents: ClassVar[bool] = True
    needs_self_attention: ClassVar[bool] = False
    """Whether `loss` finds in memory["self_attention"] how image tokens attend to each other, [B, h w, h w]: each row
    sums to 1, the mean over heads of the layers that are read (of the self-attention before it in each block with
    cross-attention, of the image's part in joint attention), part of the graph. An N x N map of each head is held
    meanwhile: for small grids, all of one size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update == "velocity" and (self.iterations > 1 or self.max_refine > 0):
            raise ConfigError(
                f'{self._label}: update="velocity" leaves the latents where they are, so nothing can be repeated: set '
                "iterations=1" + (" and refine_steps=0." if self.max_refine else ".")
            )
        object.__setattr__(self, "concepts", checked_concepts(self._label, self.concepts))
        if isinstance(self.prompt, list):
            object.__setattr__(self, "prompt", tuple(self.prompt))

    @property
    def nested(self) -> bool:
        """Tell whether each prompt has concepts of its own."""
        return isinstance(self.concepts[0], tuple)

    @property
    def count(self) -> int:
        """Return the number of concepts of one prompt."""
        return len(self.concepts[0]) if self.nested else len(self.concepts)

    def needs_steps(self) -> bool:
        return True

    def needs_prompt(self) -> bool:
        return self.prompt is None

    def acts(self, state: CallState) -> bool:
        """Tell whether the latents are to be moved before the current step."""
        return self.step_size > 0 and self.in_window(state)

    def is_off(self) -> bool:
        return self.step_size == 0

    def alpha(self, state: CallState) -> float:
        """Compute the step size of the current step."""
        return step_sizes(self.step_size, state.step, state.steps or 1, self.schedule)

    def loss(self, maps: Tensor, memory: dict[str, Any]) -> Tensor:
        """Compute the loss of each sample.

        Args:
            maps: [B, C, h, w] concept maps, normalised and blurred, part of the graph. A video has one sample a frame.
            memory: What `remember` kept in this run; empty at its first step.

        Returns:
            [B]. It must depend on the maps: for a constant, return `maps.sum((1, 2, 3)) * 0`.
        """
        raise NotImplementedError(f"{self._label} defines no loss")

    def remember(self, maps: Tensor, memory: dict[str, Any]) -> None:
        """Keep something of this step's maps (before the first update, detached) for the next step."""

    def level(self, state: CallState) -> float | None:
        """Return the loss to reach by repeated updates before the current step, or None for no refinement."""
        return None

    @property
    def max_refine(self) -> int:
        """Return the most updates of one refinement."""
        return 0

    def concept_maps(self, attention: Tensor, weights: Tensor) -> Tensor:
        """Normalise, blur and average attention to text into concept maps.

        Args:
            attention: [B, C, h, w], a probability map for each concept; with `map_norm="ae"` [B, T, h, w], one for each
                text token.
            weights: [B, T, C], the share of each token in each concept.

        Returns:
            [B, C, h, w] in float32 (float64 stays).
        """
        if self.map_norm == "ae":
            attention = torch.einsum("bthw,btc->bchw", token_softmax(attention), weights.to(attention))
        maps = smooth(attention, self.smoothing) if self.smoothing else attention
        return normalise(maps, self.map_norm)

    def resolve(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        chosen = super().resolve(sites, family)
        if not self.needs_self_attention:
            return chosen
        names = {s.name for s in (*chosen, *partners(chosen, sites, self._label).values())}
        return tuple(s for s in sites if s.name in names)

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        if not any(s.kind in LatentFields.kinds for s in sites):
            kinds = ", ".join(sorted({s.kind for s in sites}))
            raise SiteError(
                f"{self._label} reads how image tokens attend to words, but this {family.name} model has no cross- or "
                f"joint attention (only {kinds})."
            )
        return super().default_sites(sites, family)


def checked_concepts(label: str, concepts: Any) -> tuple[Any, ...]:
    """Check words or places of one prompt, or a tuple of them for each prompt of a batch.

    Raises: ConfigError for none, for what is neither, and for a word that is given twice.
    """
    if isinstance(concepts, (str, int)) or not isinstance(concepts, (tuple, list)) or not concepts:
        raise ConfigError(f"{label}: concepts={concepts!r}: give words of the prompt, such as concepts=('cat', 'dog').")
    if all(isinstance(part, (tuple, list)) for part in concepts):
        parts = tuple(checked_concepts(label, part) for part in concepts)
        if any(isinstance(word, tuple) for part in parts for word in part) or len({len(part) for part in parts}) > 1:
            raise ConfigError(f"{label}: concepts={concepts!r}: give every prompt of the batch equally many words.")
        return parts
    concepts = tuple(map(unboxed, concepts))
    for word in concepts:
        if isinstance(word, bool) or not isinstance(word, (str, int)):
            raise ConfigError(f"{label}: {word!r} is neither a word of the prompt nor the place of a token.")
        if list(concepts).count(word) > 1:
            raise ConfigError(f"{label}: {word!r} is given twice. Name each concept once ('cat#2' is a second cat).")
    return tuple(concepts)
