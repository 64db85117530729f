"""Which rows of a denoiser call carry the prompt.

Pipelines batch the negative prompt before the prompt ([uncond, cond]), call the denoiser once for each (cond first in
all that diffusers ships), or use no negative prompt. Nothing announces which; attnctl reads it off the first call (the
two halves of a batched call hold equal latents) and checks it when the scheduler receives the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch

from attnctl.core.hosts.arguments import Rows, main_input, row_count
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.listing import unwrapped
from attnctl.core.hosts.pipelines import uses_guidance
from attnctl.errors import UnsupportedModelError

__all__ = ["Layout", "RowLayout"]

Layout = Literal["auto", "cond", "uncond_first", "sequential"]


class RowLayout:
    """Tells the rows of each call of one run.

    Args:
        pipe: The pipeline, or None for a bare model, all of whose rows then count as prompt rows.
        layout: "auto" to find out; "cond" (every row carries the prompt), "uncond_first" (batched halves) or
            "sequential" (prompt call, then negative call) to be told.
    """

    def __init__(self, pipe: Any, layout: Layout) -> None:
        self.pipe, self.layout = pipe, layout
        self.calls = 0
        self._warned = self._shown = False
        """Whether the user was warned; whether the arguments of the call show its rows."""
        self._scaled: torch.Tensor | None = None
        self._first: Any = None
        self._read: Rows | None = None
        self._known: dict[tuple[int, bool | None], bool] = {}

    def new_run(self) -> None:
        """Forget what was read of the last run."""
        self.calls, self._scaled, self._first, self._read = 0, None, None, None
        self._known = {}

    def scaled(self, sample: torch.Tensor) -> None:
        """Note the latents that a pipeline scales, before it adds masks or image latents to them.

        A ControlNet in guess mode has the prompt's rows scaled once more, by themselves; the denoiser's are more.
        """
        if self._scaled is None or sample.shape[0] >= self._scaled.shape[0]:
            self._scaled = sample

    def read(
        self, denoiser: torch.nn.Module, family: Family, bound: Mapping[str, Any], samples: int | None = None
    ) -> Rows:
        """Tell the rows of a call.

        Args:
            denoiser: The denoiser.
            family: Its family.
            bound: Its arguments.
            samples: How many pictures the pipeline was asked for, where its prompts tell: as many rows are all of them.

        Raises:
            UnsupportedModelError: The pipeline calls the denoiser in a way that attnctl cannot tell apart.
        """
        total = row_count(bound)
        negative = getattr(self.pipe, "unconditional_transformer", None)
        if isinstance(negative, torch.nn.Module) and unwrapped(negative) is denoiser:  # Ideogram 4 has one for each
            return Rows(total, slice(0, 0), slice(0, total), role="uncond")
        call, self.calls = self.calls, self.calls + 1
        if "skip_layers" in bound and bound["skip_layers"] is not None:
            return Rows(total, slice(0, 0), role="extra")  # SD3's own skip-layer guidance: not ours to guide
        shown = family.layout(denoiser, bound) if family.layout is not None and self.layout == "auto" else None
        self._shown = shown is not None
        if shown is not None and (call == 0 or self.pipe is None):
            if shown == "extra":
                self.calls = call
                return Rows(total, slice(0, 0), role="extra")
            self._first = main_input(bound)
            self._read = Rows.halves(total, cond_first=True) if shown == "cond_first" else Rows.all(total)
            return self._read
        if self.pipe is None:
            return self._told_halves(total) if self.layout == "uncond_first" else Rows.all(total)
        if call == 0:
            self._first = main_input(bound)
            whole = self.layout == "auto" and samples == total
            self._read = Rows.all(total) if whole else self._first_rows(bound, total, family.cond_first)
            return self._read
        if self._read is not None and self._read.role == "all" and self.layout != "cond":
            first = self._first
            same = isinstance(first, list) or main_input(bound).shape == first.shape
            if call == 1 and same:
                if self.layout == "auto":
                    self._check_pair(main_input(bound))
                return Rows(total, slice(0, 0), slice(0, total), role="uncond")
        raise UnsupportedModelError(
            f"{type(self.pipe).__name__} called its denoiser {call + 1} times in one step with {total} rows: this is "
            "neither a batched nor a sequential pair of negative prompt and prompt. "
            'Pass control(..., layout="cond") if every row carries the prompt. A pipeline that steps with a copy of '
            "its scheduler looks like this, too, and cannot be followed."
        )

    def _check_pair(self, second: Any) -> None:
        """Raise unless both calls of a step are given the same latents, as prompt and negative prompt are."""
        first, second = ([x] if isinstance(x, torch.Tensor) else _flat(x) for x in (self._first, second))
        if len(first) != len(second) or not all(
            a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True)
        ):
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} called its denoiser twice with different latents and no step of its "
                "scheduler between: it steps with a copy of pipe.scheduler, or with another one, which attnctl does "
                "not watch. Use a pipeline that steps with its own scheduler."
            )

    def warn_bare(self, rows: Rows) -> None:
        """Warn once that the rows of a bare model are all guided as prompt rows, where they may be halves."""
        shown = self.layout != "auto" or self._shown or rows.role == "extra" or rows.total % 2
        if not shown and not self._warned:
            self._warned = True
            warnings.warn(
                f"attnctl: a bare model tells nothing of its {rows.total} rows; each is guided as a prompt row. "
                'Pass control(..., layout="uncond_first") if the first half is the negative prompt, or '
                'layout="cond" to confirm.',
                stacklevel=3,
            )

    def _first_rows(self, bound: Mapping[str, Any], total: int, cond_first: bool) -> Rows:
        if self.layout in ("cond", "sequential"):
            return Rows.all(total)
        if self.layout == "uncond_first":
            return self._told_halves(total)
        flag = uses_guidance(self.pipe)
        key = (total, flag)
        if key not in self._known:
            self._known[key] = flag is not False and total % 2 == 0 and self._halves_equal(bound, total)
        return Rows.halves(total, cond_first) if self._known[key] else Rows.all(total)

    @staticmethod
    def _told_halves(total: int) -> Rows:
        if total % 2:
            raise UnsupportedModelError(
                f'layout="uncond_first" needs an even number of rows; the denoiser was called with {total}.'
            )
        return Rows.halves(total)

    def _halves_equal(self, bound: Mapping[str, Any], total: int) -> bool:
        x = main_input(bound) if self._scaled is None else self._scaled
        half = total // 2
        if isinstance(x, (list, tuple)):
            one, other = _flat(x[:half]), _flat(x[half:])
            equal = len(one) == len(other) and all(map(torch.equal, one, other))
        else:  # video UNets may fold frames into rows before scaling
            equal = x.shape[0] % 2 == 0 and torch.equal(*x.chunk(2))
        # NaN is not equal to itself, and would pass for an unknown layout.
        if not equal and any(bool(part.isnan().any()) for part in _flat([x])):
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} called its denoiser with latents that hold NaN: nothing can be guided "
                "from there. Give finite latents, and run the model in float32 or bfloat16 if its own results overflow."
            )
        return equal

    def check_step(self, sample: Any) -> bool:
        """Compare the rows read with the latents that the scheduler updates, and tell whether the step ends with them.

        Cosmos brings prompt and negative prompt of two calls to clean latents first, in one call of the scheduler; the
        step ends with the next.

        Raises:
            UnsupportedModelError: The number of rows does not fit what was read.
        """
        rows, first, self._scaled = self._read, self._first, None
        calls, self.calls, self._first = self.calls, 0, None
        if rows is None or first is None or self.pipe is None or not isinstance(sample, torch.Tensor):
            return True
        ratio = len(first) / sample.shape[0]
        expected = 2 if rows.role == "both" else 1
        if (ratio, expected, calls) == (0.5, 1, 2):
            return False
        if isinstance(first, torch.Tensor) and first.ndim != sample.ndim and ratio != expected:
            ratio = first.numel() / sample.numel()  # frames folded into rows
        if ratio == expected or (self._shown and ratio in (1, 2)):  # DiT's pipeline steps both halves
            return True
        name = type(self.pipe).__name__
        if expected == 2 and ratio == 1:
            raise UnsupportedModelError(
                f"{name}: the two halves of a batch hold equal latents, which looks like negative prompt and prompt, "
                'but they are two images. Pass control(..., layout="cond"), or give the images different latents.'
            )
        raise UnsupportedModelError(
            f"{name} called its denoiser with {ratio:g} rows for each image: an unknown row layout (attnctl knows "
            "prompt only, negative prompt then prompt in one batch, and one call for each). If the first half is the "
            'negative prompt, pass control(..., layout="uncond_first").'
        )


def _flat(latents: Any) -> list[torch.Tensor]:
    """List the tensors of nested lists: Z-Image's rows may hold several pictures each."""
    if isinstance(latents, torch.Tensor):
        return [latents]
    return [x for part in latents for x in _flat(part)]
