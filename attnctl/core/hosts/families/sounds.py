"""Denoisers of sound: attention over time, and to the text."""

from __future__ import annotations

from attnctl.core.hosts.families import grids
from attnctl.core.hosts.families.row import Family

__all__ = ["SOUNDS"]

_NAMED = (("cross_attn", "cross"), ("self_attn", "self"))

SOUNDS: tuple[Family, ...] = (
    Family(
        name="Stable Audio",
        classes=("StableAudioDiTModel",),
        kinds=(("attn2", "cross"), ("attn1", "self")),
        grid=grids.length,
        tokens=grids.ended,
    ),
    Family(
        name="Stable Audio 3",
        classes=("StableAudio3DiTModel",),
        kinds=_NAMED,
        grid=grids.length,
        tokens=grids.ended,
        note="its attention is the difference of two softmax attentions, and a control acts on each of them by itself: "
        "PAG's perturbed attention is then zero, maps show the first, and NAG guides the first alone",
    ),
    Family(
        name="ACE-Step",
        classes=("AceStepTransformer1DModel",),
        kinds=_NAMED,
        grid=grids.rows_of_time,
        cond_first=True,
    ),
    Family(name="LongCat-Audio", classes=("LongCatAudioDiTTransformer",), kinds=_NAMED, grid=grids.rows_of_time),
    Family(
        name="MiniMax-Music 3",
        classes=("MiniMaxMusic3Transformer1DModel",),
        kinds=(("attn", "self"),),
        grid=grids.length,
        tokens=grids.ended,
    ),
)
