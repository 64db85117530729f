"""A negative prompt beside the prompt, at the sites of one denoiser while a control is attached to it.

Attention takes the negative prompt from one of three places:

    its rows of the same call      cross-attention under classifier-free guidance in one batch
    its keys, recorded once        cross-attention, and hosts whose text is never updated by the image: one small call
                                   of the denoiser per run, with the negative prompt and one line of the image
    a call in lockstep             joint attention, whose text has a stream of its own through all blocks: a second call
                                   of the denoiser goes beside the first, from site to site. Its text attends to
                                   the first call's image, which the second need not have: "stream" cuts it to one
                                   line, "rows" carries it along
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed
from attnctl.core.hosts.arguments import Rows, own_containers, row_count, take_rows
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.ghost import EMBEDS, TextComparison, equal, ghost_call, negative_arguments, text_arguments
from attnctl.core.hosts.modules import compiled_below
from attnctl.core.hosts.one_line import one_line
from attnctl.core.hosts.prompt import arguments_of
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.sites import Site
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels.checks import send
from attnctl.processors.negative.beside import Beside, Key, check_beside
from attnctl.processors.negative.keys import (
    NegativeKeys,
    TimeProbe,
    attend_beside,
    has_text_stream,
    image_queries,
    same_keys,
    text_keys,
)

__all__ = ["Form", "LiveNegative", "prompt_rows"]

Form = Literal["auto", "stream", "rows"]


class NegativeGuidance(Protocol):
    """What a control with a negative prompt says of itself."""

    @property
    def negative_prompt(self) -> str | None: ...

    @property
    def negative_embeds(self) -> Mapping[str, Any] | None: ...

    @property
    def form(self) -> Form: ...

    @property
    def scale(self) -> float: ...

    def guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Compute z of z+ and z-, [B, H, N, D]."""


