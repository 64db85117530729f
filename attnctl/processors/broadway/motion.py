"""What BroadWay does at each attention while it is attached: reference maps, energies, filters, mixing of frames."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed, is_last
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.listing import find_sites, halve, unet_halvings
from attnctl.core.live import LiveControl
from attnctl.core.sites import Site, select
from attnctl.errors import ConflictError, SiteError, UnsupportedModelError
from attnctl.kernels import temporal
from attnctl.kernels.bands import Band, filter_frames, motion_beta
from attnctl.kernels.checks import full, wide_dtype
from attnctl.kernels.temporal import Layer, Reference, guided_maps, output_like, weigh
from attnctl.processors.broadway.fields import MotionFields, decoder_stage, reference_stage

__all__ = ["Motion"]


class Motion(LiveControl):
    """BroadWay on one denoiser.

    Attributes:
        guides: For each guided site, the site whose maps guide it.
        figures: E1, E2 and E2_low of the last call at each guided site [3, prompts], each the sum over positions, heads
            and queries of centred maps, and the gain that followed. Left on the device.
    """

    def __init__(self, control: MotionFields, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> None:
        self.control = control
        self.family = family_of(denoiser)
        self.all_frames = all(s.kind != "temporal" for s in sites)
        self.alpha, beta = control.strength()
        self.betas = _betas(beta, sites)
        config: Any = denoiser.config
        self.levels = len(config.block_out_channels) if self.family.unet else 0
        self.guides: dict[str, str] = {}
        self.figures: dict[str, tuple[Tensor, Tensor]] = {}
        self._masks: dict[Any, Tensor] = {}
        self._bands: dict[int, Band] = {}
        if self.all_frames:
            self._say("attends over all frames at once: BroadWay mixes the frames of its values, which is experimental")
        elif self.alpha > 0 and self.levels:
            self._pair(sites, denoiser)
        elif self.alpha > 0:
            self._say("has no decoder stages to take reference maps from: BroadWay enhances only")
        self.keep = set(self.guides.values())

    def _say(self, what: str) -> None:
        inert = f", and alpha={self.alpha:g} has no effect (alpha=0 says so)" if self.alpha > 0 else ""
        warnings.warn(f"attnctl: {self.family.name} {what}{inert}.", stacklevel=7)

    def _pair(self, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> None:
        """Find the reference of every later decoder site: the module of the same place in the reference stage."""
        stage = reference_stage(find_sites(denoiser), self.control.reference)
        names = {s.name for s in sites}
        for site in sites:
            site_stage = decoder_stage(site.name)
            if site_stage is None or int(site_stage.split(".")[1]) <= int(stage.split(".")[1]):
                continue
            guide = site.name.replace(site_stage, stage, 1)
            if guide not in names:
                raise SiteError(
                    f"BroadWay: {site.name} has no counterpart {guide} to take reference maps from. Select other "
                    "sites, name another reference, or set alpha=0."
                )
            self.guides[site.name] = guide

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        """Compute one attention with more motion."""
        control, state = self.control, call.state
        beta = control.beta_at(self.betas[call.site.name], state)
        if self.all_frames:
            return self._mixed(call, proceed, beta)
        if call.q.shape[1] != call.site.heads:
            raise ConflictError(
                f"BroadWay: {call.site.name} shows {call.q.shape[1]} of its {call.site.heads} heads, because another "
                "control perturbs the others there. Give one of the two other sites."
            )
        band = self._band(call.q.shape[-2])
        layer = self._layer(call)
        name = call.site.name
        weight = None if control.mask is None else self._mask(call, layer)
        if name not in self.guides and name not in self.keep:
            return self._enhanced(call, proceed, band, _spread(beta, weight))
        maps, out = self._maps(call, proceed), output_like(call.v)
        if name in self.keep:
            pieces, _ = guided_maps(call.q, call.k, layer, scale=call.scale, maps=maps, out=out)
            self._store(call, Reference(torch.cat(pieces), layer.rows, layer.grid))
            return weigh(pieces, call.v, band, _spread(beta, weight), out)
        pieces, energies = guided_maps(
            call.q,
            call.k,
            layer,
            self._reference(call),
            scale=call.scale,
            alpha=self.alpha if weight is None else self.alpha * weight,
            interpolation=control.interpolation,
            band=band if control.energy_floor else None,
            maps=maps,
            out=out,
        )
        return weigh(pieces, call.v, band, _spread(self._gain(name, energies, beta, layer), weight), out)

    def _band(self, frames: int) -> Band:
        """Return the bands of so many frames, which keep their filter on the device."""
        if frames not in self._bands:
            self._bands[frames] = Band.of(frames, self.control.tau)
        return self._bands[frames]

    def _gain(self, name: str, energies: Tensor | None, beta: float, layer: Layer) -> float | Tensor:
        """Apply the energy rule; one number, or one for each position."""
        if energies is None:
            return beta
        if self.control.beta_scope == "batch":
            energies = energies.sum(1, keepdim=True)
        gain = motion_beta(energies[0], energies[1], energies[2], beta)
        self.figures[name] = (energies, gain)
        if len(gain) == 1:
            return gain[0]
        # Negative and prompt rows come in the same order, so that both take the gain of their prompt.
        return gain.repeat(layer.rows // len(gain)).repeat_interleave(layer.grid[0] * layer.grid[1])

    def _enhanced(self, call: AttnCall, proceed: Proceed, band: Band, beta: float | Tensor) -> Tensor:
        """Enhance without a map: through the output where only the mean is low, else through the values."""
        if band.whole or (isinstance(beta, float) and beta == 1.0):
            return _in_parts(call, proceed)
        gain = beta.view(-1, 1, 1, 1) if isinstance(beta, Tensor) else beta
        if not band.mean_only:
            return _in_parts(call.with_(v=filter_frames(call.v, band, gain)), proceed)
        out = _in_parts(call, proceed)
        wide = wide_dtype(out.dtype)
        mu = call.v.to(wide).mean(-2, keepdim=True).expand_as(out)
        return torch.lerp(mu, out.to(wide), full(gain, mu)).to(out.dtype)

    def _mixed(self, call: AttnCall, proceed: Proceed, beta: float) -> Tensor:
        """Filter the rows of a full map along the key frames, by mixing the values of each place over the frames."""
        grid, image = call.grid, call.image
        if call.site.kind == "joint" and image is None:
            raise UnsupportedModelError(
                f"BroadWay: video and text tokens cannot be told apart at {call.site.name}, so frames cannot be mixed."
            )
        if grid is None:
            raise UnsupportedModelError(
                f"BroadWay: the frames of the tokens at {call.site.name} are not known. It needs the arguments of the "
                "denoiser's call: use attnctl.control(pipe, ...)."
            )
        band = self._band(grid[0])
        part = call.keys or image or slice(0, call.v.shape[-2])
        gain: float | Tensor = beta
        if self.control.mask is not None:
            places = self._shrunk((grid[1], grid[2]), call.v)
            gain = 1 + (beta - 1) * places.view(1, 1, 1, -1, 1)
        if isinstance(gain, float) and gain == 1.0:
            return proceed(call)
        video = call.v[..., part, :].unflatten(-2, (grid[0], -1))
        mixed = filter_frames(video, band, gain, dim=-3).flatten(-3, -2)
        v = torch.cat([call.v[..., : part.start, :], mixed, call.v[..., part.stop :, :]], dim=-2)
        return proceed(call.with_(v=v))

    def _maps(self, call: AttnCall, proceed: Proceed) -> Tensor | None:
        """Return the maps [P, H, F, F] of whatever other controls make of this attention; None where there are none."""
        if is_last(proceed) and call.mask is None and call.k.shape[1] == call.q.shape[1]:
            return None
        # Any kernel gives its map away where it is asked for its product with the identity.
        eye = torch.eye(call.k.shape[-2], device=call.v.device, dtype=call.v.dtype)
        return _in_parts(call.with_(v=eye.expand(*call.v.shape[:2], -1, -1)), proceed)

    def _layer(self, call: AttnCall) -> Layer:
        """Say how the positions lie, and refuse a batch that is not whole."""
        state, n = call.state, call.q.shape[0]
        size = state.grid if state.bound else None
        rows = state.rows.total
        cond = state.rows.cond if state.rows.prompts else slice(0, rows)
        if size is None:
            if self.alpha > 0 or self.control.mask is not None:
                raise UnsupportedModelError(
                    f"BroadWay: the grid behind {call.site.name} is not known, which self-guidance and masks need. Use "
                    "attnctl.control(pipe, ...) with a listed model family, or alpha=0 without a mask."
                )
            return Layer(1, (1, n), slice(0, 1))
        grid = (size[1], size[2])
        if self.levels:
            grid = halve(*grid, unet_halvings(call.site.name, self.levels) or 0)
        if rows * grid[0] * grid[1] != n:
            raise UnsupportedModelError(
                f"BroadWay: {call.site.name} was called with {n} positions instead of {rows} x {grid[0]} x {grid[1]}. "
                "Split inference (enable_free_noise_split_inference) cuts the batch across its negative and prompt "
                "halves, so the energies of the prompt cannot be told: switch it off."
            )
        return Layer(rows, grid, cond)

    def _store(self, call: AttnCall, maps: Reference) -> None:
        entries = call.state.scratch.setdefault((id(self), call.state.phase, call.site.name), [])
        entries.append((maps, call.state.rows.cond))

    def _reference(self, call: AttnCall) -> Reference:
        """Return the maps that guide this call: of the same window of frames, where there are several."""
        scratch, phase, name = call.state.scratch, call.state.phase, call.site.name
        guide = self.guides[name]
        window = scratch.get((id(self), phase, name), 0)
        scratch[id(self), phase, name] = window + 1
        entries = scratch.get((id(self), phase, guide))
        if entries is not None:
            maps = entries[window % len(entries)][0]
        else:  # a perturbed pass that took the reference stage over from the base pass
            entries = scratch.get((id(self), "base", guide))
            if entries is None:
                raise UnsupportedModelError(
                    f"BroadWay: {guide} did not run before {name}, so there is no reference. A cache that skips blocks "
                    "does that: switch it off, or set alpha=0."
                )
            maps, cond = entries[window % len(entries)]
            maps = maps.take(cond)
        have, heads = maps.maps.shape[1], call.q.shape[1]
        if have != heads and self.control.head_match == "strict":
            raise UnsupportedModelError(
                f"BroadWay: {guide} has {have} heads and {name} {heads}, so their maps cannot be paired "
                "(head_match='strict'). Use head_match='group_mean', or alpha=0."
            )
        return maps.with_heads(heads)

    def _mask(self, call: AttnCall, layer: Layer) -> Tensor:
        """Return the weight of every position, [positions]."""
        return self._shrunk(layer.grid, call.q).repeat(layer.rows)

    def _shrunk(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        key = (grid, like.device, wide_dtype(like.dtype))
        if key not in self._masks:
            mask = torch.tensor(self.control.mask, device=like.device, dtype=key[2])
            self._masks[key] = F.adaptive_avg_pool2d(mask[None, None], grid).flatten()
        return self._masks[key]


def _betas(beta: Any, sites: tuple[Site, ...]) -> dict[str, float | Sequence[float]]:
    """Give every site its gain."""
    if not isinstance(beta, Mapping):
        return {s.name: beta for s in sites}
    betas: dict[str, float | Sequence[float]] = {s.name: 1.0 for s in sites}
    for selector, value in beta.items():
        betas.update((s.name, value) for s in select(sites, selector, what="BroadWay beta"))
    return betas


def _spread(beta: float | Tensor, weight: Tensor | None) -> float | Tensor:
    """Take the gain back towards 1 where the mask is dark."""
    return beta if weight is None else 1 + weight * (beta - 1)


def _in_parts(call: AttnCall, proceed: Proceed) -> Tensor:
    """Compute attention in batches that every kernel takes."""
    n, most = call.q.shape[0], temporal.MAX_POSITIONS
    if n <= most:
        return proceed(call)
    outputs = []
    for start in range(0, n, most):
        part = slice(start, start + most)
        mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[part]
        outputs.append(proceed(call.with_(q=call.q[part], k=call.k[part], v=call.v[part], mask=mask)))
    return torch.cat(outputs)
