"""What attnctl knows about one denoiser architecture: one row of the table of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from attnctl.core.hosts.published import Default
from attnctl.core.sites import Grid

__all__ = ["Bound", "Family", "Tokens"]

Layout: TypeAlias = Literal["cond", "cond_first", "extra"]

Bound: TypeAlias = Mapping[str, Any]
"""Arguments of one denoiser call by parameter name."""


@dataclass(frozen=True)
class Tokens:
    """How many tokens of what kind a denoiser call brings to attention, beside its text.

    In a sequence they lie in the order `before`, `image`, `after`; the text lies in front of all of them or behind.

    Attributes:
        image: Tokens of the image or video that is denoised.
        before: Tokens of something else in front of it: history, sound, a token for the time.
        after: Tokens of something else behind it: reference images, padding.
        text: Text tokens, where the text is not all of the rest; it then touches what is counted above. 0 where it lies
            in several parts.
        led: Tokens of something else (an image prompt, keys of references) in front of the text in its own sequence.
        side: Where the text lies in this call, in a family whose calls differ in that; None for the family's place.
        last: Tokens of something else at the end of a joint sequence, which the image's own sequence lacks.
    """

    image: int
    before: int = 0
    after: int = 0
    text: int | None = None
    led: int = 0
    side: Literal["first", "last"] | None = None
    last: int = 0

    @property
    def stream(self) -> int:
        """Count all tokens but the text's."""
        return self.before + self.image + self.after


@dataclass(frozen=True, kw_only=True)
class Family:
    """What attnctl knows about one denoiser architecture.

    Attributes:
        name: Short name used in tables and reports.
        classes: Class names of the denoisers; compared by name so that no model is imported.
        kinds: Pairs (pattern, kind): the first pattern found in a site's name decides its kind. An empty kind means
            that the module is no site.
        kind_at: Gives the kind of a site where its name alone does not tell it, else None; no function where
            all names do.
        text: Where text tokens lie in a joint sequence.
        grid: Gives frames, rows and columns of the token grid from the arguments of a denoiser call.
        tokens: Counts the tokens of a call, or gives None where rows differ in them; no function means that the image's
            are the product of the grid, and the text's are the rest.
        calls: Gives the kind of each attention that one module computes, in their order, from the site's name and its
            module; () where it computes one; no function where all compute one.
        first: Pattern of the sites that run before all others although they are registered later.
        unet: Whether the sites lie in down, mid and up stages of halving resolution.
        all_frames: Whether its self or joint attention runs over the tokens of all frames, frame by frame.
        frames_first: Whether its latents have frames before channels.
        cond_first: Whether its pipelines batch the prompt before the negative prompt.
        from_prompt: Whether its pipelines count guidance from the prompt, c + s (c - u), and not from u + s (c - u).
        layout: Gives the layout of a call's rows where its arguments show it: "cond" (no negative rows), "cond_first",
            or "extra" for a call that fills a cache of reference images and predicts nothing; no function where no
            argument does.
        shared: Arguments of its calls that all rows share, whatever their first axis.
        row_axis: The axis of the rows in arguments where that is not the first.
        cut: Gives arguments of some rows of a call, where they hold rows in a way of their own.
        published: Published sites by the kind of control that acts there, named by its class: "Guidance" for the
            perturbation of attention, "LatentGuidance" for attention to words. A control that has sites of its own in
            some families names them in its own file (`Control.published`).
        refusal: Why no control can act on it, or None.
        note: A limit that `report()` prints.
    """

    name: str
    classes: tuple[str, ...]
    kinds: tuple[tuple[str, str], ...]
    kind_at: Callable[[torch.nn.Module, str], str | None] | None = None
    text: Literal["first", "last"] | None = None
    grid: Callable[[torch.nn.Module, Bound], Grid | None] = lambda model, bound: None
    tokens: Callable[[torch.nn.Module, Bound], Tokens | None] | None = None
    calls: Callable[[str, torch.nn.Module], tuple[str, ...]] | None = None
    first: str | None = None
    unet: bool = False
    all_frames: bool = False
    frames_first: bool = False
    cond_first: bool = False
    from_prompt: bool = False
    layout: Callable[[torch.nn.Module, Bound], Layout | None] | None = None
    shared: frozenset[str] = frozenset()
    row_axis: Mapping[str, int] = field(default_factory=dict)
    cut: Callable[[Bound, slice], dict[str, Any]] = lambda bound, rows: {}
    published: Mapping[str, Default] = field(default_factory=dict)
    refusal: str | None = None
    note: str | None = None
