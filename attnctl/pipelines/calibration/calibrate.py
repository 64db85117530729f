"""Calibrate block-sparse attention: run a pipeline on a few prompts, see where the mass lies, and write a plan.

Two looks at the model. The first adds up the blocks of every attention in all orders, tiles among them, and chooses one
a head; the second adds them up again in that order, for each part of the run; where the run has one part, the first
look is enough.
No map is ever built: `attnctl.kernels.sparse.block_mass` takes a few rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnctl.core.sites import Selector
from attnctl.data.progress import Progress
from attnctl.errors import ConfigError, PlanError, shown
from attnctl.kernels.sparse.block_mass import choose_masks, choose_masks_together, choose_orders
from attnctl.pipelines.calibration.measure import Settings, Sums, over_prompts, runner
from attnctl.pipelines.refusals import check_arguments, check_pipeline, check_prompts
from attnctl.pipelines.stepping import showing_steps
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.plans.orders import LAYOUTS, order_name
from attnctl.plans.reading import Expected, read_bytes
from attnctl.plans.writing import publish, recover

__all__ = ["Calibration", "calibrate", "checked"]

METRICS = ("mass", "paro", "paro_literal")
BUDGETS = ("head", "site", "model")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibration found.

    Attributes:
        plan: Plans of all sites; save it with `plan.save_pretrained(folder)`.
        rows: For every site: its name, orders by number of heads, the captured mass of the image's attention, that of
            the model's own order at the same density, the share of a row's whole attention that is dropped, a bound on
            the error that follows from it (twice as much, as a share of the largest value), and the density that runs,
            of the image's blocks and with the text.
        mass: For every site the blocks' sums, in the model's order and in the chosen one [2, H, nq, nk], for pictures.
    """

    plan: ModelPlan
    rows: tuple[Mapping[str, Any], ...]
    mass: Mapping[str, Tensor]

    @property
    def captured(self) -> float:
        """Mean share of the image's attention that the plan keeps."""
        return sum(r["captured"] for r in self.rows) / len(self.rows)


def calibrate(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    density: float = 0.5,
    block: int = 64,
    block_q: int | None = None,
    groups: int = 1,
    metric: str = "mass",
    sites: Selector | None = None,
    budget: str = "head",
    eps: float = 1e-3,
    sigma: float = 0.9,
    alpha: float = 0.5,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    model: str | None = None,
    quiet: bool = False,
) -> Calibration:
    """Choose each head's order and blocks from a few runs of a pipeline ("PAROAttention", arXiv 2506.16054).

    Args:
        pipe: A diffusers pipeline.
        prompts: One or two are enough; the plan is shared by all prompts. Each is a text, or arguments of the call in
            its place, such as embeddings.
        density: Share of the image's blocks to keep, in (0, 1].
        block: Tokens in a block of keys, and of queries unless `block_q` says otherwise.
        block_q: Tokens in a block of queries.
        groups: Parts of the run with blocks of their own; the order is the same for all.
        metric: How orders are judged: "mass", "paro" or "paro_literal" (see `choose_orders`).
        sites: Which attention; None for all self and joint attention whose grid is known.
        budget: Who has that share of blocks: "head", each; "site", the heads of an attention share it; "model", all
            attentions do, so that those that look everywhere get more.
        eps: Entries below it count as empty, in the paper's marks.
        sigma: Share of empty entries from which a block counts as empty.
        alpha: Weight of the sparseness in the paper's formula.
        seed: Of the first prompt's noise; prompt i has seed + i.
        call: Other arguments of the pipeline call: steps, size, guidance.
        out: Folder for what has been measured so far: run again with it after an interruption, or from several
            processes at once (under torchrun or `accelerate launch`), and each prompt is run once.
        model: Name to keep in the plan.
        quiet: Show no progress bar.

    Returns:
        The plan and what it was chosen from.

    Raises:
        ConfigError: An argument is out of range, or no attention with a known grid was seen.
        PlanError: `out` holds the measurements of other settings.
    """
    settings = checked(density, block, block_q, groups, metric, eps, sigma, alpha, budget)
    check_pipeline(pipe, "calibrate")
    check_prompts(prompts)
    if call is not None and not isinstance(call, Mapping):
        raise ConfigError(f"call={shown(call)} was given; expected arguments, such as {{'num_inference_steps': 20}}.")
    check_arguments(pipe, call or ())
    store = None if out is None else Path(out)
    if store is not None:
        _claim(store, settings, prompts, seed, call)

    def look(name: str, parts: int, orders: Mapping[str, Sequence[int]] | None) -> dict[str, Sums]:
        run = runner(pipe, settings, sites, parts, orders, dict(call or {}))

        def showing(runs: int) -> AbstractContextManager[Progress]:
            return showing_steps(pipe, call, runs, f"calibrate {name}", quiet=quiet)

        return over_prompts(run, prompts, seed, store, name, showing)

    first = look("orders", 1, None)
    if not first:
        raise ConfigError("No self- or joint attention with a known token grid was seen: nothing can be calibrated.")
    _check_looks(first, first)
    orders = {n: choose_orders(s.average(), settings.density, metric, alpha)[0].tolist() for n, s in first.items()}
    second = first if groups == 1 else look("masks", groups, orders)
    _check_looks(first, second)
    texts = [p if isinstance(p, str) else f"({', '.join(p)})" for p in prompts]
    return _conclude(first, second, orders, settings, model, texts)


