"""Train a timm model on a folder of pictures: classification, or segmentation with a decoder of smp.

Data loading, augmentation, mixup, losses, optimizer, schedule and the running average are timm's; decoders and their
losses are segmentation-models-pytorch's, scores torchmetrics', and several processes accelerate's.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnctl.backbones.mixers.moh import balance
from attnctl.data.pictures import blank_figure
from attnctl.data.progress import Progress
from attnctl.errors import ConfigError
from attnctl.pipelines.vision.charts import write_charts
from attnctl.pipelines.vision.folders import IGNORED, Masks, Pictures, Split, check_pictures, find_classes, find_masks
from attnctl.pipelines.vision.runs import Run, build_model, check_name, read_checkpoint, resumption, save_checkpoint
from attnctl.plans.writing import check_writable

__all__ = ["Recipe", "Trained", "train_pictures"]

_BALANCE = 0.01  # weight of MoH's load balance, as in its paper


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained on a folder of pictures.

    Attributes:
        task: "classify" or "segment". model: A timm name. decoder: Of segmentation-models-pytorch.
        swap, swap_options, model_options: As for `attnctl.swap` and timm.
        pretrained: Start from timm's weights. head: Train the classifier alone (for "segment": the decoder).
        epochs, batch, lr, weight_decay, warmup: The schedule is a cosine after so many epochs of warmup.
        crop: Least share of a picture that is cut out while training; timm's 0.08 needs many pictures.
        size: Side of the pictures in pixels, the model's own if None. held_out: Share of pictures to test on where the
            folder has no split.
        amp: "no", "fp16" or "bf16". ema: Decay of the running average of weights, 0 for none.
        mixup, cutmix, smoothing: Strengths, 0 for none; for "classify".
        workers: Processes that load pictures. seed: Of weights, order and augmentation.
    """

    task: str = "classify"
    model: str = "biformer_micro"
    decoder: str = "unet"
    swap: str | None = None
    swap_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    head: bool = False
    epochs: int = 30
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 2
    crop: float = 0.4
    size: int | None = None
    held_out: float = 0.2
    amp: str = "no"
    ema: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        positive = {"epochs": self.epochs, "batch": self.batch, "lr": self.lr, "crop": self.crop}
        positive |= {} if self.size is None else {"size": self.size}
        counts = ("weight_decay", "warmup", "mixup", "cutmix", "workers", "seed")
        shares = {"held_out": self.held_out, "ema": self.ema, "smoothing": self.smoothing}
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name}={value} was given; expected above 0.")
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value} was given; expected 0 or more, below 1.")
        for name in counts:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} was given; expected 0 or more.")
        if self.crop > 1:
            raise ConfigError(f"crop={self.crop} was given; expected a share of the picture, at most 1.")
        if self.task == "segment" and (self.mixup or self.cutmix or self.smoothing):
            raise ConfigError("mixup, cutmix and smoothing are for classes; leave them out for masks.")
        if self.amp not in ("no", "fp16", "bf16"):
            raise ConfigError(f"amp={self.amp!r} was given; expected 'no', 'fp16' or 'bf16'.")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came out: the run as it was written, the loss and the test score of every epoch, the files."""

    run: Run
    losses: tuple[float, ...]
    scores: tuple[float, ...]
    files: tuple[Path, ...]


def train_pictures(
    data: Path,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    announce: Callable[[str], object] = lambda text: None,
) -> Trained:
    """Train on a folder of pictures and write the run to `out`: model.safetensors, run.json, and pictures of scores.

    Every epoch is kept in `out/checkpoint`; with resume=True training goes on there and sees the same batches as one
    that ran through. `announce` is called with what is trained on what, before it begins. Raises: ConfigError for
    folders, pictures and options that cannot be used, naming them; WriteError where the disk is full.
    """
    _check_packages(recipe.task)
    check_name(recipe.model)
    if not resume and (out / "run.json").exists():
        raise ConfigError(f"{out} already holds a run: choose another folder, or go on with resume (--resume).")
    if not resume and (out / "checkpoint").exists():
        raise ConfigError(
            f"{out} holds a training that stopped: go on with resume (--resume), or choose another folder."
        )
    check_writable(out)
    find = find_classes if recipe.task == "classify" else find_masks
    split = find(data, held_out=recipe.held_out, seed=recipe.seed)
    check_pictures([p for p, _ in (*split.train, *split.test)])
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=recipe.amp)
    run = _described(recipe, split)
    if accelerator.is_main_process:
        size = "x".join(str(n) for n in run.size[::-1])
        announce(split.describe())
        announce(f"{recipe.model} at {size} on {accelerator.device}, {recipe.epochs} epochs")
    with _global_randomness_kept():
        torch.manual_seed(recipe.seed)
        model = build_model(run, recipe.pretrained)
        return _Training(recipe, run, split, model, out, accelerator).go(resume, announce)


@contextlib.contextmanager
def _global_randomness_kept() -> Iterator[None]:
    """Put the random states back that timm's augmentation and mixup draw from."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Training:
    """One training: its parts from timm, smp and accelerate, and where it stands."""

    def __init__(self, recipe: Recipe, run: Run, split: Split, model: nn.Module, out: Path, accelerator: Any) -> None:
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        self.recipe, self.run, self.out, self.accelerator = recipe, run, out, accelerator
        self.split = split
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.train, self.test = _loaders(recipe, run, split, accelerator.device)
        trained = _trained_part(model, recipe)
        self.optimizer = create_optimizer_v2(trained, "adamw", lr=recipe.lr, weight_decay=recipe.weight_decay)
        updates = max(1, len(self.train) // accelerator.num_processes)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=recipe.epochs, warmup_epochs=min(recipe.warmup, recipe.epochs - 1),
            warmup_lr=recipe.lr * 0.01, step_on_epochs=False, updates_per_epoch=updates,
        )  # fmt: skip
        self.average = ModelEmaV3(model.to(accelerator.device), decay=recipe.ema) if recipe.ema else None
        self.model, self.optimizer, self.train, self.test = accelerator.prepare(
            model, self.optimizer, self.train, self.test
        )
        self.mix, self.loss = _losses(recipe, len(split.classes))

    @property
    def plain(self) -> nn.Module:
        """Return the model as it is trained, without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def go(self, resume: bool, announce: Callable[[str], object]) -> Trained:
        """Train what is left, test after every epoch, and write the run."""
        start = 0
        if resume:
            start = self._resume(announce)
        epochs, steps = self.recipe.epochs, len(self.train)
        quiet = not self.accelerator.is_main_process
        shown, marks = Progress(epochs * steps, "step", "train", done=start * steps, quiet=quiet), ""
        for epoch in range(start, epochs):
            shown.describe(f"epoch {epoch + 1} of {epochs}{marks}")
            self.losses.append(self._epoch(epoch, shown.update))
            self.scores.append(self._score(self._matrix()))
            marks = f", loss {self.losses[-1]:.3f}, score {self.scores[-1]:.3f}"
            if self.accelerator.is_main_process:
                state = {"epoch": epoch + 1, "losses": self.losses, "scores": self.scores, "classes": self.run.classes}
                state["recipe"] = asdict(self.recipe)
                average = None if self.average is None else self.average.module
                save_checkpoint(self.out, self.plain, average, self.optimizer.optimizer, state)
            self.accelerator.wait_for_everyone()
        shown.close()
        matrix = self._matrix(keep=12)
        self.run = replace(self.run, scores=_summary(self.recipe.task, matrix, self.run.classes))
        files: tuple[Path, ...] = ()
        if self.accelerator.is_main_process:
            files = write_charts(self.out, self.run, self._best(), self.losses, self.scores, matrix, self.examples)
        return Trained(run=self.run, losses=tuple(self.losses), scores=tuple(self.scores), files=files)

    def _resume(self, announce: Callable[[str], object]) -> int:
        average = None if self.average is None else self.average.module
        state = read_checkpoint(self.out, self.plain, average, self.optimizer.optimizer)
        if state and tuple(state["classes"]) != self.run.classes:
            raise ConfigError(
                f"{self.out} was trained on the classes {', '.join(state['classes'])}; the folder has "
                f"{', '.join(self.run.classes)}. Choose another folder for this training."
            )
        if self.accelerator.is_main_process:
            announce(resumption(state, asdict(self.recipe)))
        self.losses, self.scores = list(state.get("losses", [])), list(state.get("scores", []))
        return int(state.get("epoch", 0))

    def _epoch(self, epoch: int, tick: Callable[[], object]) -> float:
        from timm.utils import random_seed

        # A resumed training sees the same batches.
        random_seed(self.recipe.seed * 1009 + epoch, self.accelerator.process_index)
        self.model.train()
        if self.recipe.head:
            _backbone(self.plain).eval()
        total, count, updates = 0.0, 0, epoch * len(self.train)
        for images, targets in self.train:
            if self.mix is not None and len(images) % 2 == 0:
                images, targets = self.mix(images, targets)
            elif self.mix is not None:
                targets = nn.functional.one_hot(targets, len(self.run.classes)).float()
            self.schedule.step_update(updates)
            with self.accelerator.autocast():
                error = self.loss(self.model(images), targets) + _BALANCE * balance(self.plain)
            if not torch.isfinite(error):
                raise ConfigError(f"The loss is {float(error)} in epoch {epoch + 1}: lower the learning rate.")
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(error)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            updates += 1
            tick()
            if self.average is not None:
                self.average.update(self.plain, step=updates)
            total, count = total + float(error.detach()) * len(images), count + len(images)
        return total / max(1, count)

    def _best(self) -> nn.Module:
        """Return the model that is tested and kept: the running average where there is one."""
        return self.plain if self.average is None else self.average.module

    @torch.inference_mode()
    def _matrix(self, keep: int = 0) -> Tensor:
        """Count test pictures, or pixels, by true and answered class, [true, answered]; keep some answers."""
        from torchmetrics.classification import MulticlassConfusionMatrix

        counter = MulticlassConfusionMatrix(len(self.run.classes), ignore_index=IGNORED).to(self.accelerator.device)
        model = self._best().eval()
        self.examples: list[tuple[Tensor, Tensor, Tensor]] = []
        for images, targets in self.test:
            answers = model(images).argmax(1)
            answers, targets, images = self.accelerator.gather_for_metrics((answers, targets, images))
            counter.update(answers, targets)
            for triple in zip(images.cpu(), targets.cpu(), answers.cpu(), strict=True):
                if len(self.examples) < keep or (keep and self.recipe.task == "classify" and triple[1] != triple[2]):
                    self.examples.append(triple)
        if keep and self.recipe.task == "classify":
            self.examples = sorted(self.examples, key=lambda t: bool(t[1] == t[2]))[:keep]
        return counter.compute().cpu()

    def _score(self, matrix: Tensor) -> float:
        summary = _summary(self.recipe.task, matrix, self.run.classes)
        return float(summary["accuracy" if self.recipe.task == "classify" else "mean_iou"])


def _check_packages(task: str) -> None:
    try:
        import torchmetrics  # noqa: F401

        if task == "segment":
            import segmentation_models_pytorch  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'attnctl[vision]'.") from error
    blank_figure(1, 1)  # a missing package is said before the training, not after it


def _described(recipe: Recipe, split: Split) -> Run:
    """Describe the run, with the size and colours that timm names for the model."""
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    run = Run(
        task=recipe.task, model=recipe.model, classes=split.classes, swap=recipe.swap,
        decoder=recipe.decoder if recipe.task == "segment" else None, swap_options=dict(recipe.swap_options),
        model_options=dict(recipe.model_options),
    )  # fmt: skip
    cfg: Any = get_pretrained_cfg(recipe.model)
    config = resolve_data_config({}, pretrained_cfg=None if cfg is None else cfg.to_dict())
    model_size = recipe.model_options.get("img_size", config["input_size"][-2:])
    height, width = (model_size, model_size) if isinstance(model_size, int) else model_size
    if recipe.size is not None:
        height = width = recipe.size
    if recipe.task == "segment" and (height % 32 or width % 32):
        raise ConfigError(f"size={height} was given; decoders need a multiple of 32.")
    return replace(
        run, size=(int(height), int(width)), mean=tuple(config["mean"]), std=tuple(config["std"]),
        interpolation=config["interpolation"], crop=float(config["crop_pct"]),
    )  # fmt: skip


def _loaders(recipe: Recipe, run: Run, split: Split, device: torch.device) -> tuple[Any, Any]:
    """Build timm's loaders of classes, or loaders of masks."""
    from timm.data import create_loader
    from torch.utils.data import DataLoader

    batch = min(recipe.batch, len(split.train))
    if recipe.task == "segment":
        size = run.size
        train = Masks(split.train, size, run.mean, run.std, training=True)
        test = Masks(split.test, size, run.mean, run.std, training=False)
        return (
            DataLoader(train, batch, shuffle=True, drop_last=len(train) > batch, num_workers=recipe.workers),
            DataLoader(test, batch, num_workers=recipe.workers),
        )
    shared: dict[str, Any] = {
        "input_size": (3, *run.size), "batch_size": batch, "mean": run.mean, "std": run.std, "device": device,
        "interpolation": run.interpolation, "crop_pct": run.crop, "use_prefetcher": False,
        "num_workers": recipe.workers, "persistent_workers": recipe.workers > 0,
    }  # fmt: skip
    return (
        create_loader(Pictures(split.train), is_training=True, scale=(recipe.crop, 1.0), **shared),
        create_loader(Pictures(split.test), is_training=False, **shared),
    )


