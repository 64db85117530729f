"""`attnctl classify`: train a model to name what is in pictures, from a folder with a folder per class."""

from __future__ import annotations

from dataclasses import dataclass

from attnctl.app.commands.common import Result
from attnctl.app.commands.training import Training

__all__ = ["Classify"]


@dataclass(frozen=True, kw_only=True)
class Classify(Training):
    """Train a timm model on DATA/CLASS/*.jpg, or DATA/train/CLASS and DATA/val/CLASS."""

    mixup: float = 0.0
    """Strength of mixup, such as 0.8; 0 for none."""

    cutmix: float = 0.0
    """Strength of cutmix, such as 1.0; 0 for none."""

    smoothing: float = 0.0
    """Label smoothing, such as 0.1."""

    def run(self, command: str) -> Result:
        """Train and tell the accuracy."""
        return self.train("classify", mixup=self.mixup, cutmix=self.cutmix, smoothing=self.smoothing)