def _check_looks(first: Mapping[str, Sums], second: Mapping[str, Sums]) -> None:
    """Raise PlanError unless both looks at the model saw the same attention: a damaged store would pass for another."""
    for name in {**first, **second}:
        looks = [look[name] for look in (first, second) if name in look]
        (heads, orders, *blocks), *others = (next(iter(sums.mass.values())).shape for sums in looks)
        alike = all(other[0] == heads and list(other[2:]) == blocks for other in others)
        if len(looks) < 2 or not alike or orders != len(LAYOUTS) or looks[0].call != looks[1].call:
            raise PlanError(
                f"The measurements of {name} do not belong together: one of them is damaged. Delete the folder of "
                "measurements and run the calibration again."
            )


def checked(
    density: float, block: int, block_q: int | None, groups: int, metric: str, eps: float = 1e-3, sigma: float = 0.9,
    alpha: float = 0.5, budget: str = "head",
) -> Settings:  # fmt: skip
    """Return the settings of a calibration, or raise ConfigError for one that is out of range."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigError(f"density={density!r} was given; expected a share of the blocks above 0, up to 1.")
    height = block if block_q is None else block_q
    for name, value in (("block", block), ("block_q", height), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} was given; expected a whole number, 1 or more.")
    for name, share in (("eps", eps), ("sigma", sigma), ("alpha", alpha)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ConfigError(f"{name}={share!r} was given; expected a number from 0 to 1.")
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} was given; expected one of {', '.join(METRICS)}.")
    if budget not in BUDGETS:
        raise ConfigError(f"budget={budget!r} was given; expected one of {', '.join(BUDGETS)}.")
    return Settings(
        density=float(density), block_q=height, block_k=block, groups=groups, metric=metric, eps=eps, sigma=sigma,
        alpha=alpha, budget=budget,
    )  # fmt: skip


def _conclude(
    first: dict[str, Sums],
    second: dict[str, Sums],
    orders: dict[str, list[int]],
    settings: Settings,
    model: str | None,
    prompts: list[str],
) -> Calibration:
    """Choose the blocks and say how much they hold."""
    laid, model_mass = {}, {}
    for name, sums in second.items():
        heads, order = torch.arange(len(orders[name])), torch.tensor(orders[name])
        parts = [m[heads, order] if m.shape[1] == len(LAYOUTS) else m[:, 0] for m in sums.by_group()]
        laid[name], model_mass[name] = torch.stack(parts), first[name].average().mass[:, 0]
    keeps, in_model_order = _keep(laid, settings), _keep(model_mass, settings)
    plans: dict[str, BlockPlan] = {}
    rows: list[dict[str, Any]] = []
    for name, mass in laid.items():
        keep, call = keeps[name], second[name].call
        captured = float((mass * keep).sum() / mass.sum())
        dropped = float((mass * ~keep).sum(-1).mean())
        plans[name] = BlockPlan.from_mask(
            keep, settings.block_k, orders[name], call["n_text"], block_q=settings.block_q, grid=call["grid"],
            n_image=math.prod(call["grid"]), text_first=call["text_first"], about={"captured": round(captured, 6)},
        )  # fmt: skip
        rows.append({
            "site": name, "heads": len(orders[name]),
            "orders": {order_name(o): orders[name].count(o) for o in sorted(set(orders[name]))}, "captured": captured,
            "captured_model_order": float((model_mass[name] * in_model_order[name]).sum() / model_mass[name].sum()),
            "dropped": dropped, "predicted_error": 2 * dropped, "density_image": float(keep.float().mean()),
            "density": plans[name].density,
        })  # fmt: skip
    about = {
        "density": settings.density, "metric": settings.metric, "budget": settings.budget, "prompts": prompts,
        "captured": round(sum(r["captured"] for r in rows) / len(rows), 6),
    }  # fmt: skip
    pictures = {name: torch.stack([model_mass[name], mass.mean(0)]) for name, mass in laid.items()}
    return Calibration(plan=ModelPlan(plans=plans, model=model, about=about), rows=tuple(rows), mass=pictures)


def _keep(mass: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """Choose the blocks of every site by the budget that was asked for."""
    if settings.budget == "model":
        return dict(zip(mass, choose_masks_together(list(mass.values()), settings.density), strict=True))
    return {n: choose_masks(m, settings.density, together=settings.budget == "site") for n, m in mass.items()}


def _claim(
    store: Path,
    settings: Settings,
    prompts: Sequence[str | Mapping[str, Any]],
    seed: int,
    call: Mapping[str, Any] | None,
) -> None:
    """Make the folder this calibration's own, or see that it is."""
    identity = json.dumps(
        [vars(settings), repr(list(prompts)), seed, repr(sorted((call or {}).items()))], sort_keys=True
    )
    mark = hashlib.sha256(identity.encode()).hexdigest()
    path = store / "settings.sha256"
    recover(store)  # a mark that a killed run was just placing is written anew
    if path.exists():
        if read_bytes(path, Expected("the mark of a calibration", PlanError, 256)) != mark.encode():
            raise PlanError(f"{store} holds measurements of other prompts or settings: choose another folder.")
        return
    publish({path: mark.encode()}, force=True)  # processes that start together write the same
