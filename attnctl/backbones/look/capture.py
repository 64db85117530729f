"""`Capture` on backbones: what class tokens, places of the image or all of them attend to, as maps over the image.

    with attnctl.control(vit, Capture(words=("class",), keep=("heads",))) as handle:
        vit(images)
        handle.maps["class"]  # [images, h, w]

A `WordMaps` comes back, as from a pipeline, with one layer an attention module; each forward pass is a new run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.backbones.look.grids import GridWatch
from attnctl.backbones.look.probe import AttentionProbe, probe_attention
from attnctl.backbones.look.sites import BackboneSite, backbone_sites, sites_of
from attnctl.core.control import Control
from attnctl.core.handle import Handle, place_in
from attnctl.core.hosts.hook import Hook
from attnctl.core.hosts.rows import Layout
from attnctl.core.sites import select
from attnctl.data.maps import WordMaps, reduced
from attnctl.errors import ConfigError, NeverApplied, UnsupportedModelError, nearest
from attnctl.processors.capture.capture import Capture
from attnctl.processors.capture.points import point_label, token_at

__all__ = ["BackboneHandle"]


class BackboneHandle(Handle):
    """A `Capture` attached to a backbone: run the model, read `maps`, and detach."""

    def __init__(
        self, model: nn.Module, controls: Sequence[Control], *, backend: str = "auto", layout: Layout = "auto"
    ) -> None:
        if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules()):
            raise UnsupportedModelError(
                f"This {type(model).__name__} is compiled, and a compiled graph cannot be read. Give the model "
                "from before torch.compile: it shares its weights with the compiled one."
            )
        super().__init__([model], controls, backend=backend, layout=layout)
        self._model = model
        self._sites = sites_of(model)
        self._take(self.controls)
        self._layers: dict[str, Tensor] = {}
        self._bytes = 0

    def _take(self, controls: tuple[Control, ...]) -> None:
        """Find out what a `Capture` records, and take it over."""
        capture, chosen = _checked(controls), self._sites
        every = {s.name: s for s in backbone_sites(self._model)}
        if capture.sites is not None:
            chosen = select(self._sites, capture.sites, kinds=("self", "pool"), what="Capture")
        self._recorded, self._questions = _questions_of(capture, [every[s.name] for s in chosen])
        self.controls, self._capture = controls, capture

    def _install(self) -> None:
        self._grid = GridWatch(self._model, self._recorded, self._undo)
        self._undo.callback(self._model.register_forward_pre_hook(Hook(self, self._begin)).remove)
        for site in self._recorded:
            hook = Hook(self, functools.partial(self._see, site))
            self._undo.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)

    def _exchange(self, controls: tuple[Control, ...]) -> None:
        self._take(controls)
        self._undo.close()
        self._layers = {}
        self._install()

    @property
    def sites(self) -> tuple[Any, ...]:
        """Return the sites that are recorded."""
        names = {s.name for s in self._recorded}
        return tuple(s for s in self._sites if s.name in names)

    @property
    def maps(self) -> WordMaps:
        """Return the maps of the last forward pass."""
        return self.result(self._capture)

    def result(self, control: Control | int) -> WordMaps:
        """Return the maps of the last forward pass.

        Raises: ConfigError if another control was attached, NeverApplied before the first pass.
        """
        capture = self._capture
        place_in(self.controls, control)
        if not self._layers:
            raise NeverApplied("Capture has recorded nothing yet: run the model with the handle enabled.")
        images = next(iter(self._layers.values())).shape[0]
        return WordMaps(
            words=tuple(self._questions),
            layers=dict(self._layers),
            sites=tuple(s for s in self.sites if s.name in self._layers),
            steps=(0,),
            prompts=("",) * images,
            tokens=(tuple((n,) for n in range(len(self._questions))),) * images,
            heads=None if capture.heads is None else tuple(capture.heads),
            reduce="mean" if capture.reduce == "none" else capture.reduce,  # type: ignore[arg-type]
            keep=tuple(capture.keep),
            of="points",
            about={"model": type(self._model).__name__},
        )

    def report(self) -> str:
        """Describe what is recorded where."""
        return (
            f"Capture of {', '.join(self._questions)} at {len(self._recorded)} sites of {type(self._model).__name__}:\n"
            + ("\n".join(f"  {s.name}: {s.heads} heads" for s in self._recorded))
        )

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self.enabled:
            self._layers, self._bytes = {}, 0

    def _see(
        self, site: BackboneSite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Record one call of a site."""
        if module is not site.module or not self.enabled or torch.jit.is_tracing():
            return
        capture = self._capture
        with probe_attention(site, args, kwargs, self._grid(site, args)) as probe:
            rows = torch.stack([probe.rows(_weights(q, site, probe)) for q in self._questions.values()], dim=1)
            h, w = probe.key_grid
        maps = rows[..., : h * w].unflatten(-1, (1, h, w)).unsqueeze(2)  # [B, labels, steps, heads, frames, h, w]
        if capture.heads is not None:
            past = [n for n in capture.heads if n >= site.heads]
            if past:
                raise ConfigError(f"Capture: heads={past} do not exist in {site.name}, which has {site.heads} heads.")
            maps = maps[:, :, :, list(capture.heads)]
        if "heads" not in capture.keep:
            maps = reduced(maps, 3, "mean" if capture.reduce == "none" else capture.reduce).unsqueeze(3)  # type: ignore[arg-type]
        if capture.store == "float16":
            maps = maps.half()
        if capture.device is not None:
            maps = maps.to(capture.device)
        self._bytes += maps.numel() * maps.element_size()
        if self._bytes > capture.budget:
            raise ConfigError(
                f"Capture: the maps take more than budget={capture.budget} bytes by {site.name}: record fewer sites "
                "or images, reduce the heads, or raise the budget."
            )
        self._layers[site.name] = maps


