"""What a `Capture` is asked to record: its fields and their checks.

They stand apart from `Capture`, which makes recorders, so that recorders can read them without a circle of imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from attnctl.core.control import Control
from attnctl.core.registry import knob
from attnctl.errors import ConfigError, unboxed, whole

__all__ = ["CaptureFields"]

Axis = Literal["steps", "heads"]
Half = Literal["cond", "uncond"]
Reduction = Literal["mean", "sum", "max", "none", "ema"]
Store = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class CaptureFields(Control, abstract=True):
    """Hold and check the fields of a `Capture`, whose docstring describes them."""

    words: Sequence[Any] | None = None
    points: Sequence[tuple[float, ...]] | None = None
    concepts: Sequence[str] | None = knob(None, hint="blank: the nouns", shown=True)
    reduce: Reduction = knob("mean", options=Reduction)
    decay: float = knob(0.9, 0.0, below=1.0)
    keep: Sequence[Axis] = ()
    refine: int = knob(0, 0, unit="times")
    heads: Sequence[int] | None = None
    rows: Half = knob("cond", options=Half)
    reference: int | None = None
    prompt: str | Sequence[str] | None = None
    budget: int = knob(2 << 30, 1, unit="bytes")
    device: str | None = None
    store: Store = knob("float32", options=Store)

    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")

    def __post_init__(self) -> None:
        super().__post_init__()
        keep = tuple(self.keep) if isinstance(self.keep, (tuple, list)) else (self.keep,)
        for axis in keep:
            if axis not in get_args(Axis):
                raise ConfigError(
                    f"Capture: keep={axis!r} is unknown. Choose from steps, heads (layers are kept apart always)."
                )
        object.__setattr__(self, "keep", get_args(Axis) if self.reduce == "none" else keep)
        if self.reduce == "ema" and "steps" in self.keep:
            raise ConfigError(
                'Capture: reduce="ema" runs over the steps, which keep=("steps",) keeps apart: choose one.'
            )
        if self.store == "float16" and "steps" not in self.keep:
            raise ConfigError('Capture: store="float16" is for steps that are kept apart: add keep=("steps",).')
        if self.refine and self.points is not None:
            raise ConfigError("Capture: refine is for word maps; maps of points are self-attention themselves.")
        self._check_heads()
        self._check_words()
        self._check_points()
        self._check_concepts()
        self._check_reference()
        self._check_device()

    def _check_heads(self) -> None:
        if self.heads is None:
            return
        heads = tuple(self.heads) if isinstance(self.heads, Sequence) and not isinstance(self.heads, str) else ()
        heads = tuple(map(unboxed, heads))
        whole = all(isinstance(h, int) and not isinstance(h, bool) and h >= 0 for h in heads)
        if not heads or not whole or len(set(heads)) < len(heads):
            raise ConfigError(f"Capture: heads={self.heads!r}: give different head numbers, such as (0, 3), or None.")
        object.__setattr__(self, "heads", heads)

    def _check_words(self) -> None:
        if self.words is None:
            return
        if isinstance(self.words, str) or not isinstance(self.words, Sequence) or not self.words:
            raise ConfigError(
                f"Capture: words={self.words!r}: give a tuple of words, such as ('cat', 'dog'), or None for all."
            )
        nested = [not isinstance(w, (str, int)) and isinstance(w, Sequence) for w in self.words]
        if any(nested) and not (all(nested) and all(self.words)):
            raise ConfigError(
                f"Capture: words={self.words!r} mixes words and lists of words, or holds an empty list: give words, or "
                "one list of words a prompt."
            )
        words = tuple(tuple(map(unboxed, w)) if any(nested) else unboxed(w) for w in self.words)
        for word in [w for part in words for w in part] if any(nested) else words:
            if isinstance(word, bool) or not isinstance(word, (str, int)):
                raise ConfigError(f"Capture: {word!r} in words is neither a word nor the place of a text token.")
        object.__setattr__(self, "words", words)

    def _check_points(self) -> None:
        if self.points is None:
            return
        if self.words is not None:
            raise ConfigError("Capture: words and points were both given: use one Capture for each.")
        form = "points as shares of width and height, such as ((0.5, 0.25), (0.9, 0.5)), or with a frame (0.5, 0.25, 3)"
        many = self.points if isinstance(self.points, (tuple, list)) else ()
        points = tuple(tuple(map(unboxed, p)) if isinstance(p, (tuple, list)) else () for p in many)
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for p in points for v in p)
        if not points or not numbers or {len(p) for p in points} not in ({2}, {3}):
            raise ConfigError(f"Capture: points={self.points!r}: give {form}.")
        for x, y, *frame in points:
            if not (0 <= x <= 1 and 0 <= y <= 1) or any(f < 0 or f != int(f) for f in frame):
                raise ConfigError(f"Capture: the point {(x, y, *frame)} lies outside the image: give {form}.")
        if len(set(points)) < len(points):
            raise ConfigError(f"Capture: points={self.points!r} names a point twice.")
        object.__setattr__(self, "points", points)

    def _check_concepts(self) -> None:
        if self.concepts is None:
            return
        if self.words is not None or self.points is not None:
            raise ConfigError("Capture: concepts were given beside words or points: use one Capture for each.")
        many = self.concepts if isinstance(self.concepts, (tuple, list)) else ()
        if len(many) < 2 or not all(isinstance(c, str) and c.strip() for c in many):
            raise ConfigError(
                f"Capture: concepts={self.concepts!r}: give two or more words or phrases, such as ('cat', 'sky'): each "
                "map is a share of them all, which of one alone is 1 everywhere."
            )
        if len(set(many)) < len(many):
            raise ConfigError(f"Capture: concepts={self.concepts!r} names a concept twice.")
        if self.refine or "heads" in self.keep:
            raise ConfigError("Capture: maps of concepts join all heads: leave out refine, and heads of keep=.")
        object.__setattr__(self, "concepts", tuple(many))

    def _check_reference(self) -> None:
        if self.reference is None:
            return
        object.__setattr__(self, "reference", whole(self.reference, "Capture: reference", 0))
        if self.points is not None or self.concepts is not None or self.refine:
            raise ConfigError(
                "Capture: reference reads where words lie in a reference: leave out points, concepts and refine."
            )

    def _check_device(self) -> None:
        if self.device is None:
            return
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError, ValueError):
            raise ConfigError(
                f"Capture: device={self.device!r:.60} is unknown: give one such as 'cpu' or None."
            ) from None
