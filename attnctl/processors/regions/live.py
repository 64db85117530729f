"""The regions' texts beside the prompt, at the sites of one denoiser while a control is attached to it.

Each region's text reaches the denoiser's attention as a negative prompt does (`processors.negative.live`): its keys are
recorded once per run where the image does not change the text, and its stream goes in lockstep with the call where it
does. What image tokens make of them is told in `regions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.arguments import Rows
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.sites import Grid, Site
from attnctl.data.picture_files import read_picture
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.kernels.areas import box_on_grid, mask_on_grid, patterns
from attnctl.kernels.checks import as_bias, check_mask
from attnctl.kernels.sharing import Keys, joined_keys
from attnctl.processors.negative.beside import Key
from attnctl.processors.negative.keys import NegativeKeys, has_text_stream, image_queries, text_keys
from attnctl.processors.negative.live import Form, LiveNegative, prompt_rows

__all__ = ["LiveRegions", "RegionText", "read_mask"]


Places: TypeAlias = tuple[list[tuple[tuple[int, ...], Tensor, Tensor]], list[Tensor]]
"""Per set of regions the regions, the places of its tokens and of those that they see; per region its places."""


class RegionControl(Protocol):
    """What a control with regions says of itself."""

    @property
    def texts(self) -> tuple[tuple[str | None, Mapping[str, Any] | None], ...]: ...

    @property
    def areas(self) -> tuple[Any, ...]: ...

    @property
    def base(self) -> float: ...

    @property
    def base_bias(self) -> float: ...

    def isolated(self, index: int) -> bool:
        """Tell whether image tokens see their own region alone at one of the control's sites."""


@dataclass(frozen=True)
class _Words:
    """One region's prompt, as a text beside the call's."""

    negative_prompt: str | None
    negative_embeds: Mapping[str, Any] | None
    form: Form = "stream"
    scale: float = 0.0

    def guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the attention to the region's text."""
        return negative


class RegionText(LiveNegative):
    """One region's text in a call of the denoiser."""

    name = "Regions"
    what = "a region's prompt"
    remedy = (
        "pass embeddings in place of prompts, Regions(embeds=({...}, ...)): one mapping per region, by the names of "
        "the pipeline's or the denoiser's arguments"
    )
    bare = (
        "Regions: a bare model encodes no prompts. Control the pipeline, or pass embeddings by the names of the "
        "model's arguments, Regions(embeds=({'encoder_hidden_states': ...}, ...))."
    )
    no_line = "Regions cannot act on this model's joint attention: choose other sites (sites=...)."

    @property
    def same(self) -> bool:
        """Tell whether the text is the prompt of the call itself."""
        return self._idle

    def _warn_equal(self) -> None:
        self._idle = True  # a region with the prompt of the call is nothing to warn of

    def keys_at(self, key: Key, part: AttnCall) -> NegativeKeys | None:
        """Return the text's keys at a cross-attention; None where the attention is to something else."""
        if part.state.phase == "base":
            if self.time.moved(key, part):
                self.keys = {}
            if key not in self.keys:
                self._record()
        keys = self.keys.get(key)
        return keys if keys is not None and self._is_text(key, keys, part) else None

    def arrive(self, key: Key) -> AttnCall:
        """Take the text to the joint attention where the call of the denoiser is."""
        self._beside = self._beside or self._begin()
        call = self._beside.arrive(key, self._answer)
        if getattr(self._passes, "branches", ()):
            self.keys[key] = NegativeKeys.of(call)
        return call

    def answer(self, call: AttnCall, seen: Tensor) -> None:
        """Say what the text's queries have seen there, [b, H, T, D]."""
        self._answer = call.q.new_zeros(*call.q.shape[:3], seen.shape[-1])
        self._answer[:, :, text_keys(call)] = seen


