"""The models of a page: which there are, each loaded when it is first asked for, and which methods each takes."""

from __future__ import annotations

import threading
from typing import Any

from attnctl.data.controls import load_entry_points
from attnctl.data.specs import methods
from attnctl.errors import AttnctlError, ConfigError, SiteError
from attnctl.pipelines.models import SHIPPED, Loaded, load

__all__ = ["Models", "combiners", "offered"]

_IMAGES: tuple[str, ...] = ("shapes:text2image", "shapes:mmdit")
_VIDEOS: tuple[str, ...] = ("shapes:video", "shapes:videodit")


def offered() -> tuple[str, ...]:
    """Name the methods that the page offers: all but those that say otherwise (`About.offered`)."""
    return tuple(m for m, cls in methods().items() if getattr(getattr(cls, "about", None), "offered", True))


def combiners() -> tuple[str, ...]:
    """Name those of which one alone can act: the rules that put two predictions together."""
    from attnctl.processors.combining.combiner import Combiner

    return tuple(m for m in offered() if issubclass(methods()[m], Combiner))


class Models:
    """Hold the shipped models, and the one that was given on the command line.

    Args:
        given: A hub id or a local folder, or None; it is loaded at once, so that what is wrong with it is said at once.
        revision: The commit or branch of a hub model.
        device: Where the given model runs; shipped ones run beside it.
        dtype: How precisely.

    Raises:
        AttnctlError: the model cannot be had; the message says why.
    """

    def __init__(
        self, given: str | None = None, *, revision: str | None = None, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        load_entry_points()  # a page has no other way to the controls of other packages
        self._device, self._dtype, self._revision = device, dtype, revision
        self._loaded: dict[str, Loaded] = {}
        self._takes: dict[str, tuple[str, ...]] = {}
        self._lock = threading.RLock()
        self.images, self.videos = _IMAGES, _VIDEOS
        self.given: str | None = None
        if given in _IMAGES:
            self.images = (given, *(name for name in _IMAGES if name != given))
        elif given is not None and given not in _VIDEOS:
            self._add(given)

    def _add(self, given: str) -> None:
        from attnctl.pipelines.generate import makes_videos

        self.given = given
        if makes_videos(self.get(given).pipe):
            self.videos = (given, *_VIDEOS)
        else:
            self.images = (given, *_IMAGES)

    @property
    def edits(self) -> tuple[str, ...]:
        """Name the models that edit pictures and clips: all but the UNet of videos."""
        user_models = [] if self.given is None else [self.given]
        return (*user_models, *(n for n in (*self.images, *self.videos) if n not in (self.given, "shapes:video")))

    def get(self, name: str) -> Loaded:
        """Return a model, loaded when it is first asked for.

        Raises:
            ConfigError: the page has no such model.
        """
        offered = (*_IMAGES, *_VIDEOS, *([self.given] if self.given else []))
        if name not in offered:
            raise ConfigError(f"This page has no model {name!r}; it has {', '.join(offered)}.")
        with self._lock:
            if name not in self._loaded:
                revision = None if name.startswith(SHIPPED) else self._revision
                self._loaded[name] = load(name, revision=revision, device=self._device, dtype=self._dtype)
            return self._loaded[name]

    def takes(self, name: str) -> tuple[str, ...]:
        """Name the methods that a model takes, found by putting each on and taking it off again."""
        with self._lock:
            if name not in self._takes:
                pipe = self.get(name).pipe
                self._takes[name] = tuple(m for m in offered() if _takes(pipe, m, methods()[m]))
            return self._takes[name]


def _takes(pipe: Any, method: str, cls: Any) -> bool:
    import attnctl
    from attnctl.app.ui.knobs import knobs_of

    fields: dict[str, Any] = {}
    if any(knob.field == "concepts" for knob in knobs_of(method)):
        fields["concepts"] = ("a", "b")
    try:
        try:
            attnctl.control(pipe, cls(**fields)).detach()
        except SiteError:  # no published layers: can it act on any that are named?
            names = tuple(s.name for s in attnctl.find_sites(pipe) if s.kind in cls.kinds)
            if not names:
                return False
            attnctl.control(pipe, cls(sites=names, **fields)).detach()
    except (AttnctlError, TypeError):  # the model is none for it, or it needs what no page can give, such as a plan
        return False
    return True
