"""Objectives of a search: callables (images, prompts) -> one number each, more being better.

The models behind them are read from this machine only; a missing one is an error that says how to fetch it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnctl.errors import ConfigError, nearest

__all__ = ["OBJECTIVES", "BlipScore", "ClipScore", "ShapesJudge", "harmonic", "objective_of", "pick_score"]


class ShapesJudge:
    """Mark pictures of the shapes world, 0 to 1: the mean of right or not, the share of objects, and their outlines."""

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        from attnctl.shapes.judge import judge

        marks = [judge(image).matches(prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [(float(m.right) + sum(m.bound) / len(m.bound) + m.iou * sum(m.bound) / len(m.bound)) / 3 for m in marks]


class ClipScore:
    """Mark pictures by the cosine between image and text in a CLIP model, times a factor.

    Args:
        model: Hub id or folder of a `CLIPModel`.
        processor: Where its tokenizer and image processor are; None for the same place.
        factor: 100 gives the usual CLIP score; None the model's own temperature, as in PickScore.
        device: Where to compute.

    Raises:
        ConfigError: The model is not on this machine.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        processor: str | None = None,
        factor: float | None = 100.0,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoProcessor, CLIPModel

        self.model = _local(CLIPModel.from_pretrained, model).to(device).eval()
        self.processor = _local(AutoProcessor.from_pretrained, processor or model)
        self.factor, self.device = factor, device

    @torch.no_grad()
    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        inputs = self.processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True
        )
        out = self.model(**inputs.to(self.device))
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        factor = self.model.logit_scale.exp().item() if self.factor is None else self.factor
        return [float(x) for x in cosine * factor]


def pick_score(device: str = "cpu") -> ClipScore:
    """Return PickScore ("Pick-a-Pic", arXiv 2305.01569), the objective of the published searches."""
    return ClipScore(
        "yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", factor=None, device=device
    )


class BlipScore:
    """Mark pictures by a BLIP model's log odds that image and text match (the network that ImageReward starts from).

    Args:
        model: Hub id or folder of a `BlipForImageTextRetrieval`.
        device: Where to compute.

    Raises:
        ConfigError: The model is not on this machine.
    """

    def __init__(self, model: str = "Salesforce/blip-itm-base-coco", *, device: str = "cpu") -> None:
        from transformers import AutoProcessor, BlipForImageTextRetrieval

        self.model = _local(BlipForImageTextRetrieval.from_pretrained, model).to(device).eval()
        self.processor = _local(AutoProcessor.from_pretrained, model)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        inputs = self.processor(
            text=list(prompts), images=list(images), return_tensors="pt", padding=True, truncation=True
        )
        logits = self.model(**inputs.to(self.device)).itm_score.float()
        return [float(x) for x in logits[:, 1] - logits[:, 0]]


def harmonic(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., list[float]]:
    """Join two objectives with positive marks by their harmonic mean, 2 p c / (p + c), picture by picture.

    Raises:
        ConfigError: When called, if a mark is not positive.
    """

    def both(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        pairs = list(zip(first(images, prompts), second(images, prompts), strict=True))
        if any(p <= 0 or c <= 0 for p, c in pairs):
            raise ConfigError(f"A harmonic mean needs positive marks; the objectives gave {pairs[:4]}.")
        return [2 * p * c / (p + c) for p, c in pairs]

    return both


OBJECTIVES: dict[str, Callable[[str], Callable[..., Any]]] = {
    "shapes": lambda device: ShapesJudge(),
    "clip": lambda device: ClipScore(device=device),
    "pickscore": pick_score,
    "blip": lambda device: BlipScore(device=device),
}


def objective_of(name: str, device: str = "cpu") -> Callable[..., Any]:
    """Return an objective by its name, or by "module:function" for one of your own.

    Raises:
        ConfigError: There is no such objective, or its model is not on this machine.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name](device)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"Unknown objective {name!r}; expected {', '.join(OBJECTIVES)} or module:function."
            + nearest(name, OBJECTIVES)
        )
    try:
        objective = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"The objective {name!r} cannot be imported: {error}.") from None
    if not callable(objective):
        raise ConfigError(
            f"The objective {name!r} is {type(objective).__name__}; expected a callable (images, prompts)."
        )
    return objective


def _local(load: Callable[..., Any], name: str) -> Any:
    try:
        return load(name, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"The model {name!r} of this objective is not on this machine ({reason}). Fetch it first: "
            f"`hf download {name}`, or give a folder."
        ) from None
