"""Word maps: how much of each image token's attention the words of a prompt receive.

`WordMaps` holds what a `Capture` control has recorded: for every layer the attention probability of every word, on the
layer's own grid. Reading a word brings the layers to the largest grid and reduces them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.core.sites import Selector, Site, select
from attnctl.data.map_files import Of, Reduce, read_fields, save
from attnctl.errors import ConfigError, nearest
from attnctl.kernels.maps import otsu_split, stretched

__all__ = ["Normalise", "Of", "Reduce", "WordMaps", "normalised", "otsu", "reduced", "resized"]

Normalise = Literal["probability", "share", "minmax", "max", "ae"]


def reduced(x: Tensor, dim: int | tuple[int, ...], how: Reduce) -> Tensor:
    """Reduce dimensions by their mean, sum or largest value."""
    if how == "mean":
        return x.mean(dim)
    return x.sum(dim) if how == "sum" else x.amax(dim)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring maps [..., h, w] to another grid, bilinearly with aligned borders; probabilities stay in [0, 1].

    A smaller grid averages, so that no token is passed over.
    """
    if tuple(maps.shape[-2:]) == size:
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    out = F.interpolate(flat, size, mode="bilinear", align_corners=False, antialias=True)
    return out.reshape(*maps.shape[:-2], *size)


def normalised(maps: Tensor, how: Normalise) -> Tensor:
    """Normalise maps [words, images, ..., h, w].

    "probability" leaves them; "share" divides by the sum over the words, place by place; "ae" is softmax(100 A) over
    the words, place by place, as Attend-and-Excite takes it over all text tokens; "minmax" brings each map to [0, 1]
    and "max" divides each by its largest value, frames together.
    """
    if how == "probability":
        return maps
    if how == "ae":
        shares = (100 * maps).masked_fill(maps.isnan(), -torch.inf).softmax(0)
        return shares.masked_fill(maps.isnan(), torch.nan)
    if how == "share":
        return maps / maps.nansum(0, keepdim=True).clamp_min(1e-12)
    return stretched(maps, tuple(range(2, maps.ndim)), from_zero=how == "max")


