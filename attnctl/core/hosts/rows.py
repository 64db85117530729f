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

from attnctl.core.hosts.arguments import Rows, given_time, main_input, row_count, time_of
from attnctl.core.hosts.families import Family
from attnctl.core.hosts.kinds import texts_of
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
        self._time: Any = None
        self._read: Rows | None = None
        self._known: dict[tuple[int, bool | None], Rows] = {}

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
        self,
        denoiser: torch.nn.Module,
        family: Family,
        bound: Mapping[str, Any],
        samples: int | None = None,
        latents: int | None = None,
    ) -> Rows:
        """Tell the rows of a call.

        Args:
            denoiser: The denoiser.
            family: Its family.
            bound: Its arguments.
            samples: How many pictures the pipeline was asked for, where its prompts tell: as many rows are all of them.
            latents: How many rows the pipeline's own latents have, where it has any by that name.

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
            self._first, self._time = main_input(bound), given_time(bound)  # read only for an error: reading waits
            whole = self.layout == "auto" and samples == total
            self._read = Rows.all(total) if whole else self._first_rows(bound, total, family.cond_first, latents)
            return self._read
        if self._read is not None and self._read.role == "all" and self.layout != "cond":
            first = self._first
            same = isinstance(first, list) or main_input(bound).shape == first.shape
            if call == 1 and same:
                if self.layout == "auto":
                    self._check_pair(main_input(bound))
                return Rows(total, slice(0, 0), slice(0, total), role="uncond")
        if time_of({"timestep": self._time}) != time_of(bound):
            raise self._copied("at another time")
        raise UnsupportedModelError(
            f"{type(self.pipe).__name__} called its denoiser {call + 1} times in one step with {total} rows: this is "
            "neither a batched nor a sequential pair of negative prompt and prompt. "
            'Pass control(..., layout="cond") if every row carries the prompt.'
        )

    def _copied(self, how: str) -> UnsupportedModelError:
        """Return the error for a pipeline whose steps pass the scheduler by that attnctl watches."""
        return UnsupportedModelError(
            f"{type(self.pipe).__name__} called its denoiser again {how} and no step of its scheduler between: it "
            "steps with copies of pipe.scheduler, or with another one, which attnctl does not watch. Use a pipeline of "
            "the same model that steps with its own scheduler (SkyReels V2: SkyReelsV2Pipeline in place of diffusion "
            "forcing)."
        )

    def _check_pair(self, second: Any) -> None:
        """Raise unless both calls of a step are given the same latents, as prompt and negative prompt are."""
        first, second = ([x] if isinstance(x, torch.Tensor) else _flat(x) for x in (self._first, second))
        if len(first) != len(second) or not all(
            a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True)
        ):
            raise self._copied("with other latents")

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

    def _first_rows(self, bound: Mapping[str, Any], total: int, cond_first: bool, latents: int | None) -> Rows:
        if self.layout in ("cond", "sequential"):
            return Rows.all(total)
        if self.layout == "uncond_first":
            return self._told_halves(total)
        flag = uses_guidance(self.pipe)
        key = (total, flag)
        if key not in self._known:
            if flag is not False and total % 2 == 0 and self._groups_equal(bound, total, 2):
                self._known[key] = Rows.halves(total, cond_first)
            elif flag is not False and total % 3 == 0 and latents == total // 3:
                self._known[key] = Rows.thirds(total, 0 if cond_first else self._prompt_third(bound, total))
            else:
                self._known[key] = Rows.all(total)
        return self._known[key]

    def _prompt_third(self, bound: Mapping[str, Any], total: int) -> int:
        """Find the third of the rows whose text is another than that of the other two, which are the negative prompt's.

        Raises:
            UnsupportedModelError: No text of the call tells one third from the two others.
        """
        texts = [x for _, x in texts_of(bound) if x.ndim > 1 and x.shape[0] == total]
        apart = [
            any(not torch.equal(*(x.chunk(3)[i] for i in pair)) for x in texts) for pair in ((1, 2), (0, 2), (0, 1))
        ]
        odd = [i for i, differ in enumerate(apart) if not differ]
        if len(odd) != 1:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} called its denoiser with three rows for each image (text and picture, "
                "picture alone, neither), and their texts do not tell which of them carries the prompt: one must "
                "differ from the other two. Give a negative_prompt other than the prompt."
            )
        return odd[0]

    @staticmethod
    def _told_halves(total: int) -> Rows:
        if total % 2:
            raise UnsupportedModelError(
                f'layout="uncond_first" needs an even number of rows; the denoiser was called with {total}.'
            )
        return Rows.halves(total)

    def _groups_equal(self, bound: Mapping[str, Any], total: int, count: int) -> bool:
        """Tell whether so many parts of a batch hold equal latents, as the conditions of one image do."""
        x = main_input(bound) if self._scaled is None else self._scaled
        size = total // count
        if isinstance(x, (list, tuple)):
            one, *others = (_flat(x[i * size : (i + 1) * size]) for i in range(count))
            equal = all(len(one) == len(other) and all(map(torch.equal, one, other)) for other in others)
        else:  # video UNets may fold frames into rows before scaling
            equal = x.shape[0] % count == 0 and all(torch.equal(x.chunk(count)[0], y) for y in x.chunk(count)[1:])
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
        expected = len(rows.groups)
        if (ratio, expected, calls) == (0.5, 1, 2):
            return False
        if isinstance(first, torch.Tensor) and first.ndim != sample.ndim and ratio != expected:
            ratio = first.numel() / sample.numel()  # frames folded into rows
        if ratio == expected or (self._shown and ratio in (1, 2)):  # DiT's pipeline steps both halves
            return True
        name = type(self.pipe).__name__
        if expected > 1 and ratio == 1:
            number, shown = "two", "halves of a batch hold equal latents, which looks like negative prompt and prompt"
            if expected == 3:
                number, shown = "three", "thirds of a batch look like one prompt and two rows without it"
            raise UnsupportedModelError(
                f"{name}: the {number} {shown}, but they are {number} images. "
                'Pass control(..., layout="cond"), or give the images different latents.'
            )
        raise UnsupportedModelError(
            f"{name} called its denoiser with {ratio:g} rows for each image: an unknown row layout (attnctl knows "
            "prompt only, negative prompt then prompt in one batch, one call for each, and three rows with text and "
            "picture, picture alone and neither). If the first half is the "
            'negative prompt, pass control(..., layout="uncond_first").'
        )


def _flat(latents: Any) -> list[torch.Tensor]:
    """List the tensors of nested lists: Z-Image's rows may hold several pictures each."""
    if isinstance(latents, torch.Tensor):
        return [latents]
    return [x for part in latents for x in _flat(part)]