def _checked(controls: Sequence[Any]) -> Capture:
    if len(controls) != 1 or not isinstance(controls[0], Capture):
        raise UnsupportedModelError(
            "Image backbones take one Capture and nothing else: the other controls steer denoisers. "
            "attnctl.swap changes the attention of a backbone."
        )
    capture = controls[0]
    for name, plain in (("start", 0.0), ("stop", 1.0), ("rows", "cond"), ("prompt", None), ("refine", 0)):
        if getattr(capture, name) != plain:
            raise ConfigError(f"Capture: {name} is for denoising runs; an image backbone has none. Leave it out.")
    if capture.reduce == "ema":
        raise ConfigError('Capture: reduce="ema" runs over denoising steps; an image backbone has one: choose "mean".')
    if capture.points is not None and any(len(p) > 2 for p in capture.points):
        raise ConfigError("Capture: points of an image are (x, y); a frame belongs to videos.")
    return capture


def _questions_of(
    capture: Capture, sites: Sequence[BackboneSite]
) -> tuple[list[BackboneSite], dict[str, str | tuple[float, ...] | None]]:
    """Map each label to what it asks (a point, a token's name, None for the mean over the image), and choose the sites
    that have an answer.

    Raises: ConfigError for a token that no site has, and for sites chosen by the user that cannot answer.
    """
    places = [s for s in sites if s.reading.pool is None]
    if capture.points is not None:
        return _answering(capture, sites, places, "points"), {point_label(p): p for p in capture.points}
    having: dict[str, list[BackboneSite]] = {}
    for site in sites:
        for token in site.tokens:
            having.setdefault(token, []).append(site)
    tokens = sorted(having, key=lambda t: (t != "class", t.startswith("pool")))  # else in the order of the sites
    if places:
        tokens.insert(next((i for i, t in enumerate(tokens) if t.startswith("pool")), len(tokens)), "mean")
    words = list(capture.words or tokens[:1])
    chosen = list(sites)
    for word in words:
        if word not in tokens:
            raise ConfigError(
                f"Capture: {word!r} is no token of this backbone; these are: {', '.join(tokens)}."
                f"{nearest(str(word), tokens)} For places of the image give points."
            )
        able = places if word == "mean" else having[word]
        chosen = _answering(capture, chosen, [s for s in chosen if s in able], repr(word))
    return chosen, {word: None if word == "mean" else word for word in words}


def _answering(
    capture: Capture, sites: Sequence[BackboneSite], able: Sequence[BackboneSite], what: str
) -> list[BackboneSite]:
    """Return the sites that can answer. Raises: ConfigError where the user chose others, or none is left."""
    others = [s for s in sites if s not in able]
    if not able or (others and capture.sites is not None):
        site = others[0] if others else sites[0]
        has = [*site.tokens, *(["mean", "points"] if site.reading.pool is None else [])]
        raise ConfigError(
            f"Capture: {what} was asked of {site.name}, which answers {', '.join(has)}. Choose other sites, or leave "
            "sites out: then those are recorded that can answer."
        )
    return list(able)


def _weights(question: str | tuple[float, ...] | None, site: BackboneSite, probe: AttentionProbe) -> Tensor:
    """Weigh the queries for a question."""
    h, w = probe.grid
    weights = torch.zeros(h * w + probe.tokens)
    if question is None:
        weights[: h * w] = 1 / (h * w)
    elif isinstance(question, str):
        weights[h * w + site.tokens.index(question)] = 1
    else:
        row, column = token_at(question, h, w)
        weights[row * w + column] = 1
    return weights
