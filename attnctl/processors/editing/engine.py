"""FateZero at work on one denoiser: the passes over the source, and the edit's attention and latents.

`attnctl.processors.editing.fatezero` says what is computed; here stands how it is done beside an unmodified pipeline.
With "recompute" the source runs once more ahead of each step of the edit, on the stored latents of that timestep,
and only as far as the last layer that is asked for; its queries and keys live until the step ends.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.call import AttnCall, CallState, Proceed, Wrapper, is_last
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites, stage_grid
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.sites import Grid, Site
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.processors.editing.fusion import (
    Split,
    blend_latents,
    blend_mask,
    fold_values,
    gather_frames,
    self_fuse,
    take_queries,
)
from attnctl.processors.editing.source import SourceAttention, SourceStore, token_weights
from attnctl.processors.editing.source_edit import SourceEdit

__all__ = ["Editing", "SourcePass"]


class SourcePass:
    """What both passes over a source share, the inversion's and the recomputed one: keys, and writing attention down.

    Args:
        control: The edit.
        denoiser: The model.
        pipe: Its pipeline.
    """

    def __init__(self, control: SourceEdit, denoiser: torch.nn.Module, pipe: Any) -> None:
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


class Editing(LiveControl):
    """FateZero at work on one denoiser."""

    def __init__(self, control: SourceEdit, denoiser: torch.nn.Module, pipe: Any) -> None:
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
        self.changes_latents = control.blend_latents or self.inversion.region is not None
        self.steps = self.inversion.steps
        self.follow = self.source.plan.follow(self.steps)
        store = self.inversion.store
        self.kept = SourceStore("recompute") if store is None or control.store == "recompute" else store
        self.attention = SourceAttention(self.kept, "maps" if control.store == "maps" else "qk")
        self._check()
        self.begin_run()

    def _check(self) -> None:
        """Refuse an inversion that was made for another edit."""
        control, inversion = self.control, self.inversion
        settings = inversion.settings
        if inversion.prompt != control.source:
            raise ConfigError(
                f"FateZero: the inversion was made with the prompt {inversion.prompt!r}, not with "
                f"source={control.source!r}. Invert again, or give that source."
            )
        if inversion.keys != control.keys or settings.get("keyed") != self.source.keyed:
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
        self.mask_grid: Grid = (1, 1, 1)
        self.masks: dict[Grid, Tensor] = {}
        self.grids: set[Grid] = set()
        """Grids of the layers that the source and the edit share by a mask."""
        self.splits: dict[int, Split] = {}
        self.summed: Tensor | None = None

    def before_call(self, passes: LiveDenoiser) -> None:
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
                passes.extra_pass("source", inputs, wrappers, last=sites[-1])
        self.fused = frozenset(site.name for site in sites if site.kind == "self") if fused else frozenset()
        self.crossing = cross
        self.w = self.weights[k] if cross else None
        self.whole = cross and bool((self.follow[k] == 1).all()) and not bool(self.source.plan.how.new.any())
        self.masks, self.splits = {}, {}
        self.mask_columns = None
        if mask:
            self.mask_columns = self._columns(s, device)
            self.mask_grid = self._grid_of_masks(state, self.mask_columns.shape[1])

    def _check_run(self, passes: LiveDenoiser) -> None:
        """Refuse a run that does not fit the inversion; once a run, since it may wait for the device."""
        state, inversion = passes.state, self.inversion
        if state.steps != self.steps:
            raise ConfigError(
                f"FateZero: the source was inverted in {self.steps} steps, and this run has {state.steps}. Give "
                f"num_inference_steps={self.steps}, or invert again in {state.steps} steps."
            )
        timesteps = getattr(getattr(passes.pipe, "scheduler", None), "timesteps", None)
        times = None if timesteps is None else [int(t) for t in timesteps.tolist()]
        if times is not None and times[::-1] != list(inversion.timesteps):
            raise ConfigError(
                f"FateZero: {type(passes.pipe.scheduler).__name__} runs through timesteps {times[:3]}..., the "
                f"inversion through {list(inversion.timesteps[::-1][:3])}...: use the DDIMScheduler that inverted it "
                "(attnctl.pipelines.ddim_of(pipe.scheduler))."
            )
        rows, shape = state.rows, state.bound["sample"].shape[1:]
        if rows.role not in ("both", "all") or rows.prompts != inversion.frames or shape != inversion.noise.shape[1:]:
            raise ConfigError(
                f"FateZero: the inversion has {inversion.frames} frames of latents {tuple(inversion.noise.shape[1:])}, "
                f"and the denoiser was called with {rows.prompts} prompt rows of {tuple(shape)}. Give one prompt a "
                "frame and latents=inversion.noise."
            )
        prompts = None if state.prompts is None else set(state.prompts.prompts)
        if prompts not in (None, {self.control.target}):
            raise ConfigError(
                f"FateZero: the run's prompts are {sorted(prompts or ())}, the control's target is "
                f"{self.control.target!r}: the tokens would not correspond. Give that prompt for every frame."
            )
        self.how = self.source.plan.how.to(state.bound["sample"])
        self.weights = self.follow.to(state.bound["sample"].device)
        self.checked = True

    def noise_added(self) -> None:
        raise ConfigError(
            "FateZero: the scheduler adds noise at its steps (eta, or a stochastic sampler), which the inversion of "
            "the source has not. Use the DDIMScheduler that inverted it (attnctl.pipelines.ddim_of) with eta=0."
        )

    # Masks -------------------------------------------------------------------------------------------------------

    def _columns(self, step: int, device: torch.device) -> Tensor:
        """Average the source's attention to the blend words over the mask layers and their heads, [f, N]."""
        tokens = self.source.plan.blend
        parts = [self.attention.columns(step, site.name, tokens, device) for site in self.source.masks]
        return torch.stack(parts).mean(0)

    def _grid_of_masks(self, state: CallState, tokens: int) -> Grid:
        name = self.source.masks[0].name
        grid = None if state.grid is None else stage_grid(state.denoiser, name, state.grid, tokens)
        if grid is None:
            raise UnsupportedModelError(f"{name}: nothing tells how its {tokens} tokens lie on the image.")
        return grid

    def _mask(self, columns_: Tensor, size: tuple[int, int]) -> Tensor:
        return blend_mask(columns_, self.mask_grid[1:], size, self.control.blend_threshold)

    def _mask_at(self, call: AttnCall) -> Tensor | None:
        """Return M for a layer, [f, tokens], or None where the source rules everywhere."""
        region = self.inversion.region
        if region is None and (self.mask_columns is None or not self.control.blend_attention):
            return None
        _, grid = call.on_image()
        self.grids.add(grid)
        return self._mask_on(grid)

    def _mask_on(self, grid: Grid) -> Tensor:
        if grid not in self.masks:
            size = grid[1:]
            if self.inversion.region is not None:
                mask = self._region(size)
            else:
                assert self.mask_columns is not None
                mask = self._mask(self.mask_columns, size)
            self.masks[grid] = mask.to(self.inversion.noise.device).flatten(1)
        return self.masks[grid]

    def _region(self, size: tuple[int, int]) -> Tensor:
        """Return where a given mask allows changes, bool [f, *size]."""
        region = self.inversion.region
        assert region is not None
        return F.interpolate(region[:, None].float(), size=size, mode="area")[:, 0] >= 0.5

    def _split_at(self, tokens: int, mask: Tensor) -> Split:
        """Return how M parts the queries of a layer of so many tokens, found once per step for all layers."""
        if tokens not in self.splits:
            for grid in self.grids:
                self._mask_on(grid)
            masks = {m.shape[1]: m for m in self.masks.values()} | {tokens: mask}
            self.splits = dict(zip(masks, Split.each(list(masks.values())), strict=True))
        return self.splits[tokens]

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
        mask = self._mask_at(call)
        indices = self.source.indices_at(call.site)
        if mask is None and self.attention.mode == "qk":
            q, k = self.attention.queries_keys(self.step, call, indices)
            return proceed(call.with_(q=_put(call.q, cond, q), k=_put(call.k, cond, k)))
        alone = call.mask is None and call.own_kernel and is_last(proceed)
        if mask is None or not alone:  # others may need whole grids
            out = proceed(call)
            source = self.attention.attend(self.step, call, call.v[cond], indices, proceed)
            return _put(out, cond, source if mask is None else torch.where(mask[:, None, :, None], out[cond], source))

        def attend(is_edit: bool, at: Tensor | None) -> Tensor:
            if is_edit:
                return proceed(call.with_(q=take_queries(call.q[cond], at), k=call.k[cond], v=call.v[cond]))
            return self.attention.attend(self.step, call, call.v[cond], indices, proceed, at)

        fused = self_fuse(attend, self._split_at(call.q.shape[2], mask))
        others = (slice(0, cond.start), slice(cond.stop, call.q.shape[0]))
        before, after = (
            [proceed(call.with_(q=call.q[r], k=call.k[r], v=call.v[r]))] if r.stop > r.start else [] for r in others
        )
        return torch.cat([*before, fused.to(call.q.dtype), *after])

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
        share = call.rows(call.state.rows.cond).text_map(token_weights(tokens, call.k))[..., 0].mean(1)
        self.summed = share if self.summed is None else self.summed + share

    def stepped(self, step: int, latents: Tensor) -> Tensor:
        size = (int(latents.shape[-2]), int(latents.shape[-1]))
        if self.inversion.region is not None:  # outside a given mask, nothing changes
            inside = self._region(size).to(latents.device)
            return blend_latents(latents, self.inversion.latents[self.step].to(latents), inside)
        if not self.control.blends_at(step, self.steps) or self.mask_columns is None:
            return latents
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
