"""Moving the latents before a step, by gradients of a loss on attention maps.

Before the denoiser's first call in a step the engine takes the latents z that the pipeline holds, runs the denoiser on
the prompt rows with gradients as far as the last map that a control needs, and computes z' = z - alpha grad L. The call
then sees z' in place of z, and so does the scheduler's `step`: the same as a loop that changes z before it scales it,
with an unmodified pipeline, at every step including the first.

    scheduler.scale_model_input   tells z and how it is scaled; flow-matching pipelines never call it and hand z itself
    denoiser pre-hook             computes z', puts it into the call
    scheduler.step                is given z' as its sample

With `update="velocity"` z stays and the gradient goes to the prediction of that call instead.

A scheduler that evaluates the denoiser several times a step (Heun, KDPM2, DPM singlestep, PNDM's warm-up) starts each
step from the latents of its first evaluation; only those are moved, and the later evaluations are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.core.guidance import combine
from attnctl.core.hosts.arguments import main_input, main_name, take_rows
from attnctl.core.hosts.outputs import main_output, with_main_output
from attnctl.core.hosts.prompt import PromptCall
from attnctl.core.hosts.words import Concept, find_words, weights
from attnctl.core.passes import ControlledDenoiser
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors.latent.guidance import LatentGuidance, transformed
from attnctl.processors.latent.reader import MapReader, exit_refusal, prepared, until_done, usable

__all__ = ["LatentEngine", "later_evaluation"]

Scale = Callable[[Tensor], Tensor]


def later_evaluation(scheduler: Any) -> bool:
    """Tell whether the scheduler's next step only completes one that began with an earlier evaluation."""
    if getattr(scheduler, "state_in_first_order", True) is False:  # Heun, KDPM2, DPM SDE
        return True
    orders, index = getattr(scheduler, "order_list", None), getattr(scheduler, "step_index", None)
    if orders is not None and index is not None:  # DPM singlestep
        return int(orders[index]) != 1
    counter = getattr(scheduler, "counter", None)
    if counter is None or not hasattr(scheduler, "prk_timesteps"):
        return False
    if scheduler.config.skip_prk_steps:  # PNDM
        return bool(counter == 1)
    return bool(counter < len(scheduler.prk_timesteps) and counter % 4 != 0)


