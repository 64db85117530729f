"""FateZero: edit a video (or an image) with a text prompt, its frames riding in the batch of a 2D UNet.

"FateZero: Fusing Attentions for Zero-shot Text-based Video Editing", arXiv 2303.09535. The source is taken back to
noise by DDIM with its own prompt; the edit starts there with the target prompt, and at step k takes attention from the
inversion step T-1-k, which has the same timestep:

    self     M A_e + (1 - M) A_s, times the edit's values;  M = attention of the source to the blend words > threshold,
             or 0 everywhere without blend words; in the steps of `self_replace`
    cross    columns of A_s for the words that both prompts share, in the steps of `cross_replace`

Only the prompt's rows change. Self-attention may look at the keys and values of other frames (`keys`), in all rows.
Layers are chosen by their downsampling, not by their number of queries, and grids are carried along, so that any size
and any UNet of Stable Diffusion works. Where the released code differs by accident, a field says "official".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from attnctl.align import window_of
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.fusion import Keys, blend_latents, blend_mask, fold_values, frame_indices, gather_frames
from attnctl.intercept import AttnCall, Proceed, Wrapper
from attnctl.kernels import columns
from attnctl.processors.base import Attached, Passes
from attnctl.processors.wordedit import WordEdit
from attnctl.sites import Site, find_sites, image_level_grid
from attnctl.sources import Inversion, SourceAttention, SourceStore, StoreMode, token_weights

__all__ = ["FateZero", "LatentAlign"]

LatentAlign = Literal["aligned", "official"]


@dataclass(frozen=True, kw_only=True)
class FateZero(WordEdit):
    """Edit what was inverted, keeping its attention (arXiv 2303.09535).

    `attnctl.pipelines.edit_video` does the whole job. By hand: `attnctl.pipelines.invert(pipe, frames, control=...)`
    returns an `Inversion`; attach `dataclasses.replace(control, inversion=inversion)` and run the pipeline with
    `latents=inversion.noise`, one prompt a frame.

    Attributes:
        keys: Frames whose keys and values self-attention sees: "mid", "first", "last", "previous", a whole number to
            look back (-1) or ahead (1), or a list of these; "self" for each frame its own.
        keys_factor: Downsampling from which on `keys` holds; None for the layers that are edited.
        store: How the source's attention is had: "recompute", "qk" or "maps" (see `attnctl.sources`).
        blend_attention: Whether self-attention is fused by the blend mask.
        blend_latents: Whether the latents outside the blend mask are the source's.
        blend_window: Window of the run in which they are.
        latent_align: Which of the source's latents they take: "aligned" of the same noise level; "official" of one
            level noisier, as released.
        inversion: What is edited.

    Example:
        >>> FateZero(source="a red car", target="a blue car", blend_words=["car"]).describe()
        "FateZero(source='a red car', target='a blue car', blend_words=['car'])"
    """

    keys: Keys = "mid"
    keys_factor: int | None = None
    store: StoreMode = "recompute"
    blend_attention: bool = True
    blend_latents: bool = False
    blend_window: tuple[float, float] = (0.2, 0.8)
    latent_align: LatentAlign = "aligned"
    inversion: Inversion | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("store", StoreMode)
        self._check_choice("latent_align", LatentAlign)
        window_of(self.blend_window, f"{self._label}: blend_window")
        frame_indices(self.keys, 2)
        if self.blend_latents and self.blend_words is None:
            raise ConfigError(f"{self._label}: blend_latents needs blend_words, which say where the edit is.")

    def describe(self) -> str:
        from dataclasses import replace

        return super().describe() if self.inversion is None else replace(self, inversion=None).describe()

    def resolve(self, sites: Sequence[Site], family: Any) -> tuple[Site, ...]:
        names = {s.name for s in (*super().resolve(sites, family), *self.keyed(sites, family))}
        return tuple(s for s in sites if s.name in names)

    def keyed(self, sites: Sequence[Site], family: Any) -> tuple[Site, ...]:
        """Return the self-attention sites at which `keys` holds."""
        from attnctl.processors.wordedit import site_factors

        if not frame_indices(self.keys, 2)[0]:
            return ()
        if self.keys_factor is None:
            return tuple(s for s in self.groups(sites, family)[0] if s.kind == "self")
        factors = site_factors(sites)
        return tuple(s for s in sites if s.kind == "self" and factors[s.name] >= self.keys_factor)

    def needed(self, step: int, steps: int, follow: Tensor) -> tuple[bool, bool, bool]:
        """Tell what an editing step takes from the source: self-attention, cross-attention, the blend mask."""
        if not self.in_window_at(step, steps):
            return False, False, False
        fused = step in self.self_window(steps)
        mask = self.blend_words is not None and ((fused and self.blend_attention) or self.blends_at(step, steps))
        return fused, bool(follow[step].any()), mask

    def blends_at(self, step: int, steps: int) -> bool:
        """Tell whether latents are blended after an editing step."""
        start, end = self.blend_window
        return self.blend_latents and int(start * steps) < step + 1 < int(end * steps)

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> Attached:
        return Editing(self, denoiser, pipe)


class SourcePass:
    """What both passes over a source share, the inversion's and the recomputed one: keys, and writing attention down.

    Args:
        control: The edit.
        denoiser: The model.
        pipe: Its pipeline.
    """

    def __init__(self, control: FateZero, denoiser: torch.nn.Module, pipe: Any) -> None:
        from attnctl.families import family_of

        self.control = control
        self.plan = control.plan(pipe)
        sites, family = find_sites(denoiser), family_of(denoiser)
        self.fused, self.masks = control.groups(sites, family)
        self.keyed = frozenset(s.name for s in control.keyed(sites, family))
        self.names = {s.name: s for s in control.resolve(sites, family)}
        self.crossing = frozenset(s.name for s in self.fused if s.kind == "cross")
        self.masking = frozenset(s.name for s in self.masks)
        self.indices: list[list[int]] = []

    def needed(self, step: int, steps: int, follow: Tensor) -> list[Site]:
        """List the sites whose source attention an editing step needs, in execution order."""
        fused, cross, mask = self.control.needed(step, steps, follow)
        wanted = {s.name for s in self.fused if (s.kind == "self" and fused) or (s.kind == "cross" and cross)}
        wanted |= {s.name for s in self.masks} if mask else set()
        return [s for s in self.names.values() if s.name in wanted]

    def indices_at(self, site: Site) -> list[list[int]]:
        """Return the rows that each row's self-attention looks at, at a site."""
        return self.indices if site.name in self.keyed else [[] for _ in self.indices]

    def keyed_call(self, call: AttnCall) -> AttnCall:
        """Return a self-attention call whose keys and values are those of the frames looked at."""
        if call.site.name not in self.keyed:
            return call
        if call.mask is not None:
            raise UnsupportedModelError(f"{call.site.name} masks its self-attention: other frames' keys have no mask.")
        return call.with_(k=gather_frames(call.k, self.indices), v=gather_frames(call.v, self.indices))

    def writer(self, step: int, to: SourceAttention | None) -> Wrapper:
        """Return the wrapper of a pass over the source that writes its attention down."""

        def write(call: AttnCall, proceed: Proceed) -> Tensor:
            if call.index > 0:
                return proceed(call)
            if to is not None:
                to.write(step, call, self.indices_at(call.site))
            return proceed(self.keyed_call(call) if call.site.kind == "self" else call)

        return write