def _losses(recipe: Recipe, classes: int) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    """Return timm's mixup, or None, and the loss."""
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if recipe.task == "segment":
        import segmentation_models_pytorch as smp

        dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORED)
        cross = nn.CrossEntropyLoss(ignore_index=IGNORED)
        return None, lambda answers, targets: cross(answers, targets) + dice(answers, targets)
    if recipe.mixup or recipe.cutmix:
        mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
        return mix, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(recipe.smoothing) if recipe.smoothing else nn.CrossEntropyLoss()


def _backbone(model: nn.Module) -> nn.Module:
    return model.encoder if hasattr(model, "encoder") and hasattr(model, "decoder") else model  # type: ignore[return-value]


def _trained_part(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Freeze what is not trained, and return what is."""
    if not recipe.head:
        return model
    for p in _backbone(model).parameters():
        p.requires_grad_(False)
    if recipe.task == "segment":
        return model
    get: Any = model.get_classifier
    for p in get().parameters():
        p.requires_grad_(True)
    return model


def _summary(task: str, matrix: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Compute scores from counts [true, answered]: accuracy, or intersection over union of every class that occurs."""
    hits = matrix.diagonal().double()
    accuracy = float(hits.sum() / matrix.sum().clamp(min=1))
    if task == "classify":
        recall = hits / matrix.sum(1).clamp(min=1)
        return {"accuracy": accuracy, "recall": dict(zip(classes, recall.tolist(), strict=True))}
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou = {c: float(h / u) for c, h, u in zip(classes, hits, union, strict=True) if u > 0}
    with contextlib.suppress(ZeroDivisionError):
        return {"accuracy": accuracy, "iou": iou, "mean_iou": sum(iou.values()) / len(iou)}
    return {"accuracy": 0.0, "iou": {}, "mean_iou": 0.0}
