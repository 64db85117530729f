"""Maps of every token of a prompt: its words, and the marks at its ends that its tokenizer sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnctl.core.hosts.words import Concept, RowText
from attnctl.core.live import LiveControl
from attnctl.core.sites import Site
from attnctl.errors import ConfigError
from attnctl.processors.capture.capture import Capture
from attnctl.processors.capture.recorder import Recorder

__all__ = ["TokenCapture"]

_MARKS = ("<start>", "<end>", "<pad>")


class _Tokens(Recorder):
    """Collects the maps of all words of a prompt, and of the marks that there are."""

    def _row_concepts(self, row: RowText, words: Sequence[Any] | None, n_text: int | None) -> dict[str, Concept]:
        concepts = super()._row_concepts(row, words, n_text)
        for mark in _MARKS:
            try:
                concepts[mark] = row.find(self.pipe, [mark], n_text, "Capture")[0]
            except ConfigError:
                continue  # this tokenizer sets none, or the prompt leaves no room for it
        return concepts


@dataclass(frozen=True, kw_only=True)
class TokenCapture(Capture, abstract=True):
    """Record the words of a prompt and the marks at its ends ("<start>", "<end>", "<pad>"), where there are any."""

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        return _Tokens(self, sites, pipe)
