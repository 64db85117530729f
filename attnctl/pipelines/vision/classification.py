"""Train and evaluate a backbone, swapped or not, on the handwritten digits that scikit-learn carries. Offline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.data.pictures import blank_figure
from attnctl.errors import ConfigError
from attnctl.pipelines.vision.fitting import fit, write_fit

if TYPE_CHECKING:
    from attnctl.backbones.mixers import Mixer

__all__ = ["Classified", "classify", "digits"]


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What came out: the model, its accuracy on test images (0 to 1), the loss of every epoch, the files written."""

    model: nn.Module
    accuracy: float
    curve: tuple[float, ...]
    files: tuple[Path, ...]


def digits(size: int = 32, seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load 1,797 digits as float [n, 3, size, size] in -1..1 with labels 0 to 9: 1,437 to train, 360 to test.

    Raises: ConfigError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("The digits come with scikit-learn: pip install 'attnctl[vision]'.") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1437], order[1437:]
    return (images[train], labels[train]), (images[test], labels[test])


def classify(
    name: str = "biformer_micro",
    *,
    swap: str | type[Mixer] | None = None,
    swap_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    size: int = 32,
    epochs: int = 12,
    lr: float = 3e-3,
    seed: int = 0,
    out: Path | None = None,
    quiet: bool = False,
) -> Classified:
    """Train a timm model on digits and evaluate it on images that it has not seen.

    name, model_options: for timm.create_model. swap, swap_options: a kind or mixer of `attnctl.swap`, None for none.
    out: a folder for weights.safetensors, curve.png and predictions.png. Raises: ConfigError, as `swap` and `fit`.
    """
    import timm

    from attnctl.backbones.swap import swap as swap_attention  # and registers the names with timm

    if out is not None:
        blank_figure(1, 1)  # a missing package is said before the training, not after it
    train, test = digits(size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=10, **(model_options or {}))
        if swap is not None:
            swap_attention(model, swap, **(swap_options or {}))
        curve = fit(model, *train, F.cross_entropy, epochs=epochs, lr=lr, seed=seed, quiet=quiet)
    with torch.inference_mode():
        guesses = model(test[0]).argmax(dim=1)
    files: tuple[Path, ...] = ()
    if out is not None:
        files = _write(out, model, curve, test[0], guesses, test[1])
    accuracy = float((guesses == test[1]).double().mean())
    return Classified(model=model, accuracy=accuracy, curve=tuple(curve), files=files)


def _write(
    out: Path, model: nn.Module, curve: list[float], images: Tensor, guesses: Tensor, labels: Tensor
) -> tuple[Path, ...]:
    figure = blank_figure(8, 4)
    wrong_first = torch.cat([(guesses != labels).nonzero()[:, 0], (guesses == labels).nonzero()[:, 0]])[:32]
    for axes, i in zip(figure.subplots(4, 8).flat, wrong_first.tolist(), strict=True):
        axes.imshow(images[i, 0], cmap="gray")
        right = bool(guesses[i] == labels[i])
        title = f"{int(guesses[i])}" if right else f"{int(guesses[i])}, is {int(labels[i])}"
        axes.set_title(title, color="black" if right else "red", fontsize=9)
        axes.axis("off")
    return write_fit(out, model, curve, figure)
