"""`attnctl segment`: train a model to name every pixel, from a folder of pictures and one of masks."""

from __future__ import annotations

from dataclasses import dataclass

from attnctl.app.commands.common import Result
from attnctl.app.commands.training import Training

__all__ = ["Segment"]


@dataclass(frozen=True, kw_only=True)
class Segment(Training):
    """Train a timm encoder and a decoder on DATA/images and DATA/masks, or both below DATA/train and DATA/val."""

    decoder: str = "unet"
    """A decoder of segmentation-models-pytorch: unet, fpn, upernet and others."""

    def run(self, command: str) -> Result:
        """Train and tell the IoU of every class."""
        return self.train("segment", decoder=self.decoder)
