"""The training loop that every shapes model shares: seeded, resumable, without pickles.

Randomness is stateless: everything drawn for step i comes from a generator seeded by (seed, i). So a run that is killed
and resumed sees the same batches, noise and timesteps as one that ran through, and nothing but the step number, the
weights and the optimiser's moments has to be saved.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attnctl.errors import ConfigError
from attnctl.shapes.training.muon import Muon

__all__ = [
    "Plan",
    "average_decay",
    "learning_rate",
    "load_checkpoint",
    "mend_checkpoint",
    "named_parameters",
    "read_history",
    "read_step",
    "step_generator",
    "train",
]

_FILES = ("weights.safetensors", "average.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Say how long and how fast to train; `cooldown` is the last fraction of the steps, where lr falls to 0."""

    steps: int
    optimizer: str = "adam"
    lr: float = 1e-3
    warmup: int = 100
    cooldown: float = 0.3
    weight_decay: float = 0.01
    average: float = 0.998
    clip: float = 1.0
    seed: int = 0
    save_every: int = 250

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "muon"):
            raise ConfigError(f"optimizer must be 'adam' or 'muon', got {self.optimizer!r}.")
        if self.steps < 1 or self.save_every < 1:
            raise ConfigError(f"steps and save_every must be at least 1, got {self.steps} and {self.save_every}.")


def learning_rate(step: int, plan: Plan) -> float:
    """Return the rate of step 0, 1, ...: a linear warm-up, a plateau, a linear fall to zero."""
    # A plateau lets a resumed run be given more steps without a jump, unlike a cosine.
    rise = min(1.0, (step + 1) / max(1, plan.warmup))
    fall = min(1.0, (plan.steps - step) / max(1.0, plan.cooldown * plan.steps))
    return plan.lr * min(rise, fall)


def average_decay(step: int, plan: Plan) -> float:
    """Return the decay of the weight average, which ramps up so that early weights are forgotten."""
    return min(plan.average, (1 + step) / (10 + step))


def step_generator(seed: int, step: int) -> torch.Generator:
    """Make the generator of one training step."""
    # Philox-like spreading is not needed: mt19937 seeds that differ by a large odd stride are independent enough.
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % 2**63)


