"""Moving the latents before a step, by gradients of a loss on attention maps.

Before the denoiser's first call in a step the engine takes the latents z that the pipeline holds, runs the denoiser on
the prompt rows with gradients as far as the last map that the control needs, and computes z' = z - alpha grad L. The
call then sees z' in place of z, and so does the scheduler's `step` (`core.hosts.latents` says how).

With `update="velocity"` z stays and the gradient goes to the prediction of that step's calls instead.

A scheduler that evaluates the denoiser several times a step (Heun, KDPM2, DPM singlestep, PNDM's warm-up) starts each
step from the latents of its first evaluation; only those are moved, and the later evaluations are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.core.call import CallState
from attnctl.core.hosts.arguments import main_input, main_name, take_rows, time_of
from attnctl.core.hosts.outputs import main_output, with_main_output
from attnctl.core.hosts.predictions import combine
from attnctl.core.hosts.scheduler import call_time, later_evaluation, place_of
from attnctl.core.hosts.words import given_text, row_texts, weights
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.sites import Site
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels.checks import read_later
from attnctl.processors.latent.fields import LatentFields, transformed
from attnctl.processors.latent.reader import MapReader, exit_refusal, prepared, usable

__all__ = ["LatentEngine"]


class LatentEngine(LiveControl):
    """One `LatentGuidance` at work on one denoiser.

    Args:
        control: What to ask of the attention.
        sites: Where its maps are read.
        pipe: The pipeline, whose tokenizers find the words.

    Attributes:
        updates: Gradient steps taken since the controls were attached.
        forwards: Guidance forwards run for them.
    """

    def __init__(self, control: LatentFields, sites: Sequence[Site], pipe: Any) -> None:
        if pipe is None:
            raise ConfigError(
                f"{control.describe()} moves the latents between scheduler steps, which a bare model has not: pass the "
                "pipeline to control()."
            )
        self.control, self.sites, self.pipe = control, tuple(sites), pipe
        self.updates = self.forwards = 0
        self.begin_run()

    def begin_run(self) -> None:
        self.tokens: dict[int, Tensor] = {}
        self.unchecked: list[tuple[Callable[[], Tensor], int, torch.dtype]] = []
        """Whether each gradient of this step was finite, its step, and the dtype of the denoiser's input."""
        self._end_step()

    def _end_step(self) -> None:
        self.passes: LiveDenoiser | None = None
        self.moved: tuple[Tensor, Tensor] | None = None
        self.push: Tensor | None = None

    # The events of a step -------------------------------------------------------------------------------------

    def before_call(self, passes: LiveDenoiser) -> dict[str, Any] | None:
        """Move the latents before the first call of a step; write them into every call of it."""
        state = passes.state
        if self.passes is None:
            self.passes = passes
            acts = state.rows.role in ("all", "both", "thirds") and self.control.acts(state)
            if acts and not later_evaluation(passes.pipe.scheduler):
                self._move(passes)
        return None if self.moved is None else passes.latents.written(state)

    def _move(self, passes: LiveDenoiser) -> None:
        old = passes.latents.of(passes.state)
        update = _Update(self, passes)
        if self.control.update == "velocity":
            self.push = update.push(old) * self._noise_level(passes.state) ** 2
        else:
            self.moved = old, update.run(old)
            passes.latents.move(self.moved[1])

    def after_call(self, output: Any) -> Any:
        """Add what `update="velocity"` asks for to a prediction; None where that is nothing."""
        if self.push is None or self.passes is None or self.passes.state.rows.role == "extra":
            return None
        pred, push = main_output(output), self.push
        if not isinstance(pred, Tensor) or pred.shape[1:] != push.shape[1:]:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} predicts {tuple(getattr(pred, 'shape', ()))} for latents "
                f"{tuple(push.shape)}: attnctl cannot change that velocity."
            )
        return with_main_output(output, combine(pred, push.to(pred.device), self.passes.state.rows, None))

    def stepping(self, latents: Tensor) -> Tensor:
        """Give the scheduler the moved latents."""
        moved, passes = self.moved, self.passes
        self._end_step()
        self._check_finite()
        return latents if moved is None or passes is None else passes.latents.carried(latents, *moved)

    def _check_finite(self) -> None:
        """Raise if a gradient of the step was not finite: here, where the device has the base pass to work on."""
        unchecked, self.unchecked = self.unchecked, []
        for finite, step, dtype in unchecked:
            if not bool(finite()):
                raise UnsupportedModelError(
                    f"{self.control.describe()}: the loss of step {step} or its gradient is not a finite number. The "
                    f"attention maps hold NaN or overflow in {dtype}: run the model in float32 or bfloat16, or lower "
                    "step_size."
                )

    def describe(self) -> str:
        return f"latents: {self.updates} updates by {self.forwards} guidance forwards so far"

    # Words and noise levels -----------------------------------------------------------------------------------

    def _noise_level(self, state: CallState) -> Tensor:
        """Return the scheduler's sigma of the current step, in [0, 1]."""
        scheduler: Any = self.pipe.scheduler
        config, name = scheduler.config, type(scheduler).__name__
        flows = "FlowMatch" in name or bool(config.get("use_flow_sigmas"))
        if not flows or not isinstance(getattr(scheduler, "sigmas", None), Tensor):
            raise UnsupportedModelError(
                f'{self.control.describe()}: update="velocity" changes the velocity of flow matching (SD3, FLUX and '
                f'their kin), but {name} steps otherwise. Use update="latents".'
            )
        place = place_of(scheduler, lambda: call_time(scheduler, state.bound))
        if place is None:
            raise UnsupportedModelError(f"{name} does not tell the noise level of timestep {time_of(state.bound)}.")
        return scheduler.sigmas[min(place, len(scheduler.timesteps) - 1)].to(torch.float32)

    def share(self, state: CallState, n_text: int) -> Tensor:
        """Return the share of each of the text tokens in each concept, [samples, n_text, C]."""
        if n_text not in self.tokens:
            shares = torch.stack([weights(concepts, n_text) for concepts in self._find(state)])
            self.tokens[n_text] = shares.to(main_input(state.bound).device)
        return self.tokens[n_text]

    def _find(self, state: CallState) -> list[Any]:
        """Find the control's concepts in the prompt of each sample."""
        c = self.control
        lists = len(c.concepts) if c.nested else None
        rows = row_texts(state.prompts, state.rows.prompts, c.describe(), prompt=c.prompt, lists=lists)
        words, n_text = c.concepts if c.nested else (c.concepts,) * (rows[-1].number + 1), given_text(state.bound)
        return [row.find(self.pipe, words[row.number], n_text, c.describe()) for row in rows]