class LiveRegions(LiveControl):
    """What regional prompts keep on one denoiser.

    Args:
        control: The regions.
        sites: Where they act.
        denoiser: The denoiser.
    """

    def __init__(self, control: RegionControl, sites: tuple[Site, ...], denoiser: torch.nn.Module) -> None:
        self.control = control
        self.order = {site.name: i for i, site in enumerate(sites)}
        self.texts = [RegionText(_Words(*text), sites, denoiser) for text in control.texts]
        self.masks = [read_mask(area) if isinstance(area, str) else area for area in control.areas]
        self._shares: dict[Any, Tensor] = {}
        self._places: dict[Any, Places] = {}

    def begin_run(self) -> None:
        for text in self.texts:
            text.begin_run()

    def before_call(self, passes: LiveDenoiser) -> None:
        for text in self.texts:
            text.before_call(passes)

    def after_call(self, output: Any) -> None:
        for text in self.texts:
            text.after_call(output)

    def wrap(self, call: AttnCall, proceed: Proceed) -> Tensor:
        if not call.state.rows.prompts:
            return proceed(call)
        chosen = prompt_rows(call)
        if chosen is None:
            return proceed(call)
        first, part = chosen
        key = call.site.name, call.index - first
        if call.site.kind == "joint" and has_text_stream(call):
            image, text = image_queries(call), text_keys(call)
            if text.start == text.stop:  # blocks behind the last that sees the text
                return proceed(call)
            if call.q.shape[2] == call.k.shape[2] - (image.stop - image.start):  # PAG asks for all but the image
                return proceed(call)
            return _put(call, proceed(call), self._joint(key, part), image_queries(part))
        return self._crossed(key, call, part, proceed)

    def shares(self, call: AttnCall, tokens: int) -> Tensor:
        """Return how much of each of a call's image tokens lies in each region, [R, tokens], 0 to 1."""
        grid = call.grid
        if grid is None or math.prod(grid) > tokens or tokens % (grid[1] * grid[2]):
            grid = _folded(grid, tokens)
        if grid is None:
            raise UnsupportedModelError(
                f"Regions: nothing tells how the {tokens} image tokens at {call.site.name} lie on the picture."
            )
        key = (*grid, tokens, call.q.device)
        if key not in self._shares:
            parts = [
                (box_on_grid(m, *grid[1:]) if isinstance(m, tuple) else mask_on_grid(m, *grid[1:])).flatten()
                for m in self.masks
            ]
            spread = torch.stack(parts).repeat(1, tokens // (grid[1] * grid[2]))
            self._shares[key] = spread.to(call.q.device)
        return self._shares[key]

    # Cross-attention: outputs are mixed -----------------------------------------------------------------------

    def _crossed(self, key: Key, call: AttnCall, part: AttnCall, proceed: Proceed) -> Tensor:
        keys = [None if text.same else text.keys_at(key, part) for text in self.texts]
        if any(k is None and not text.same for k, text in zip(keys, self.texts, strict=True)):
            return proceed(call)  # an attention to an image prompt, not to the text
        out = proceed(call)
        image = image_queries(part)
        base = out[_cond(call, out)][:, :, image]
        shares = self.shares(part, base.shape[2]).to(base.dtype)[:, :, None]
        total = shares.sum(0)
        covered = total.clamp_max(1) * (1 - self.control.base)
        mixed = (1 - covered) * base
        for k, share in zip(keys, shares, strict=True):
            if k is None:
                seen = base
            else:
                seen = proceed(k.attended(part)) if call.site.kind != "joint" else k.attended(part).plain()
            mixed = mixed + covered * share / total.clamp_min(1e-6) * seen
        return _put(call, out, mixed, image)

    # Joint attention: each set of regions attends to keys of its own ------------------------------------------

    def _joint(self, key: Key, part: AttnCall) -> Tensor:
        """Attend with the prompt's image queries, [b, H, N, D]; and with the regions' texts."""
        image = image_queries(part)
        groups, areas = self._where(part, image.stop - image.start)
        base_pass = part.state.phase == "base"
        texts: list[NegativeKeys | None] = []
        for text, places in zip(self.texts, areas, strict=True):
            if text.same:
                texts.append(None)
            elif base_pass:
                meeting = text.arrive(key)
                texts.append(NegativeKeys.of(meeting))
                text.answer(meeting, _text_sees(part, meeting, places))
            else:
                texts.append(text.keys.get(key))
                if texts[-1] is None:
                    raise UnsupportedModelError(f"Regions: {part.site.name} was not reached in the base pass.")
        out = part.q.new_zeros(*part.q.shape[:2], image.stop - image.start, part.v.shape[-1])
        for regions, places, seen in groups:
            out[:, :, places] = self._group(part, [texts[r] for r in regions], places, seen)
        return out

    def _where(self, part: AttnCall, tokens: int) -> Places:
        """Return the places of each set of regions with those that it sees, and the places of each region.

        They are found once per size of the picture: finding them waits for the device.

        Raises:
            ConfigError: A region holds none.
        """
        isolated = self.control.isolated(self.order[part.site.name])
        key = (part.grid, tokens, part.q.device, isolated)
        if key not in self._places:
            inside = self.shares(part, tokens) >= 0.5
            empty = (~inside.any(1)).nonzero().flatten().tolist()
            if empty:
                raise ConfigError(
                    f"Regions: areas[{empty[0]}] covers half of no image token at {part.site.name}, where the picture "
                    f"has {tokens} of them, so its prompt would be seen nowhere. Make the area larger, or the picture."
                )
            groups = []
            for regions, places in patterns(inside):
                seen = inside[list(regions)].any(0) if regions else ~inside.any(0)
                groups.append((regions, places, (seen if isolated else torch.ones_like(seen)).nonzero().flatten()))
            self._places[key] = groups, [mask.nonzero().flatten() for mask in inside]
        return self._places[key]

    def _group(self, part: AttnCall, texts: list[NegativeKeys | None], places: Tensor, seen: Tensor) -> Tensor:
        """Attend with the image queries of one set of regions to its texts and to the image tokens that it sees."""
        image, prompt, rows = image_queries(part), text_keys(part), part.q.shape[0]
        mask = part.mask if part.mask is None else check_mask(part.mask, (*part.q.shape[:3], part.k.shape[2]))
        at = places + image.start
        plain = not texts or any(text is None for text in texts)
        parts: list[Keys] = []
        if plain or self.control.base > 0:
            bias = 0.0 if plain else self.control.base_bias
            columns = torch.arange(prompt.start, prompt.stop, device=at.device)
            parts.append((part.k[:, :, prompt], part.v[:, :, prompt], _columns(part, mask, at, columns, bias)))
        for text in texts:
            if text is not None:
                k, v = (x.expand(rows, *x.shape[1:]) for x in (text.k, text.v))
                parts.append((k, v, _text_columns(part, text)))
        # References and registers beside image and text are seen by all.
        low, high = sorted((prompt, image), key=lambda span: span.start)
        gaps = ((0, low.start), (low.stop, high.start), (high.stop, part.k.shape[2]))
        columns = torch.cat([seen + image.start, *(torch.arange(*gap, device=at.device) for gap in gaps)])
        parts.append((part.k[:, :, columns], part.v[:, :, columns], _columns(part, mask, at, columns, 0.0)))
        return _attend(part, part.q[:, :, at], parts)


def _attend(part: AttnCall, q: Tensor, parts: list[Keys]) -> Tensor:
    """Attend to keys that lie in several parts."""
    k, v, mask = joined_keys(parts, q)
    return part.with_(q=q, k=k, v=v, mask=mask).plain()


def _columns(part: AttnCall, mask: Tensor | None, queries: Tensor, keys: Tensor, bias: float) -> Tensor | None:
    """Return some columns of a call's mask for some of its queries as an additive mask, with a bias on top."""
    if mask is None:
        return None if bias == 0 else part.q.new_full((1, 1, 1, len(keys)), bias)
    mask = mask if mask.shape[2] == 1 else mask[:, :, queries]
    mask = as_bias(mask.expand(*mask.shape[:3], part.k.shape[2])[..., keys], part.q.dtype)
    return mask + bias


def _text_columns(part: AttnCall, text: NegativeKeys) -> Tensor | None:
    """Return the mask of a region's text for image queries, or None where all of it is attended to."""
    if text.mask is None:
        return None
    mask = text.mask.reshape((1,) * (4 - text.mask.ndim) + tuple(text.mask.shape))
    mask = mask if mask.shape[2] == 1 else mask[:, :, text.seen[0] : text.seen[0] + 1]
    mask = mask.expand(*mask.shape[:3], text.text.stop if mask.shape[3] == 1 else mask.shape[3])[..., text.text]
    return as_bias(mask, part.q.dtype)


def _text_sees(part: AttnCall, meeting: AttnCall, places: Tensor) -> Tensor:
    """Attend with a region's text to itself and to the image inside of the region, [b, H, T, D]."""
    image, text = image_queries(part), text_keys(meeting)
    keys = NegativeKeys.of(meeting)
    columns = places + image.start
    mask = None if part.mask is None else check_mask(part.mask, (*part.q.shape[:3], part.k.shape[2]))
    words = (keys.k, keys.v, _text_columns(part, keys))
    area = (part.k[:, :, columns], part.v[:, :, columns], _columns(part, mask, columns[:1], columns, 0.0))
    rows = part.q.shape[0]
    q = meeting.q[:, :, text]
    if q.shape[0] != rows:
        raise UnsupportedModelError(f"Regions: {q.shape[0]} rows of a region's text do not fit the prompt's {rows}.")
    return _attend(part, q, [words, area])


def _folded(grid: Grid | None, tokens: int) -> Grid | None:
    """Return the grid of one frame, where a call attends with each frame by itself."""
    return None if grid is None or grid[1] * grid[2] != tokens else (1, *grid[1:])


def _cond(call: AttnCall, out: Tensor) -> slice:
    """Return the prompt's rows of an output."""
    rows = call.state.rows if out.shape[0] % call.state.rows.total == 0 else Rows.all(1)
    m = out.shape[0] // rows.total
    return slice(rows.cond.start * m, rows.cond.stop * m)


def _put(call: AttnCall, out: Tensor, part: Tensor, image: slice) -> Tensor:
    """Put what the prompt's image queries see in its place of an output."""
    cond = _cond(call, out)
    moved = torch.cat([out[cond, :, : image.start], part, out[cond, :, image.stop :]], 2)
    return torch.cat([out[: cond.start], moved, out[cond.stop :]])


def read_mask(path: str) -> Tensor:
    """Read a mask [h, w] from a picture file, white inside.

    Raises:
        ConfigError: There is no such picture, or it is black all over.
    """
    mask = torch.from_numpy(np.asarray(read_picture(path, ConfigError).convert("L"), dtype=np.float32) / 255)
    if not bool((mask > 0).any()):
        raise ConfigError(f"Regions: the mask {path} is black all over: paint the region white.")
    return mask