def train(
    modules: dict[str, nn.Module],
    loss: Callable[[torch.Generator, int], Tensor],
    out: str | Path,
    plan: Plan,
    *,
    facts: Mapping[str, object] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """Train `modules` on `loss` and return the averaged weights, named "module/parameter".

    Args:
        modules: what is trained; changed in place.
        loss: called with the generator of a step and its number; draws its batch and returns a scalar.
        out: folder for `log.jsonl` and `checkpoint/`.
        plan: length and rates.
        facts: what else defines the run; kept in the checkpoint's history with the step from which it held.
        resume: go on from `out/checkpoint` where there is one.
        quiet: no progress bar.

    Raises:
        ConfigError: `out` holds a checkpoint and `resume` is false, or the checkpoint is damaged.
    """
    from tqdm import tqdm

    out = Path(out)
    params = named_parameters(modules)
    average = {n: p.detach().clone() for n, p in params.items()}
    optimizer = _optimizer(params, plan)
    start = 0
    history: list[dict[str, object]] = []
    if mend_checkpoint(out):
        if not resume:
            raise ConfigError(f"{out} already holds a checkpoint: pass --resume to go on, or another --out.")
        start = load_checkpoint(out, params, average, optimizer)
        history = read_history(out)
    facts = json.loads(json.dumps({**asdict(plan), **(facts or {})}))  # as they read back
    if not history or any(history[-1].get(key) != value for key, value in facts.items()):
        history.append({"from": start, **facts})
    out.mkdir(parents=True, exist_ok=True)
    _cut_log(out / "log.jsonl", start)
    began, mean = time.monotonic(), None
    bar = tqdm(range(start, plan.steps), initial=start, total=plan.steps, disable=quiet, mininterval=5)
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        for step in bar:
            rate = learning_rate(step, plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            value = loss(step_generator(plan.seed, step), step)
            value.backward()
            norm = nn.utils.clip_grad_norm_(params.values(), plan.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _update_average(average, params, average_decay(step, plan))
            mean = value.item() if mean is None else 0.98 * mean + 0.02 * value.item()
            done = step + 1
            if done % 10 == 0 or done == plan.steps:
                row = {"step": done, "loss": round(value.item(), 5), "mean": round(mean, 5), "lr": rate}
                row |= {"norm": round(float(norm), 4), "seconds": round(time.monotonic() - began, 1)}
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{mean:.4f}")
            if done % plan.save_every == 0 or done == plan.steps:
                _save_checkpoint(out, done, params, average, optimizer, history)
    return average


def named_parameters(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Name the trained parameters of several modules "module/parameter"."""
    return {f"{m}/{n}": p for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad}


def load_checkpoint(
    out: str | Path,
    params: dict[str, Tensor] | None,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Read `out/checkpoint` into the given tensors and return its step.

    Raises:
        ConfigError: a file is missing, damaged or of another model.
    """
    mend_checkpoint(out)
    folder = Path(out) / "checkpoint"
    for name in _FILES:
        if not (folder / name).exists():
            raise ConfigError(f"The checkpoint lacks {folder / name}: delete {folder} and train anew.")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        _copy(load_file(folder / "average.safetensors"), average)
        if params is not None:
            _copy(load_file(folder / "weights.safetensors"), params)
        if optimizer is not None:
            assert params is not None
            moments = load_file(folder / "optimizer.safetensors")
            for key, tensor in moments.items():
                kind, _, name = key.partition(":")
                optimizer.state[params[name]][kind] = tensor
    except (KeyError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise ConfigError(f"The checkpoint {folder} cannot be read ({error}): delete it and train anew.") from error
    return int(state["step"])


def mend_checkpoint(out: str | Path) -> bool:
    """Tell whether `out` holds a checkpoint, after the new one took the old one's place if a kill came in between."""
    fresh, old, final = (Path(out) / name for name in ("checkpoint.new", "checkpoint.old", "checkpoint"))
    if old.exists() and not final.exists():
        os.replace(fresh if fresh.exists() else old, final)
    return (final / "state.json").exists()


def read_step(out: str | Path) -> int:
    """Read from a checkpoint how many steps were made."""
    return int(json.loads((Path(out) / "checkpoint" / "state.json").read_text(encoding="utf-8"))["step"])


def read_history(out: str | Path) -> list[dict[str, object]]:
    """Read from a checkpoint what the run was told, and from which step on."""
    state = json.loads((Path(out) / "checkpoint" / "state.json").read_text(encoding="utf-8"))
    return state.get("history", [])


def _optimizer(params: dict[str, Tensor], plan: Plan) -> torch.optim.Optimizer:
    if plan.optimizer == "adam":
        return torch.optim.AdamW(params.values(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay)
    # Rows of an embedding are words, and the last layer's outputs are channels: neither is one matrix to rotate.
    # Nor are the gains of norms and the tables of shifts, whatever their number of dimensions.
    words = ("embedding.weight", "conv_out", "conv_in", "shared.weight", "attention_bias", "gamma", "shift_table")
    ends = ("transformer/pos_embed", "transformer/proj_out")
    plain = [p for n, p in params.items() if n.startswith(ends) or any(w in n for w in words)]
    return Muon(params.values(), plain=plain, lr=plan.lr, weight_decay=plan.weight_decay)


def _save_checkpoint(
    out: Path,
    step: int,
    params: dict[str, Tensor],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, object]],
) -> None:
    # Written beside the old one and then renamed: a kill in between leaves one whole checkpoint.
    fresh, old, final = out / "checkpoint.new", out / "checkpoint.old", out / "checkpoint"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in params.items()}, fresh / "weights.safetensors")
    save_file({n: a.contiguous() for n, a in average.items()}, fresh / "average.safetensors")
    moments = {f"{k}:{n}": v.contiguous() for n, p in params.items() for k, v in optimizer.state[p].items()}
    save_file(moments, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps({"step": step, "history": history}), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def _update_average(average: dict[str, Tensor], params: dict[str, Tensor], decay: float) -> None:
    torch._foreach_lerp_(list(average.values()), list(params.values()), 1 - decay)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    if source.keys() != target.keys():
        raise ValueError("it belongs to another model")
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _cut_log(path: Path, step: int) -> None:
    # Lines after the checkpoint are of steps that will be run again.
    if path.exists():
        lines = [x for x in path.read_text(encoding="utf-8").splitlines() if x and json.loads(x)["step"] <= step]
        path.write_text("".join(x + "\n" for x in lines), encoding="utf-8")