def otsu(values: Tensor) -> float:
    """Find the threshold that parts values into two classes of the largest between-class variance (Otsu, 1979)."""
    lower, upper = otsu_split(values.double().flatten())
    return float((lower + upper) / 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class WordMaps(Mapping[str, Tensor]):
    """Attention maps of words, a mapping from word to tensor [images, h, w], or [images, frames, h, w] for videos.

    Values are probabilities: the share of an image token's attention that goes to a word (the mean over the word's
    tokens), between 0 and 1, reduced over steps, heads and layers as `reduce` says. Where the prompts of a batch have
    different words, an image without the word holds NaN.

    Attributes:
        words: The words, in the order asked for.
        layers: For each attention site a tensor [images, words, steps, heads, frames, h, w] in float32 or float16;
            steps and heads have length 1 where they were reduced.
        sites: The sites, in execution order.
        steps: The steps of the run that are in the maps.
        prompts: The prompt of each image; empty text where it is unknown.
        tokens: For each image and word the positions of its tokens; empty where the prompt has no such word.
        heads: Head numbers that were recorded, or None for all.
        rows: "cond" or "uncond": which prompt the maps belong to.
        reduce: How steps, heads and layers are reduced.
        keep: What was not reduced: "steps", "heads".
        of: "words", or "points": then `words` names places of the image as "x,y" or "x,y,frame" (in backbones also
            "class", "register1" and "mean"), and a map says how much that place attends to every other; or "concepts":
            then `words` need not stand in the prompt, and the maps are shares of them all, layer by layer and step by
            step, which sum to 1.
        about: Further facts, such as the model.
    """

    words: tuple[str, ...]
    layers: Mapping[str, Tensor]
    sites: tuple[Site, ...]
    steps: tuple[int, ...]
    prompts: tuple[str, ...]
    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    heads: tuple[int, ...] | None = None
    rows: str = "cond"
    reduce: Reduce = "mean"
    keep: tuple[str, ...] = ()
    of: Of = "words"
    about: Mapping[str, Any]

    def __getitem__(self, word: str) -> Tensor:
        """Return the map of a word, [images, h, w] or [images, frames, h, w], on the largest grid."""
        return self.get_map(word)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the words."""
        return iter(self.words)

    def __len__(self) -> int:
        """Count the words."""
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        """Tell whether a word was recorded."""
        return word in self.words

    def __repr__(self) -> str:
        """Show the words and the shape of their maps."""
        h, w = self.grid
        return (
            f"WordMaps({', '.join(map(repr, self.words))}: {self.images} images, {h}x{w}, {len(self.layers)} layers, "
            f"{len(self.steps)} steps)"
        )

    @property
    def images(self) -> int:
        """Count the images."""
        return int(next(iter(self.layers.values())).shape[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Return rows and columns of the largest layer."""
        return max(((t.shape[-2], t.shape[-1]) for t in self.layers.values()), key=lambda s: s[0] * s[1])

    def get_map(
        self,
        word: str,
        *,
        layers: Selector | None = None,
        step: int | None = None,
        head: int | None = None,
        size: tuple[int, int] | None = None,
        normalise: Normalise = "probability",
    ) -> Tensor:
        """Return the map of one word, float32.

        Args:
            word: One of `words`.
            layers: Selector of the layers to use; all if None.
            step: One step of the run; needs keep=("steps",).
            head: One head; needs keep=("heads",).
            size: Rows and columns; the largest grid of the layers if None.
            normalise: "probability"; "share" of the recorded words; "ae" (softmax(100 A) over them); "minmax" to
                [0, 1]; "max" divided by the largest.

        Returns:
            [images, h, w], or [images, frames, h, w] for videos.

        Raises:
            ConfigError: The word, step or head was not recorded, or an option is unknown.
            SiteError: The selector matches no recorded layer.
        """
        if word not in self.words:
            raise ConfigError(
                f"{word!r} was not recorded; these were: {', '.join(self.words)}.{nearest(str(word), self.words)}"
            )
        every = self.stacked(layers=layers, step=step, head=head, size=size, normalise=normalise)
        return every[self.words.index(word)]

    def stacked(
        self,
        *,
        layers: Selector | None = None,
        step: int | None = None,
        head: int | None = None,
        size: tuple[int, int] | None = None,
        normalise: Normalise = "probability",
    ) -> Tensor:
        """Return the maps of all words, [words, images, h, w] or [words, images, frames, h, w]: see `get_map`."""
        if normalise not in get_args(Normalise):
            raise ConfigError(f"normalise={normalise!r} is unknown. Choose one of {', '.join(get_args(Normalise))}.")
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ConfigError(f"size={size!r}: give rows and columns, 1 or more.")
        chosen = self.sites if layers is None else select(self.sites, layers, what="These maps")
        parts = [self._cut(self.layers[s.name], step, head) for s in chosen]
        largest = size or max(((p.shape[-2], p.shape[-1]) for p in parts), key=lambda s: s[0] * s[1])
        total: Tensor | None = None
        for part in parts:
            m = resized(part.float(), largest)
            total = m if total is None else torch.maximum(total, m) if self.reduce == "max" else total + m
        assert total is not None
        if self.reduce == "mean":
            total = total / len(parts)
        out = normalised(total.transpose(0, 1), normalise)
        return out.squeeze(2) if out.shape[2] == 1 else out

    def _cut(self, layer: Tensor, step: int | None, head: int | None) -> Tensor:
        """Reduce [images, words, steps, heads, frames, h, w] to [images, words, frames, h, w]."""
        heads = self.heads if self.heads is not None else tuple(range(layer.shape[3]))
        for name, value, have in (("step", step, self.steps), ("head", head, heads)):
            if value is None:
                continue
            if name + "s" not in self.keep:
                raise ConfigError(
                    f'{name}={value} was asked for, but {name}s were reduced while recording: use Capture(keep=("{name}'
                    's",)).'
                )
            if value not in have:
                raise ConfigError(f"{name}={value} was not recorded; these were: {', '.join(map(str, have))}.")
        if step is not None:
            layer = layer[:, :, self.steps.index(step)].unsqueeze(2)
        if head is not None:
            layer = layer[:, :, :, heads.index(head)].unsqueeze(3)
        return reduced(layer.float(), (2, 3), self.reduce)

    def mask(self, word: str, threshold: float | Literal["otsu"] = "otsu", **options: Any) -> Tensor:
        """Return where a word's map, brought to [0, 1], reaches a threshold: bool, in the shape of the map.

        Args:
            word: One of `words`.
            threshold: A share of each map's range in [0, 1], or "otsu" to part each map by itself.
            options: Further options of `get_map` (layers, step, head, size).
        """
        if threshold != "otsu" and (isinstance(threshold, bool) or not 0 <= threshold <= 1):
            raise ConfigError(f'threshold={threshold!r}: give a number from 0 to 1, or "otsu".')
        maps = self.get_map(word, **{**options, "normalise": "minmax"})
        if threshold != "otsu":
            return maps >= threshold
        return torch.stack([m >= otsu(m) for m in maps])

    def image(self, index: int) -> dict[str, Tensor]:
        """Return the maps of one image by word, [h, w] or [frames, h, w], without words that its prompt lacks."""
        if not -self.images <= index < self.images:
            raise ConfigError(f"Image {index} is past the end: there are {self.images}.")
        every = self.stacked()
        return {word: every[n, index] for n, word in enumerate(self.words) if self.tokens[index][n]}

    def save(self, path: Any, *, force: bool = False) -> None:
        """Write the maps as safetensors, and what they are as JSON beside them: see `attnctl.data.map_files`."""
        save(self, path, force=force)

    @classmethod
    def load(cls, path: Any) -> WordMaps:
        """Read what `save` wrote: see `attnctl.data.map_files`."""
        return cls(**read_fields(path))


def joined(parts: Sequence[WordMaps]) -> WordMaps:
    """Put the maps of several denoisers of one pipeline together.

    Denoisers that take turns, as the two of Wan 2.2, are one model that changes on the way: their layers are joined
    step by step. Others keep layers of their own, under the name of the denoiser.

    Raises:
        ConfigError: A running mean (reduce="ema") was to go on from one denoiser to the next.
    """
    if len(parts) == 1:
        return parts[0]
    steps = tuple(sorted({s for part in parts for s in part.steps}))
    shapes = [{name: (*t.shape[:2], *t.shape[3:]) for name, t in part.layers.items()} for part in parts]
    if len(steps) == sum(len(part.steps) for part in parts) and all(shape == shapes[0] for shape in shapes):
        if "steps_reduced" in parts[0].about:
            raise ConfigError(
                'Capture: reduce="ema" runs over the steps of one denoiser, and this pipeline changed its denoiser on '
                'the way. Use another reduce, or keep=("steps",).'
            )
        return replace(parts[0], layers={name: _in_turns(parts, name) for name in shapes[0]}, steps=steps)
    layers: dict[str, Tensor] = {}
    sites: list[Site] = []
    for n, part in enumerate(parts, 1):
        for site in part.sites:
            name = site.name if n == 1 else f"transformer_{n}.{site.name}"
            layers[name] = part.layers[site.name]
            sites.append(replace(site, name=name, depth=len(sites)))
    return replace(parts[0], layers=layers, sites=tuple(sites), steps=steps)


def _in_turns(parts: Sequence[WordMaps], name: str) -> Tensor:
    """Join one layer of denoisers that ran at different steps."""
    layers = [part.layers[name] for part in parts]
    if "steps" in parts[0].keep:
        ran = [s for part in parts for s in part.steps]
        return torch.cat(layers, dim=2)[:, :, sorted(range(len(ran)), key=ran.__getitem__)]
    if parts[0].reduce == "max":
        return torch.stack(layers).amax(0)
    if parts[0].reduce == "sum":
        return torch.stack(layers).sum(0)
    counts = [len(part.steps) for part in parts]
    return torch.stack([t * n for t, n in zip(layers, counts, strict=True)]).sum(0) / sum(counts)
