"""What `attnctl classify` and `attnctl segment` share: flags of a training on a folder of pictures."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, say
from attnctl.errors import ConfigError
from attnctl.plans.reading import Expected, parse_json

__all__ = ["Training"]

Options = Annotated[str, tyro.conf.arg(metavar="JSON")]


@dataclass(frozen=True, kw_only=True)
class Training(Common):
    """Hold the flags of a training."""

    data: tyro.conf.Positional[Path]
    """The folder of pictures."""

    out: Path = Path("run")
    """Folder for the model, its scores and their pictures, and the last checkpoint."""

    model: str = "biformer_micro"
    """A model of timm, or one that attnctl registers there."""

    model_options: Options = "{}"
    """Options of the model, such as '{"img_size": 96}'."""

    swap: str | None = None
    """A form of attention to swap in, such as agent or moh."""

    swap_options: Options = "{}"
    """Options of the swap, such as '{"num_agents": 16}'."""

    pretrained: bool = False
    """Start from timm's weights, from the disk or the hub."""

    head: bool = False
    """Train the last part alone: the classifier, or the decoder."""

    epochs: int = 30
    """How often every picture is seen."""

    batch: int = 32
    """Pictures per step and process."""

    lr: float = 1e-3
    """Learning rate at its highest."""

    weight_decay: float = 0.05
    """Weight decay of AdamW."""

    warmup: int = 2
    """Epochs in which the learning rate rises."""

    crop: float = 0.4
    """Least share of a picture that is cut out while training."""

    size: int | None = None
    """Side of the pictures in pixels, the model's own if not given."""

    held_out: float = 0.2
    """Share of pictures to test on, where the folder has no train and val."""

    amp: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision."""

    ema: float = 0.0
    """Decay of a running average of the weights, such as 0.999; 0 for none."""

    workers: int = 0
    """Processes that load pictures."""

    seed: int = 0
    """Seed of weights, order and augmentation."""

    resume: bool = False
    """Go on where a training into --out stopped."""

    def train(self, task: str, **more: Any) -> Result:
        """Train, and tell the scores and the files."""
        say(f"Reading {self.data}")  # before torch is imported, which takes seconds

        from attnctl.pipelines.vision.own_pictures import Recipe, train_pictures

        shared = (
            "model", "swap", "pretrained", "head", "epochs", "batch", "lr", "weight_decay", "warmup", "crop",
            "size",
            "held_out", "amp", "ema", "workers", "seed",
        )  # fmt: skip
        try:
            recipe = Recipe(
                task=task, model_options=_options("--model-options", self.model_options),
                swap_options=_options("--swap-options", self.swap_options),
                **{name: getattr(self, name) for name in shared}, **more,
            )  # fmt: skip
        except ConfigError as error:
            raise UsageError(str(error)) from None
        done = train_pictures(self.data, self.out, recipe, resume=self.resume, announce=say)
        if not done.files:  # of several processes, one writes
            return Result(None, "")
        scores = done.run.scores
        each = scores.get("iou") or scores.get("recall") or {}
        name = "mean IoU" if "mean_iou" in scores else "accuracy"
        lines = [f"{name} {scores.get('mean_iou', scores['accuracy']):.3f} on the test pictures"]
        lines += [f"  {label}: {value:.3f}" for label, value in each.items()]
        lines += [str(file) for file in done.files]
        if not self.json:
            say(f"attnctl predict {self.out} PICTURES asks this run; attnctl export {self.out} writes ONNX.")
        data = {"scores": dict(scores), "losses": list(done.losses), "files": [str(f) for f in done.files]}
        return Result(data, "\n".join(lines))


def _options(flag: str, text: str) -> dict[str, Any]:
    value: Any = None
    with contextlib.suppress(UsageError):
        value = parse_json(text, flag, Expected("options", UsageError))
    if not isinstance(value, dict):
        raise UsageError(f"{flag}={text!r} was given; expected a JSON object such as '{{\"img_size\": 96}}'.")
    return value