class _Update:
    """The gradient steps of one control before one denoising step."""

    def __init__(self, engine: LatentEngine, passes: LiveDenoiser) -> None:
        self.engine, self.passes, self.control = engine, passes, engine.control
        # A pipeline's second denoiser goes on with what the first has remembered.
        self.memory: dict[str, Any] = passes.shared.setdefault(id(engine.control), {})
        state, rows = passes.state, passes.state.rows
        frames = state.grid[0] if rows.role == "both" and state.grid else 1
        self.bound = take_rows(state.bound, rows.cond, rows.total, frames, state.family)

    def run(self, z: Tensor) -> Tensor:
        """Return the moved latents."""
        c, state = self.control, self.passes.state
        alpha, level = c.alpha(state), c.level(state)
        first: Tensor | None = None
        for n in range(c.iterations):
            loss, grad, maps = self.gradient(z)
            if n == 0:
                first = maps
                if level is not None:
                    z, grad = self.refine(z, loss, grad, alpha, level)
            z = self.moved(z, grad, alpha)
        assert first is not None
        c.remember(first, self.memory)
        return z

    def push(self, z: Tensor) -> Tensor:
        """Return alpha times the gradient at z, and leave z alone."""
        c = self.control
        _, grad, maps = self.gradient(z)
        self.engine.updates += 1
        c.remember(maps, self.memory)
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return c.alpha(self.passes.state) * transformed(wide, c.grad_transform)

    def refine(self, z: Tensor, loss: Tensor, grad: Tensor, alpha: float, level: float) -> tuple[Tensor, Tensor]:
        """Repeat updates of each sample until its loss is at the level, and once more, as Attend-and-Excite does."""
        going = loss > level
        for _ in range(self.control.max_refine):
            if not bool(going.any()):
                break
            keep = going.reshape(-1, *[1] * (z.ndim - 1))
            z = torch.where(keep, self.moved(z, grad, alpha), z)
            going = going & (loss > level)
            loss, grad, _ = self.gradient(z)
        return z, grad

    def moved(self, z: Tensor, grad: Tensor, alpha: float) -> Tensor:
        """Take one gradient step, in float32 at least."""
        self.engine.updates += 1
        wide = torch.promote_types(z.dtype, torch.float32)
        return (z.to(wide) - alpha * transformed(grad.to(wide), self.control.grad_transform)).to(z.dtype)

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute each sample's loss, its gradient by the latents, and the maps, in one forward for all samples."""
        c, passes, state = self.control, self.passes, self.passes.state
        early = c.early_exit and exit_refusal(passes.module, self.bound) is None
        every = c.map_norm == "ae"
        share = _one_hot(z.device) if every else self._share
        reader = MapReader([s.name for s in self.engine.sites], share, early, c.needs_self_attention)
        name, template = main_name(self.bound), main_input(self.bound)
        first = template[0] if isinstance(template, (list, tuple)) else template
        if not first.is_floating_point():
            raise UnsupportedModelError(
                f"{type(c).__name__}: {type(passes.module).__name__} is called with codes of a picture ({name}), which "
                "no gradient can move. Use a guidance (PAG, SEG) with this model."
            )
        scaled = passes.latents.input(z, template)
        self.engine.forwards += 1
        with torch.inference_mode(False), torch.enable_grad(), prepared(passes.module, c.checkpoint, passes.snapshot):
            kwargs = usable(self.bound)
            kwargs[name] = leaf = scaled.detach().clone().requires_grad_()
            passes.extra_pass("latents", kwargs, {site.name: reader for site in self.engine.sites})
            reader.reading = False
            attention = reader.maps()
            tokens = self._share(attention.shape[1]) if every else attention.new_empty(0)
            folded = attention.shape[0] // z.shape[0]
            maps = c.concept_maps(attention, tokens.repeat_interleave(folded, 0) if every else tokens)
            loss = self.loss(maps, reader)
            # Small gradients would vanish in half precision; a power of two changes nothing else.
            boost = 1024.0 if leaf.dtype == torch.float16 else 1.0
            (grad,) = torch.autograd.grad(loss.sum() * boost, leaf)
        loss = loss.detach().unflatten(0, (z.shape[0], -1)).mean(1)
        grad = passes.latents.unscaled(grad, z) / boost
        finite = read_later(torch.isfinite(loss).all() & torch.isfinite(grad).all())
        self.engine.unchecked.append((finite, state.step, leaf.dtype))
        return loss, grad, maps.detach()

    def _share(self, n_text: int) -> Tensor:
        return self.engine.share(self.passes.state, n_text)

    def loss(self, maps: Tensor, reader: MapReader) -> Tensor:
        """Compute each sample's loss, with the image's own attention where the control asks for it."""
        if not self.control.needs_self_attention:
            return self.control.loss(maps, self.memory)
        self.memory["self_attention"] = reader.attention(maps.shape[0])
        try:
            return self.control.loss(maps, self.memory)
        finally:
            del self.memory["self_attention"]  # it holds the graph


def _one_hot(device: torch.device) -> Callable[[int], Tensor]:
    return lambda n: torch.eye(n, device=device)[None]