class Editing(Attached):
    """FateZero at work on one denoiser."""

    def __init__(self, control: FateZero, denoiser: torch.nn.Module, pipe: Any) -> None:
        if control.inversion is None:
            raise ConfigError(
                "FateZero has no inversion to edit. Call attnctl.pipelines.edit_video, which inverts and edits; or "
                "attnctl.pipelines.invert, and attach dataclasses.replace(control, inversion=...)."
            )
        if control.source == control.target and not control.equalizer:
            warnings.warn(
                f"FateZero: source and target are both {control.target!r}: the edit reconstructs its source.",
                stacklevel=2,
            )
        self.control, self.inversion = control, control.inversion
        self.source = SourcePass(control, denoiser, pipe)
        self.source.indices = self.inversion.indices
        self.changes_latents = control.blend_latents
        self.steps = self.inversion.steps
        self.follow = self.source.plan.follow(self.steps)
        kept = self.inversion.store
        self.kept = SourceStore("recompute") if kept is None or control.store == "recompute" else kept
        self.attention = SourceAttention(self.kept, "maps" if control.store == "maps" else "qk")
        self._check()
        self.begin_run()

    def _check(self) -> None:
        """Refuse an inversion that was made for another edit."""
        control, inversion = self.control, self.inversion
        told = inversion.settings
        if inversion.prompt != control.source:
            raise ConfigError(
                f"FateZero: the inversion was made with the prompt {inversion.prompt!r}, not with "
                f"source={control.source!r}. Invert again, or give that source."
            )
        if inversion.keys != control.keys or told.get("keyed") != self.source.keyed:
            raise ConfigError(
                f"FateZero: the inversion looked at frames {inversion.keys!r}, the edit at {control.keys!r} (or at "
                "other layers). Invert with the control that edits."
            )
        have = None if inversion.store is None else inversion.store.mode
        if control.store != "recompute" and have != control.store:
            raise ConfigError(
                f"FateZero: store={control.store!r}, but the inversion kept {have or 'latents only'}. Invert with the "
                "control that edits."
            )

    def begin_run(self) -> None:
        self.checked = False
        self.fused: frozenset[str] = frozenset()
        self.crossing = self.whole = False
        self.w: Tensor | None = None
        self.step = 0
        self.mask_columns: Tensor | None = None
        self.grid: tuple[int, int, int] | None = None
        self.masks: dict[int, Tensor] = {}
        self.summed: Tensor | None = None

    def before(self, passes: Passes) -> None:
        state, k = passes.state, passes.state.step
        if not self.checked:
            self._check_run(passes)
        self.step = s = self.steps - 1 - k
        fused, cross, mask = self.control.needed(k, self.steps, self.follow)
        sites = self.source.needed(k, self.steps, self.follow)
        device = state.bound["sample"].device
        if self.control.store == "recompute":
            self.kept.forget()
            if sites:
                wrappers = {n: self.source.writer(s, None) for n in self.source.keyed}
                wrappers |= {site.name: self.source.writer(s, self.attention) for site in sites}
                behind = {n for n in wrappers if self.source.names[n].depth > sites[-1].depth}
                inputs = {**self.inversion.inputs, "timestep": state.bound["timestep"]}
                inputs["sample"] = self.inversion.latents[s].to(device)
                wrappers = {n: wrap for n, wrap in wrappers.items() if n not in behind}
                passes.side_pass("source", inputs, wrappers, last=sites[-1])
        self.fused = frozenset(site.name for site in sites if site.kind == "self") if fused else frozenset()
        self.crossing = cross
        self.w = self.follow[k].to(device) if cross else None
        self.whole = cross and bool((self.follow[k] == 1).all()) and not bool(self.source.plan.how.new.any())
        self.grid, self.masks = state.grid, {}
        self.mask_columns = self._columns(s, device) if mask else None

    def _check_run(self, passes: Passes) -> None:
        """Refuse a run that does not fit the inversion; once a run, since it may wait for the device."""
        state, inversion = passes.state, self.inversion
        if state.steps != self.steps:
            raise ConfigError(
                f"FateZero: the source was inverted in {self.steps} steps, and this run has {state.steps}. Give "
                f"num_inference_steps={self.steps}, or invert again in {state.steps} steps."
            )
        timesteps = getattr(getattr(passes.pipe, "scheduler", None), "timesteps", None)
        told = None if timesteps is None else [int(t) for t in timesteps.tolist()]
        if told is not None and told[::-1] != list(inversion.timesteps):
            raise ConfigError(
                f"FateZero: {type(passes.pipe.scheduler).__name__} runs through timesteps {told[:3]}..., the inversion "
                f"through {list(inversion.timesteps[::-1][:3])}...: use the DDIMScheduler that inverted it "
                "(attnctl.pipelines.ddim_of(pipe.scheduler))."
            )
        rows, shape = state.rows, state.bound["sample"].shape[1:]
        if rows.role not in ("both", "all") or rows.prompts != inversion.frames or shape != inversion.noise.shape[1:]:
            raise ConfigError(
                f"FateZero: the inversion has {inversion.frames} frames of latents {tuple(inversion.noise.shape[1:])}, "
                f"and the denoiser was called with {rows.prompts} prompt rows of {tuple(shape)}. Give one prompt a "
                "frame and latents=inversion.noise."
            )
        self.how = self.source.plan.how.to(state.bound["sample"])
        self.checked = True

    # Masks -------------------------------------------------------------------------------------------------------

    def _columns(self, step: int, device: torch.device) -> Tensor:
        """Average the source's attention to the blend words over the mask layers and their heads, [f, N]."""
        tokens = self.source.plan.blend
        parts = [self.attention.columns(step, site.name, tokens, device) for site in self.source.masks]
        return torch.stack(parts).mean(0)

    def _mask(self, columns_: Tensor, size: tuple[int, int]) -> Tensor:
        assert self.grid is not None
        level = image_level_grid(self.grid, columns_.shape[1])
        assert level is not None
        return blend_mask(columns_, level[1:], size, self.control.blend_threshold)

    def _mask_at(self, tokens: int) -> Tensor | None:
        """Return M for a layer of so many tokens, [f, tokens], or None where the source rules everywhere."""
        if self.mask_columns is None or not self.control.blend_attention:
            return None
        if tokens not in self.masks:
            level = None if self.grid is None else image_level_grid(self.grid, tokens)
            if level is None:
                raise UnsupportedModelError(f"FateZero cannot tell the grid of {tokens} tokens.")
            self.masks[tokens] = self._mask(self.mask_columns, level[1:]).flatten(1)
        return self.masks[tokens]

    # Attention ---------------------------------------------------------------------------------------------------

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        if call.index > 0:  # image prompts have no source
            return proceed(call)
        if call.site.kind == "cross":
            return self._cross(call, proceed)
        call = self.source.keyed_call(call)
        return self._self(call, proceed) if call.site.name in self.fused else proceed(call)

    def _self(self, call: AttnCall, proceed: Proceed) -> Tensor:
        cond = call.state.rows.cond
        mask = self._mask_at(call.q.shape[2])
        indices = self.source.indices_at(call.site)
        if mask is None and self.attention.mode == "qk":
            q, k = self.attention.queries_keys(self.step, call, indices)
            return proceed(call.with_(q=_put(call.q, cond, q), k=_put(call.k, cond, k)))
        out = proceed(call)
        source = self.attention.attend(self.step, call, call.v[cond], indices, proceed)
        kept = source if mask is None else torch.where(mask[:, None, :, None], out[cond], source)
        return _put(out, cond, kept)

    def _cross(self, call: AttnCall, proceed: Proceed) -> Tensor:
        cond = call.state.rows.cond
        if self.control.blend_latents:
            self._sum_target(call)
        if not self.crossing or call.site.name not in self.source.crossing:
            return proceed(call)
        if call.mask is not None:
            raise UnsupportedModelError(f"{call.site.name} masks its text, which differs between source and target.")
        assert self.w is not None
        if call.k.shape[2] != self.source.plan.length:
            raise UnsupportedModelError(
                f"{call.site.name} sees {call.k.shape[2]} text tokens, and the pipeline's tokenizer makes "
                f"{self.source.plan.length}: prompts in chunks, or embeddings of another length, cannot be edited."
            )
        from_source, from_edit = fold_values(call.v[cond], self.how, self.w)
        if self.whole and self.attention.mode == "qk":
            q, k = self.attention.queries_keys(self.step, call, [])
            return proceed(
                call.with_(q=_put(call.q, cond, q), k=_put(call.k, cond, k), v=_put(call.v, cond, from_source))
            )
        out = proceed(call.with_(v=_put(call.v, cond, from_edit)))
        return _put(out, cond, out[cond] + self.attention.attend(self.step, call, from_source, [], proceed))

    # Latents -----------------------------------------------------------------------------------------------------

    def _sum_target(self, call: AttnCall) -> None:
        """Add the edit's own attention to the target's blend words, at the mask layers."""
        tokens = self.source.plan.blend_target
        if not tokens or call.site.name not in self.source.masking or call.state.phase != "base":
            return
        cond = call.state.rows.cond
        weights = token_weights(tokens, call.k)
        found = columns(call.q[cond], call.k[cond], weights, scale=call.scale)[..., 0].mean(1)
        self.summed = found if self.summed is None else self.summed + found

    def stepped(self, step: int, latents: Tensor) -> Tensor:
        if not self.control.blends_at(step, self.steps) or self.mask_columns is None:
            return latents
        size = (int(latents.shape[-2]), int(latents.shape[-1]))
        mask = self._mask(self.mask_columns, size)
        if self.summed is not None:
            mask = mask | self._mask(self.summed, size)
        noisier = 1 if self.control.latent_align == "official" else 0
        return blend_latents(latents, self.inversion.latents[self.step + noisier].to(latents), mask)


def _put(x: Tensor, rows: slice, part: Tensor) -> Tensor:
    """Return x with some rows replaced."""
    part = part.to(x.dtype)
    if rows == slice(0, x.shape[0]):
        return part
    return torch.cat([x[: rows.start], part, x[rows.stop :]])
