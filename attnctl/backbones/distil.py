"""Teach a swapped form what softmax computed in its place, layer by layer, before it is trained any further.

attnctl.swap(model, "hedgehog")
distil(model, images, loss="weights")
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnctl.backbones.hosts import Host
from attnctl.backbones.mixers import Mixer
from attnctl.backbones.modes import evaluating
from attnctl.data.progress import tracked
from attnctl.errors import ConfigError

__all__ = ["distil"]


def distil(
    model: nn.Module,
    images: Tensor,
    *,
    loss: str = "outputs",
    epochs: int = 4,
    batch: int = 32,
    lr: float = 1e-2,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, tuple[float, float]]:
    """Train every mixer of a swapped model alone to give what softmax gives on the same queries, keys and values.

    While it runs, softmax takes the mixers' places, so each layer sees what it would in the model before the swap.
    loss: "outputs" is the mean squared error of what comes out, divided by the variance of softmax's, for every mixer;
    "weights" the cross-entropy of softmax's weights with the mixer's, for mixers with `weights(q, k)` (Hedgehog), or
    the mixer's own `weights_error(q, k, softmax)` (Sparsifiner, whose predictor is else frozen).

    Returns the loss of every mixer before and after, by name. Raises: ConfigError for a model without mixers, another
    loss, or mixers without weights.
    """
    mixers = {n: m for n, m in model.named_modules() if isinstance(m, Mixer) and any(True for _ in m.parameters())}
    if not any(isinstance(m, Host) for m in model.modules()) or not mixers:
        raise ConfigError(f"This {type(model).__name__} has no swapped form to teach. Call attnctl.swap first.")
    if loss not in ("outputs", "weights"):
        raise ConfigError(f"loss={loss!r} was given; expected 'outputs' or 'weights'.")
    silent = [n for n, m in mixers.items() if not (hasattr(m, "weights") or hasattr(m, "weights_error"))]
    if loss == "weights" and silent:
        raise ConfigError(f"{silent[0]} computes no weights to compare. Take loss='outputs'.")
    frozen = [n for n, m in mixers.items() if hasattr(m, "weights_error")]
    if loss == "outputs" and frozen:
        raise ConfigError(f"{frozen[0]} chooses keys, which what comes out does not teach. Take loss='weights'.")
    errors: Callable[..., Tensor] = _of_weights if loss == "weights" else _of_outputs
    optimizers = {n: torch.optim.Adam(m.parameters(), lr=lr) for n, m in mixers.items()}
    order = torch.Generator().manual_seed(seed)
    first: dict[str, list[float]] = {n: [] for n in mixers}
    last: dict[str, list[float]] = {n: [] for n in mixers}
    with evaluating(model), contextlib.ExitStack() as undo:
        for parameter in (p for m in mixers.values() for p in m.parameters()):
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_()
        seen = _Softmax(mixers, undo)
        for epoch in tracked(range(epochs), "epoch", "distil", quiet=quiet):
            for chosen in torch.randperm(len(images), generator=order).split(batch):
                with torch.no_grad():
                    model(images[chosen.to(images.device)])
                for name, call in seen.take().items():
                    optimizers[name].zero_grad(set_to_none=True)
                    with torch.enable_grad():
                        error = errors(mixers[name], *call)
                        error.backward()
                    if epoch == 0 and len(first[name]) < 1:
                        first[name].append(float(error.detach()))
                    optimizers[name].step()
                    last[name].append(float(error.detach()))
    steps = -(-len(images) // batch)
    return {n: (first[n][0], sum(last[n][-steps:]) / steps) for n in mixers}


class _Softmax:
    """Answers for mixers with softmax, and keeps what they were called with."""

    def __init__(self, mixers: dict[str, Mixer], undo: contextlib.ExitStack) -> None:
        self._calls: dict[str, tuple[Any, ...]] = {}
        self._teaching = False
        for name, mixer in mixers.items():
            undo.callback(mixer.register_forward_hook(self._answer(name)).remove)

    def take(self) -> dict[str, tuple[Any, ...]]:
        """Return the calls of the last pass, and forget them."""
        calls, self._calls = self._calls, {}
        return calls

    def _answer(self, name: str) -> Any:
        def hook(mixer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            if torch.is_grad_enabled():  # the mixer itself is being taught
                return None
            q, k, v, x, grid = args
            softmax = F.scaled_dot_product_attention(q, k, v, scale=float(mixer.scale))  # type: ignore[arg-type]
            self._calls[name] = (q, k, v, x, grid, softmax)
            return softmax

        return hook


def _of_outputs(mixer: nn.Module, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Any, softmax: Tensor) -> Tensor:
    return F.mse_loss(mixer(q, k, v, x, grid).float(), softmax.float()) / softmax.float().var().clamp(min=1e-12)


def _of_weights(mixer: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: Any, softmax: Tensor) -> Tensor:
    target = (q.float() @ k.float().mT * mixer.scale).softmax(-1)
    if hasattr(mixer, "weights_error"):
        return mixer.weights_error(q, k, target)
    return -(target * mixer.weights(q, k).clamp(min=1e-12).log()).sum(-1).mean()
