"""Which classes of the installed diffusers are denoisers."""

from __future__ import annotations

import diffusers.models

__all__ = ["NO_DENOISERS", "denoiser_classes"]

NO_DENOISERS = {
    "Transformer2DModel": "a part of UNets",
    "DualTransformer2DModel": "a part of UNets",
    "DreamLiteTransformer2DModel": "a part of UNets",
    "TransformerTemporalModel": "a part of UNets",
    "MotionAdapter": "a part of UNets",
    "MiniMaxMusic3RVQDepthDecoder": "a language model of audio codes",
    "RFD4ProteinaTransformer": "folds proteins",
    "T5FilmDecoder": "spectrograms of notes, by attention that nothing can intercept",
    "UNet1DModel": "waveforms, by attention without processors",
}
"""Classes among diffusers' transformers and UNets that make no image, video or audio under control, and why."""


def denoiser_classes() -> tuple[str, ...]:
    """Name the denoisers of the installed diffusers, sorted: its transformers and UNets without NO_DENOISERS."""
    structure: dict[str, list[str]] = diffusers.models._import_structure  # read, so that no model is imported
    names = {n for k, v in structure.items() if k.startswith(("transformers.", "unets.")) for n in v}
    return tuple(sorted(names - NO_DENOISERS.keys()))
