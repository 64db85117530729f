"""One training loop for the vision jobs: AdamW, one cycle, a progress bar, a curve."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.data.pictures import blank_figure
from attnctl.data.progress import Progress
from attnctl.errors import ConfigError
from attnctl.plans.writing import publish

__all__ = ["fit", "write_fit"]

Loss = Callable[[Tensor, Tensor], Tensor]


def fit(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    epochs: int = 10,
    batch: int = 64,
    lr: float = 3e-3,
    weight_decay: float = 0.02,
    seed: int = 0,
    quiet: bool = False,
    done: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train a model and return the mean loss of every epoch; `done` is called after each.

    images: [n, C, H, W]; targets: [n, ...]. The order of the samples is a function of the seed, and no global random
    state is drawn from but for dropout. Raises: ConfigError for an empty plan or counts that differ.
    """
    if epochs < 1 or batch < 1 or len(images) != len(targets) or len(images) < batch:
        raise ConfigError(
            f"epochs={epochs}, batch={batch}, {len(images)} images and {len(targets)} targets were given; expected "
            "positive counts, one target an image, and at least one full batch."
        )
    order = torch.Generator().manual_seed(seed)
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    model.train()
    curve = []
    shown = Progress(epochs, "epoch", "train", quiet=quiet)
    for _ in range(epochs):
        total = torch.zeros((), device=images.device)
        for chosen in torch.randperm(len(images), generator=order)[: steps * batch].split(batch):
            error = loss(model(images[chosen]), targets[chosen])
            optimizer.zero_grad(set_to_none=True)
            error.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += error.detach()
        curve.append(float(total) / steps)
        shown.describe(f"loss {curve[-1]:.3f}")
        shown.update()
        done()
    shown.close()
    model.eval()
    return curve


def write_fit(out: Path, model: nn.Module, curve: list[float], predictions: Any) -> tuple[Path, ...]:
    """Write the weights, the training curve and a figure of predictions into a folder; return the files.

    Raises: ConfigError without matplotlib, WriteError where the disk is full.
    """
    from safetensors.torch import save

    figure = blank_figure(5, 3)
    axes = figure.subplots()
    axes.plot(range(1, len(curve) + 1), curve)
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    weights = save({k: v.contiguous() for k, v in model.state_dict().items()})
    content = {"weights.safetensors": weights, "curve.png": _png(figure), "predictions.png": _png(predictions)}
    files = {out / name: data for name, data in content.items()}
    publish(files, force=True)
    return tuple(files)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
