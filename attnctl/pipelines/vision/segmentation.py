"""Train and evaluate a segmentation model with a registered encoder on shapes scenes with exact masks. Offline.

Decoders come from segmentation-models-pytorch, which takes any timm name as `tu-<name>`; scores from torchmetrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.data.pictures import blank_figure
from attnctl.errors import ConfigError, nearest
from attnctl.pipelines.vision.fitting import fit, write_fit
from attnctl.shapes.data import to_tensor
from attnctl.shapes.scenes import SHAPES, outline, render, sample

if TYPE_CHECKING:
    from attnctl.backbones.mixers import Mixer

__all__ = ["Segmented", "scene_masks", "segment"]

CLASSES = ("background", *SHAPES)
_ZOOM = 8


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """What came out: the model, IoU of every class that occurs (0 to 1), their mean, the losses, the files written."""

    model: nn.Module
    iou: dict[str, float]
    mean_iou: float
    curve: tuple[float, ...]
    files: tuple[Path, ...]


def scene_masks(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw n scenes of one or two objects: images [n, 3, 64, 64] in -1..1, and the shape at every pixel [n, 64, 64].

    A pixel belongs to the shape that covers its centre; 0 is background.
    """
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for _ in range(n):
        scene = sample(rng, 1 + int(rng.integers(2)), "any")
        image = render(scene)
        mask = np.zeros(image.shape[:2], np.int64)
        for thing in scene.things:
            canvas = np.zeros((image.shape[0] * _ZOOM, image.shape[1] * _ZOOM, 3), np.uint8)
            outline(canvas, thing, (255, 255, 255), _ZOOM)
            mask[canvas[_ZOOM // 2 :: _ZOOM, _ZOOM // 2 :: _ZOOM, 0] > 0] = 1 + SHAPES.index(thing.shape)
        images.append(image)
        masks.append(mask)
    return to_tensor(np.stack(images)), torch.from_numpy(np.stack(masks))


def segment(
    encoder: str = "biformer_micro",
    decoder: str = "unet",
    *,
    swap: str | type[Mixer] | None = None,
    swap_options: Mapping[str, Any] | None = None,
    encoder_options: Mapping[str, Any] | None = None,
    n_train: int = 2400,
    n_test: int = 200,
    epochs: int = 6,
    lr: float = 3e-3,
    seed: int = 0,
    out: Path | None = None,
    quiet: bool = False,
) -> Segmented:
    """Train a decoder on an encoder, both from scratch, and evaluate on scenes that it has not seen.

    encoder: a timm name whose stages have strides 4 to 32. decoder: "unet", "fpn", "upernet" and others of
    segmentation-models-pytorch. swap, swap_options: a kind or mixer of `attnctl.swap` for the encoder, None for none;
    what it changed is `swap_report(done.model.encoder.model)`. out: a folder for weights.safetensors, curve.png and
    predictions.png.

    Raises: ConfigError for unknown decoders and missing packages, and as `swap` and `fit`.
    """
    try:
        import segmentation_models_pytorch as smp
        from torchmetrics.classification import MulticlassJaccardIndex
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'attnctl[vision]'.") from error
    from attnctl.backbones.swap import swap as swap_attention  # and registers the names with timm

    decoders = ("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "upernet", "segformer")
    if decoder not in decoders:
        raise ConfigError(f"decoder={decoder!r} was given; expected one of {decoders}.{nearest(decoder, decoders)}")
    if out is not None:
        blank_figure(1, 1)  # a missing package is said before the training, not after it
    images, masks = scene_masks(n_train, seed)
    unseen, wanted = scene_masks(n_test, seed + 1_000_003)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = smp.create_model(
            decoder, f"tu-{encoder}", encoder_weights=None, classes=len(CLASSES), **(encoder_options or {})
        )
        if swap is not None:
            swap_attention(model.encoder.model, swap, **(swap_options or {}))
        curve = fit(model, images, masks, F.cross_entropy, epochs=epochs, batch=32, lr=lr, seed=seed, quiet=quiet)
    with torch.inference_mode():
        guesses = torch.cat([model(part).argmax(dim=1) for part in unseen.split(32)])
    score = MulticlassJaccardIndex(len(CLASSES), average=None)(guesses, wanted)
    iou = {name: float(score[i]) for i, name in enumerate(CLASSES) if (wanted == i).any()}
    files: tuple[Path, ...] = ()
    if out is not None:
        files = _write(out, model, curve, unseen, guesses, wanted)
    mean = sum(iou.values()) / len(iou)
    return Segmented(model=model, iou=iou, mean_iou=mean, curve=tuple(curve), files=files)


def _write(
    out: Path, model: nn.Module, curve: list[float], images: Tensor, guesses: Tensor, wanted: Tensor
) -> tuple[Path, ...]:
    figure = blank_figure(9, 4)
    rows = figure.subplots(3, 8)
    for column in range(8):
        rows[0, column].imshow((images[column].permute(1, 2, 0) + 1) / 2)
        rows[1, column].imshow(wanted[column], vmin=0, vmax=len(CLASSES) - 1, cmap="tab10")
        rows[2, column].imshow(guesses[column], vmin=0, vmax=len(CLASSES) - 1, cmap="tab10")
    for axes, label in zip(rows[:, 0], ("image", "truth", "model"), strict=True):
        axes.set_ylabel(label)
    for axes in rows.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return write_fit(out, model, curve, figure)