class LatentEngine:
    """The latents of one pipeline's current step: what they were, what they become.

    Attributes:
        updates: Gradient steps taken since the controls were attached.
        forwards: Guidance forwards run for them.
    """

    def __init__(self, pipe: Any, controls: Mapping[int, LatentGuidance]) -> None:
        if pipe is None:
            raise ConfigError(
                f"{next(iter(controls.values())).describe()} moves the latents between scheduler steps, which a bare "
                "model has not: pass the pipeline to control()."
            )
        self.pipe, self.controls = pipe, dict(controls)
        self.updates = self.forwards = 0
        self.new_run()

    def new_run(self) -> None:
        """Forget what the last run left."""
        self.memory: dict[int, dict[str, Any]] = {i: {} for i in self.controls}
        self.shares: dict[Any, Tensor] = {}
        self.end_step()

    def end_step(self) -> None:
        """Forget the latents of the last step."""
        self._raw: Tensor | None = None
        self._scale: Scale | None = None
        self._moved: tuple[Tensor, Tensor] | None = None
        self._push: Tensor | None = None
        self._read = False

    def scaled(self, sample: Tensor, scale: Scale) -> None:
        """Note latents that the pipeline scales, and how."""
        self._raw, self._scale = sample, scale

    def stepped(self, sample: Any) -> Any:
        """Give the scheduler the moved latents."""
        moved = self._moved
        self.end_step()
        if moved is None or not isinstance(sample, Tensor):
            return sample
        old, new = moved
        if sample.shape != old.shape:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} hands its scheduler latents {tuple(sample.shape)} and its denoiser "
                f"{tuple(old.shape)}: attnctl cannot move them."
            )
        if sample.dtype == old.dtype and torch.equal(sample, old):
            return new
        return sample + (new - old).to(sample)

    def before(self, w: ControlledDenoiser, call: PromptCall | None) -> dict[str, Any] | None:
        """Move the latents before the denoiser runs; return the changed arguments, or None for no change."""
        state = w.state
        if not self._read:
            self._read = True
            active = [(i, c) for i, c in self.controls.items() if c.acts(state)]
            if state.rows.role in ("all", "both") and active and not later_evaluation(self.pipe.scheduler):
                self._move(w, call, active)
        return None if self._moved is None else self._with_latents(w, self._moved[1])

    def _move(
        self, w: ControlledDenoiser, call: PromptCall | None, active: Sequence[tuple[int, LatentGuidance]]
    ) -> None:
        rows, main = w.state.rows, main_input(w.state.bound)
        if not isinstance(main, Tensor):
            raise UnsupportedModelError(f"{w.family.name} models take latents as a list, which attnctl cannot move.")
        raw = main if self._raw is None else self._raw
        old = raw[rows.cond] if raw.shape[0] == rows.total else raw
        if old.shape[0] != rows.prompts:
            raise UnsupportedModelError(f"{raw.shape[0]} latents were scaled for {rows.total} rows of the denoiser.")
        new = old
        for i, control in active:
            update = _Update(self, w, i, control, self._shares(w, control, call))
            if control.update == "velocity":
                push = update.push(new) * self._noise_level(w, control) ** 2
                self._push = push if self._push is None else self._push + push
            else:
                new = update.run(new)
        if new is not old:
            self._moved = old, new

    def _noise_level(self, w: ControlledDenoiser, c: LatentGuidance) -> Tensor:
        """Return the scheduler's sigma of the current step, in [0, 1]."""
        scheduler: Any = self.pipe.scheduler
        config, name = scheduler.config, type(scheduler).__name__
        flows = "FlowMatch" in name or bool(config.get("use_flow_sigmas"))
        if not flows or not isinstance(getattr(scheduler, "sigmas", None), Tensor):
            raise UnsupportedModelError(
                f'{c.describe()}: update="velocity" changes the velocity of flow matching (SD3, FLUX and their kin), '
                f'but {name} steps otherwise. Use update="latents".'
            )
        timesteps = scheduler.timesteps
        first = len(timesteps) - (w.state.steps or len(timesteps))  # image to image starts late in the list
        return scheduler.sigmas[min(first + w.state.step, len(timesteps) - 1)].to(torch.float32)

    def pushed(self, w: ControlledDenoiser, output: Any) -> Any:
        """Add what `update="velocity"` asks for to a prediction; None where that is nothing."""
        push, rows = self._push, w.state.rows
        if push is None or rows.role == "extra":
            return None
        pred = main_output(output)
        if not isinstance(pred, Tensor) or pred.shape[1:] != push.shape[1:]:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} predicts {tuple(getattr(pred, 'shape', ()))} for latents "
                f"{tuple(push.shape)}: attnctl cannot change that velocity."
            )
        return with_main_output(output, combine(pred, push.to(pred.device), rows, None))

    def _with_latents(self, w: ControlledDenoiser, new: Tensor) -> dict[str, Any]:
        rows, bound = w.state.rows, dict(w.state.bound)
        name = main_name(bound)
        latents = torch.cat([new, new]) if rows.role == "both" else new
        bound[name] = self.input(latents, bound[name])
        return bound

    def input(self, latents: Tensor, template: Tensor) -> Tensor:
        """Write latents as the denoiser's input: scaled, cast, and with the channels that the pipeline adds."""
        x = latents if self._scale is None else self._scale(latents)
        x = x.to(template.dtype)
        if x.shape == template.shape:
            return x
        same = x.shape[0] == template.shape[0] and x.shape[2:] == template.shape[2:]
        if x.ndim != template.ndim or not same or x.shape[1] > template.shape[1]:
            raise UnsupportedModelError(
                f"{type(self.pipe).__name__} gives its denoiser {tuple(template.shape)} for latents {tuple(x.shape)}: "
                "attnctl cannot move latents through that."
            )
        return torch.cat([x, template[:, x.shape[1] :]], 1)  # inpainting masks and images stand behind the latents

    def unscaled(self, grad: Tensor, z: Tensor) -> Tensor:
        """Turn a gradient by the denoiser's input into one by the latents z."""
        if grad.ndim > 1 and grad.shape != z.shape:
            grad = grad[:, : z.shape[1]]
        grad = grad.to(torch.promote_types(grad.dtype, z.dtype))
        return grad if self._scale is None else self._scale(grad)

    def _shares(self, w: ControlledDenoiser, c: LatentGuidance, call: PromptCall | None) -> Callable[[int], Tensor]:
        def shares(n_text: int) -> Tensor:
            key = (c.concepts, c.prompt, n_text)
            if key not in self.shares:
                self.shares[key] = torch.stack([weights(found, n_text) for found in self._find(w, c, call)])
            return self.shares[key]

        return shares

    def _find(self, w: ControlledDenoiser, c: LatentGuidance, call: PromptCall | None) -> list[Any]:
        """Find a control's concepts in the prompt of each sample."""
        n = w.state.rows.prompts
        if c.prompt is not None:
            prompts = [c.prompt] if isinstance(c.prompt, str) else list(c.prompt)
            texts: list[dict[str, Any]] = [{"prompt": p} for p in prompts]
        elif call is not None:
            seconds, thirds = (x or (None,) * len(call.prompts) for x in (call.prompts_2, call.prompts_3))
            length = call.max_sequence_length
            texts = [
                {"prompt": p, "prompt_2": p2, "prompt_3": p3, "max_sequence_length": length}
                for p, p2, p3 in zip(call.prompts, seconds, thirds, strict=True)
            ]
        elif all(isinstance(word, int) for part in ((c.concepts,) if not c.nested else c.concepts) for word in part):
            texts = [{"prompt": None}] * (len(c.concepts) if c.nested else 1)
        else:
            raise ConfigError(
                f"{c.describe()}: the pipeline was called without a prompt that attnctl could read (embeddings, "
                "perhaps), so words cannot be found. Give the control prompt='...', or token places as concepts."
            )
        if n % len(texts):
            raise ConfigError(f"{c.describe()}: {len(texts)} prompts do not fit {n} images.")
        if c.nested and len(c.concepts) != len(texts):
            raise ConfigError(f"{c.describe()}: concepts for {len(c.concepts)} prompts, but there are {len(texts)}.")
        words = c.concepts if c.nested else (c.concepts,) * len(texts)
        found = [self._words(own, text) for own, text in zip(words, texts, strict=True)]
        return [f for f in found for _ in range(n // len(texts))]

    def _words(self, words: Sequence[Any], text: Mapping[str, Any]) -> tuple[Concept, ...]:
        if text["prompt"] is None:
            return tuple(Concept(str(place), (int(place),)) for place in words)
        rest = {name: value for name, value in text.items() if name != "prompt"}
        return find_words(self.pipe, text["prompt"], words, **rest)


class _Update:
    """The gradient steps of one control before one denoising step."""

    def __init__(
        self,
        engine: LatentEngine,
        w: ControlledDenoiser,
        index: int,
        control: LatentGuidance,
        shares: Callable[[int], Tensor],
    ) -> None:
        self.engine, self.w, self.control, self.shares = engine, w, control, shares
        self.sites, self.memory = w.resolved[index], engine.memory[index]
        rows, state = w.state.rows, w.state
        frames = state.grid[0] if rows.role == "both" and state.grid else 1
        self.bound = take_rows(state.bound, rows.cond, rows.total, frames)

    def run(self, z: Tensor) -> Tensor:
        """Return the moved latents."""
        c, state = self.control, self.w.state
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
        c.snapshot(first, self.memory)
        return z

    def push(self, z: Tensor) -> Tensor:
        """Return alpha times the gradient at z, and leave z alone."""
        c = self.control
        _, grad, maps = self.gradient(z)
        self.engine.updates += 1
        c.snapshot(maps, self.memory)
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return c.alpha(self.w.state) * transformed(wide, c.grad_transform)

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
        c, w, state = self.control, self.w, self.w.state
        early = c.early_exit and exit_refusal(w.module, self.bound) is None
        every = c.map_norm == "ae"
        reader = MapReader([s.name for s in self.sites], _one_hot if every else self.shares, early, c.looks)
        name, template = main_name(self.bound), main_input(self.bound)
        scaled = self.engine.input(z, template)
        self.engine.forwards += 1
        with torch.inference_mode(False), torch.enable_grad(), prepared(w.module, c.checkpoint, w.snapshot):
            kwargs = usable(self.bound)
            # Scaling is a factor: its own adjoint, applied to the gradient below.
            kwargs[name] = leaf = scaled.detach().clone().requires_grad_()
            with until_done(reader):
                w.extra_pass("latents", kwargs, {site.name: reader for site in self.sites})
            reader.reading = False
            attention = reader.maps()
            tokens = self.shares(attention.shape[1]) if every else attention.new_empty(0)
            folded = attention.shape[0] // z.shape[0]
            maps = c.concept_maps(attention, tokens.repeat_interleave(folded, 0) if every else tokens)
            loss = self.loss(maps, reader)
            # Small gradients would vanish in half precision; a power of two changes nothing else.
            boost = 1024.0 if leaf.dtype == torch.float16 else 1.0
            (grad,) = torch.autograd.grad(loss.sum() * boost, leaf)
        loss = loss.detach().unflatten(0, (z.shape[0], -1)).mean(1)
        grad = self.engine.unscaled(grad, z) / boost
        if not bool(torch.isfinite(loss).all() & torch.isfinite(grad).all()):
            raise UnsupportedModelError(
                f"{c.describe()}: the loss of step {state.step} or its gradient is not a finite number. The attention "
                f"maps hold NaN or overflow in {leaf.dtype}: run the model in float32 or bfloat16, or lower step_size."
            )
        return loss, grad, maps.detach()

    def loss(self, maps: Tensor, reader: MapReader) -> Tensor:
        """Compute each sample's loss, with the image's own attention where the control asks for it."""
        if not self.control.looks:
            return self.control.loss(maps, self.memory)
        self.memory["looks"] = reader.attention(maps.shape[0])
        try:
            return self.control.loss(maps, self.memory)
        finally:
            del self.memory["looks"]  # it holds the graph


def _one_hot(n: int) -> Tensor:
    return torch.eye(n)[None]