class LiveNegative(LiveControl):
    """What guidance by a negative prompt keeps on one denoiser.

    Args:
        control: What the guidance is: its fields, and z of z+ and z-.
        sites: Where it acts.
        denoiser: The denoiser.
    """

    name = "NAG"
    """What the control is called in errors."""
    what = "the negative prompt"
    """What the text is called in errors."""
    remedy = EMBEDS
    """What to do where the pipeline cannot encode it."""
    bare = (
        "NAG needs a negative prompt, and this call of a bare model has no negative rows. Pass its embeddings by the "
        "names of the model's arguments, NAG(negative_embeds={'encoder_hidden_states': ...}); or control(..., "
        "layout='uncond_first') if the first half of the rows is the negative prompt."
    )
    """The error where a bare model is called, which encodes nothing."""
    no_line = "Use form='rows'."
    """What to do where nothing tells how the image lies in the arguments of a call."""

    def __init__(self, control: NegativeGuidance, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> None:
        self.control, self.sites, self.denoiser = control, sites, denoiser
        self.text, self.embeds = control.negative_prompt, control.negative_embeds
        self.family = family_of(denoiser)
        self.time = TimeProbe()
        self.recordings = 0
        """Calls of the denoiser that have recorded keys since the control was attached."""
        self._passes: LiveDenoiser
        self.lockstep: Literal["stream", "rows"] | None = None
        """How the negative prompt's call in lockstep carries the image along; None where there was none."""
        self._answer: Tensor | None = None
        self._beside: Beside | None = None
        self.begin_run()

    def begin_run(self) -> None:
        self._close()
        self.keys: dict[Key, NegativeKeys] = {}
        self._comparison = TextComparison()
        self.time.begin_run()
        self._text_at: dict[str, int] = {}
        self._kwargs: dict[str, Any] | None = None
        self._idle = self._batched = False
        self._warned = False

    # One call of the denoiser ---------------------------------------------------------------------------------

    def before_call(self, passes: LiveDenoiser) -> None:
        """Find out what the negative prompt hands the denoiser in this call."""
        self._close()
        self._passes, self._kwargs, self._idle = passes, None, False
        rows = passes.state.rows
        if rows.role in ("uncond", "extra"):
            return
        bound, frames = passes.state.bound, _frames(passes.state)
        positive = take_rows(bound, rows.cond, rows.total, frames, self.family)
        self._batched = rows.uncond is not None and self.text is None and self.embeds is None
        if self._batched:
            assert rows.uncond is not None
            other = take_rows(bound, rows.uncond, rows.total, frames, self.family)
            negative = self._comparison.differing(bound, other, lambda: text_arguments(other, positive))
            passes.shared[self._key] = negative  # for a run whose later calls are not guided
        else:
            negative = self._conditions(positive)
        if not negative:
            self._warn_equal()
            return
        self._kwargs = positive | own_containers(negative)
        if self.time.timeless is False:
            self.keys.clear()  # they move with the time: each call records its own
        if compiled_below(self.denoiser):
            # What follows runs inside of a graph, which cannot wait for a second call, nor compare keys.
            if any(site.kind == "joint" for site in self.sites):
                check_beside(self.denoiser, self.name, self.what)
            if not self._batched:
                self._record()

    @property
    def _key(self) -> tuple[str, int]:
        return "negative prompt", id(self.control)

    def _conditions(self, positive: Mapping[str, Any]) -> dict[str, Any]:
        """Return the negative prompt's arguments of the denoiser, which the pipeline makes once per run."""
        passes, key = self._passes, self._key
        names = inspect.signature(type(self.denoiser).forward).parameters
        if self.embeds is not None and all(name in names for name in self.embeds):
            given = self._to_rows(self.embeds, positive)
            unequal = (n for n, v in given.items() if not equal(v, positive.get(n)))
            return given if self._comparison.differing(passes.state.bound, given, lambda: unequal) else {}
        if passes.pipe is None:
            raise UnsupportedModelError(self.bare)
        if key not in passes.shared:
            arguments = negative_arguments(passes.pipe, arguments_of(passes.pipe), self.text, self.embeds)
            made = ghost_call(passes.pipe, arguments, self.what, self.remedy)
            total, rows = row_count(made), passes.state.rows
            if total == rows.total != rows.prompts:
                made = take_rows(made, rows.cond, rows.total, _frames(passes.state), self.family)
            passes.shared[key] = text_arguments(made, positive)
        return self._to_rows(passes.shared[key], positive)

    def _to_rows(self, values: Mapping[str, Any], positive: Mapping[str, Any]) -> dict[str, Any]:
        return _to_rows(values, row_count(positive), positive, f"{self.name}: {{}} of {self.what}")

    def _warn_equal(self) -> None:
        self._idle = True
        if not self._warned:
            self._warned = True
            warnings.warn(
                "attnctl: NAG's negative prompt equals the prompt in every argument of the denoiser, so nothing is "
                "guided. Give it another one.",
                stacklevel=2,
            )

    def after_call(self, output: Any) -> None:
        self._close()

    # One attention --------------------------------------------------------------------------------------------

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        state = call.state
        if not state.rows.prompts or self._idle:
            return proceed(call)
        part = prompt_rows(call)
        if part is None:
            return proceed(call)
        first, prompt = part
        key = call.site.name, call.index - first
        if call.site.kind == "joint" and has_text_stream(call):
            return self._joint(key, call, prompt, proceed)
        if self._batched and state.phase == "base":
            assert (
                state.rows.uncond is not None
            )  # a perturbed pass, of the prompt's rows alone, takes what this one saw
            self.keys[key] = NegativeKeys.of(call.rows(state.rows.uncond))
        elif state.phase == "base":
            if self.time.moved(key, prompt):
                self.keys = {}
            if key not in self.keys:
                self._record()
        keys = self.keys.get(key)
        if keys is None or not self._is_text(key, keys, prompt):
            return proceed(call)
        out = proceed(call)
        away = proceed(keys.attended(prompt)) if call.site.kind != "joint" else keys.attended(prompt).plain()
        return self._guided(call, out, away, image_queries(call))

    def _is_text(self, key: Key, keys: NegativeKeys, part: AttnCall) -> bool:
        """Tell whether an attention call is the one to the text: the first in its site whose keys a text changes.

        The others are those to image prompts (IP-Adapter, Wan's image to video), before it or behind.
        """
        site, index = key
        if torch.compiler.is_compiling():
            return index == 0
        if site not in self._text_at and not same_keys(keys, part):
            self._text_at[site] = index
        return self._text_at.get(site) == index

    def _guided(self, call: AttnCall, out: Tensor, away: Tensor, image: slice) -> Tensor:
        """Put z in the place of z+ at the prompt rows' image tokens."""
        rows = call.state.rows
        if out.shape[0] % rows.total:  # one sample per call
            rows = Rows.all(1)
        m = out.shape[0] // rows.total
        cut = slice(rows.cond.start * m, rows.cond.stop * m)
        z = self.control.guide(out[cut, :, image], away)
        if z.shape == out.shape:
            return z
        moved = torch.cat([out[cut, :, : image.start], z, out[cut, :, image.stop :]], 2)
        return torch.cat([out[: cut.start], moved, out[cut.stop :]])

    # Keys that are recorded -----------------------------------------------------------------------------------

    def _record(self) -> None:
        """Call the denoiser with the negative prompt and one line of the image; keep its text's keys."""
        assert self._kwargs is not None
        kwargs = one_line(self.denoiser, self.family, self._kwargs) or self._kwargs
        recorded: dict[Key, NegativeKeys] = {}

        def note(call: AttnCall, proceed: Proceed) -> Tensor:
            if call.site.kind != "joint" or not has_text_stream(call):
                recorded[call.site.name, call.index] = NegativeKeys.of(call)
            return proceed(call)

        self._passes.extra_pass("negative", kwargs, {site.name: note for site in self.sites})
        self.keys = recorded
        self.recordings += 1

    # Joint attention in lockstep ------------------------------------------------------------------------------

    def _joint(self, key: Key, call: AttnCall, part: AttnCall, proceed: Proceed) -> Tensor:
        text, image = text_keys(call), image_queries(call)
        if text.start == text.stop:  # blocks behind the last that sees the text
            return proceed(call)
        if call.state.phase != "base":
            keys = self.keys.get(key)
            if keys is None or call.q.shape[2] != call.k.shape[2]:
                return proceed(call)
            return self._guided(call, proceed(call), keys.attended(part).plain(), image)
        self._beside = self._beside or self._begin()
        negative = self._beside.arrive(key, self._answer)
        out = proceed(call)
        away, seen = attend_beside(part, negative)
        guided = self._guided(call, out, away, image)
        answer = negative.q.new_zeros(*negative.q.shape[:3], seen.shape[-1])
        if self.lockstep == "rows":  # what the second call has beside its text is the first one's
            rows = call.state.rows
            cond = rows.cond if out.shape[0] == rows.total else slice(0, 1)
            others = text_keys(negative)
            answer[:, :, : others.start] = guided[cond][:, :, : text.start]
            answer[:, :, others.stop :] = guided[cond][:, :, text.stop :]
        answer[:, :, text_keys(negative)] = seen
        if getattr(self._passes, "branches", ()):
            self.keys[key] = NegativeKeys.of(negative)
        self._answer = answer
        return guided

    def _begin(self) -> Beside:
        """Begin a call with the negative prompt beside the one that is under way."""
        assert self._kwargs is not None
        smaller = None if self.control.form == "rows" else one_line(self.denoiser, self.family, self._kwargs)
        if smaller is None and self.control.form == "stream":
            raise UnsupportedModelError(
                f"{self.name} takes {self.what} beside the call with one line of the image (form 'stream'), and "
                f"nothing tells how the image lies in the arguments of {type(self.denoiser).__name__}. {self.no_line}"
            )
        self.lockstep = "rows" if smaller is None else "stream"
        names = [site.name for site in self.sites if site.kind == "joint"]
        kwargs = self._kwargs if smaller is None else smaller
        return Beside(self._passes, self.family, kwargs, names, self.name, self.what)

    def describe(self) -> str | None:
        how = "not known before the first call"
        if self._batched:
            how = "the negative rows of the same batch"
        elif self.recordings:
            calls = f"{self.recordings} call{'s' if self.recordings > 1 else ''} of the denoiser"
            how = f"keys, recorded by {calls}" + (" (they move with the time)" if self.time.timeless is False else "")
        elif self.lockstep is not None:
            how = f"a call in lockstep, form {self.lockstep!r}"
        return (
            f"  negative prompt: {how}; scale={self.control.scale:g} is {self.control.scale + 1:g} in the authors' code"
        )

    def _close(self) -> None:
        """End the call with the negative prompt."""
        self._answer = None
        if self._beside is not None:
            self._beside.close()
            self._beside = None


def prompt_rows(call: AttnCall) -> tuple[int, AttnCall] | None:
    """Return the prompt's rows of an attention call, and the number of the first call where each is for one sample.

    Mochi attends once per sample; None for a sample that does not carry the prompt.
    """
    rows = call.state.rows
    if call.q.shape[0] % rows.total == 0:
        return 0, call if rows.cond == slice(0, rows.total) else call.rows(rows.cond)
    if call.q.shape[0] == 1 and call.index < rows.total:
        return (rows.cond.start, call) if rows.cond.start <= call.index < rows.cond.stop else None
    raise UnsupportedModelError(
        f"{call.site.name} attends with {call.q.shape[0]} rows where the denoiser was called with {rows.total}: the "
        "prompt's rows cannot be told apart."
    )


def _frames(state: CallState) -> int:
    """Return how many rows of some arguments one row of the call has: frames, in UNets for videos."""
    return state.grid[0] if state.rows.role == "both" and state.grid else 1


def _to_rows(values: Mapping[str, Any], rows: int, like: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Repeat arguments of one row for all rows of a call, in the types and on the device of the call's own.

    Args:
        values: The arguments by name.
        rows: The rows of the call.
        like: The arguments of the call by name.
        what: What errors call them, with {} for the name.

    Raises:
        ConfigError: They are for another number of rows.
    """

    def fit(name: str, value: Any) -> Any:
        example = like.get(name)
        if isinstance(value, torch.Tensor):
            value = _like(value, example)
            per_row = not isinstance(example, torch.Tensor) or (example.ndim > 0 and example.shape[0] == rows)
            count = rows
            if isinstance(example, torch.Tensor) and example.ndim == value.ndim == 3:
                per_row, count = True, example.shape[0]  # more than `rows` where each frame of a row has its text
            if value.ndim < 2 or value.shape[0] == count or not per_row:
                return value
            if value.shape[0] in (1, rows) and count % value.shape[0] == 0:
                return value.repeat_interleave(count // value.shape[0], 0)
            raise ConfigError(
                f"{what.format(name)} has the shape {tuple(value.shape)}, and the call has {count} rows with the "
                "prompt; give one row, or as many."
            )
        if isinstance(value, list) and len(value) == 1 and isinstance(example, list) and len(example) == rows:
            return value * rows
        return value

    return {name: fit(name, value) for name, value in values.items()}


def _like(value: Tensor, example: Any) -> Tensor:
    """Bring embeddings to the device of a call's own, and to its type where both are floating point."""
    if not isinstance(example, Tensor):
        return value
    floating = value.is_floating_point() and example.is_floating_point()
    return send(value, example.device, example.dtype if floating else value.dtype)
