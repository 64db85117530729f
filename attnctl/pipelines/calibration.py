"""Calibrate block-sparse attention: run a pipeline on a few prompts, see where the mass lies, and write a plan.

Two looks at the model. The first adds up the blocks of every attention in all six orders and chooses one a head; the
second adds them up again in that order, for each part of the run; where the run has one part, the first look is enough.
No map is ever built: `attnctl.kernels.block_mass` takes a few rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnctl.errors import ConfigError, PlanError
from attnctl.families import Family
from attnctl.intercept import AttnCall, Proceed, Wrapper
from attnctl.kernels.block_mass import BlockMass, block_mass, choose_masks, choose_orders
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.plans.orders import ORDERS, order_name
from attnctl.processors.base import Control
from attnctl.session import control
from attnctl.sites import Selector, Site, select

__all__ = ["Calibration", "calibrate"]

METRICS = ("mass", "paro", "paro_literal")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a calibration found.

    Attributes:
        plan: Plans of all sites; save it with `plan.save_pretrained(folder)`.
        rows: For every site: its name, orders by number of heads, the captured mass of the image's attention, that of
            the model's own order at the same density, and the density that runs, text included.
        mass: For every site the blocks' sums, in the model's order and in the chosen one [2, H, nq, nk], for pictures.
    """

    plan: ModelPlan
    rows: tuple[Mapping[str, Any], ...]
    mass: Mapping[str, Tensor]

    @property
    def captured(self) -> float:
        """Mean share of the image's attention that the plan keeps."""
        return sum(r["captured"] for r in self.rows) / len(self.rows)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    density: float
    block_q: int
    block_k: int
    groups: int
    metric: str
    eps: float
    sigma: float
    alpha: float
    together: bool


@dataclass
class _Sums:
    """Sums of one attention over the calls so far."""

    call: dict[str, Any]
    calls: int = 0
    mass: dict[int, Tensor] = field(default_factory=dict)
    marks: dict[str, Tensor] = field(default_factory=dict)

    def add(self, group: int, found: BlockMass) -> None:
        self.calls += 1
        self.mass[group] = self.mass.get(group, 0) + found.mass.cpu()
        for name, value in (("sparse", found.sparse), ("uneven", found.uneven)):
            if value is not None:
                self.marks[name] = self.marks.get(name, 0) + value.cpu()


@dataclass(frozen=True, kw_only=True)
class _Look(Control):
    """Watch the attention of a run and add up its blocks; nothing is changed."""

    settings: _Settings
    sums: dict[str, _Sums]
    groups: int
    unknown: set[str]
    orders: Mapping[str, Sequence[int]] | None = None

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")

    def default_sites(self, sites: Sequence[Site], family: Family) -> tuple[Site, ...]:
        return select(sites, [k for k in self.kinds if any(s.kind == k for s in sites)] or "self", what="calibrate")

    def needs_steps(self) -> bool:
        return self.groups > 1

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        s = self.settings

        def watch(call: AttnCall, proceed: Proceed) -> Tensor:
            grid = call.grid
            if grid is None:
                self.unknown.add(call.site.name)
            elif call.q.shape[2] == call.k.shape[2]:
                image = call.image or slice(0, call.q.shape[2])
                group = call.state.step * self.groups // max(call.state.steps or 1, 1) if self.groups > 1 else 0
                chosen = None if self.orders is None else [[o] for o in self.orders[call.site.name]]
                with torch.no_grad():
                    found = block_mass(
                        call.q, call.k, grid, s.block_q, s.block_k, image=image, scale=call.scale, orders=chosen,
                        eps=s.eps if s.metric != "mass" and chosen is None else None, sigma=s.sigma,
                    )  # fmt: skip
                facts = {
                    "grid": list(grid), "n_text": call.q.shape[2] - (image.stop - image.start),
                    "text_first": image.start > 0 or call.image is None,
                }  # fmt: skip
                held = self.sums.setdefault(call.site.name, _Sums(facts))
                if held.call["grid"] != facts["grid"]:
                    raise ConfigError(
                        f"{call.site.name} saw the grids {held.call['grid']} and {facts['grid']}: calibrate one "
                        "resolution at a time."
                    )
                held.add(min(group, self.groups - 1), found)
            return proceed(call)

        return watch


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
    together: bool = False,
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
        together: Let the heads of a site share one budget of blocks.
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
    settings = _checked(density, block, block_q, groups, metric, eps, sigma, alpha, together)
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(f"prompts={prompts!r} was given; expected a list of at least one prompt.")
    store = None if out is None else Path(out)
    if store is not None:
        _claim(store, settings, prompts, seed, call)

    def look(name: str, parts: int, orders: Mapping[str, Sequence[int]] | None) -> dict[str, _Sums]:
        run = _runner(pipe, settings, sites, parts, orders, dict(call or {}))
        return _over_prompts(run, prompts, seed, store, name, quiet)

    first = look("orders", 1, None)
    if not first:
        raise ConfigError("No self- or joint attention with a known token grid was seen: nothing can be calibrated.")
    orders = {n: choose_orders(_found(s), settings.density, metric, alpha)[0].tolist() for n, s in first.items()}
    second = first if groups == 1 else look("masks", groups, orders)
    texts = [p if isinstance(p, str) else f"({', '.join(p)})" for p in prompts]
    return _conclude(first, second, orders, settings, model, texts)


def _checked(
    density: float, block: int, block_q: int | None, groups: int, metric: str, eps: float, sigma: float, alpha: float,
    together: bool,
) -> _Settings:  # fmt: skip
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigError(f"density={density!r} was given; expected a share of the blocks above 0, up to 1.")
    height = block if block_q is None else block_q
    for name, value in (("block", block), ("block_q", height), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} was given; expected a whole number, 1 or more.")
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r} was given; expected one of {', '.join(METRICS)}.")
    return _Settings(
        density=float(density), block_q=height, block_k=block, groups=groups, metric=metric, eps=eps, sigma=sigma,
        alpha=alpha, together=together,
    )  # fmt: skip


def _runner(
    pipe: Any,
    settings: _Settings,
    sites: Selector | None,
    groups: int,
    orders: Mapping[str, Sequence[int]] | None,
    arguments: dict[str, Any],
) -> Callable[[str | Mapping[str, Any], int], dict[str, _Sums]]:
    """Return what runs one prompt and returns its sums."""

    def run(prompt: str | Mapping[str, Any], seed: int) -> dict[str, _Sums]:
        sums: dict[str, _Sums] = {}
        unknown: set[str] = set()
        told = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        options = {"generator": torch.Generator().manual_seed(seed), "output_type": "latent", **arguments, **told}
        watch = _Look(settings=settings, sums=sums, unknown=unknown, groups=groups, orders=orders, sites=sites)
        with control(pipe, watch):
            pipe(**options)
        if unknown:
            warnings.warn(
                f"attnctl: the token grid of {len(unknown)} sites is not known ({sorted(unknown)[0]}, ...): they get "
                "no plan and stay dense.",
                stacklevel=4,
            )
        return sums

    return run


def _over_prompts(
    run: Callable[[str | Mapping[str, Any], int], dict[str, _Sums]],
    prompts: Sequence[str | Mapping[str, Any]],
    seed: int,
    store: Path | None,
    name: str,
    quiet: bool,
) -> dict[str, _Sums]:
    """Run every prompt once, here or in another process, and add up."""
    from tqdm import tqdm

    rank, world, wait = _processes() if store is not None else (0, 1, lambda: None)
    held: dict[int, dict[str, _Sums]] = {}
    for i in tqdm(range(rank, len(prompts), world), desc=f"calibrate {name}", disable=True if quiet else None):
        path = None if store is None else store / f"{name}-{i}.safetensors"
        if path is not None and path.exists():
            continue
        held[i] = run(prompts[i], seed + i)
        if path is not None:
            _write(path, held[i])
    wait()
    total: dict[str, _Sums] = {}
    for i in range(len(prompts)):
        part = _read(store / f"{name}-{i}.safetensors") if store is not None else held[i]
        for site, sums in part.items():
            into = total.setdefault(site, _Sums(sums.call))
            into.calls += sums.calls
            for group, mass in sums.mass.items():
                into.mass[group] = into.mass.get(group, 0) + mass
            for mark, value in sums.marks.items():
                into.marks[mark] = into.marks.get(mark, 0) + value
    return total


def _processes() -> tuple[int, int, Callable[[], None]]:
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes, state.wait_for_everyone


def _found(sums: _Sums) -> BlockMass:
    """Average the sums of a site over its calls."""
    whole = sum(sums.mass.values()) / sums.calls
    marks = [sums.marks[m] / sums.calls if m in sums.marks else None for m in ("sparse", "uneven")]
    assert isinstance(whole, Tensor)
    return BlockMass(whole, *marks)


def _conclude(
    first: dict[str, _Sums],
    second: dict[str, _Sums],
    orders: dict[str, list[int]],
    settings: _Settings,
    model: str | None,
    prompts: list[str],
) -> Calibration:
    """Choose the blocks and say how much they hold."""
    plans, pictures = {}, {}
    rows: list[dict[str, Any]] = []
    for name, sums in second.items():
        order = orders[name]
        heads = torch.arange(len(order))
        whole = _found(first[name]).mass
        parts = [sums.mass[g] for g in sorted(sums.mass)]
        laid = torch.stack([m[heads, torch.tensor(order)] if m.shape[1] == len(ORDERS) else m[:, 0] for m in parts])
        keep = choose_masks(laid, settings.density, together=settings.together)
        own = whole[:, 0]
        captured = float((laid * keep).sum() / laid.sum())
        before = float((own * choose_masks(own, settings.density, together=settings.together)).sum() / own.sum())
        grid = sums.call["grid"]
        plan = BlockPlan.from_mask(
            keep, settings.block_k, order, sums.call["n_text"], block_q=settings.block_q, grid=grid,
            n_image=math.prod(grid), text_first=sums.call["text_first"], about={"captured": round(captured, 6)},
        )  # fmt: skip
        plans[name] = plan
        counts = {order_name(o): order.count(o) for o in sorted(set(order))}
        rows.append({
            "site": name, "heads": len(order), "orders": counts, "captured": captured, "captured_model_order": before,
            "density": plan.density,
        })  # fmt: skip
        pictures[name] = torch.stack([own, laid.mean(0) / sums.calls * len(parts)])
    about = {
        "density": settings.density, "metric": settings.metric, "together": settings.together, "prompts": prompts,
        "captured": round(sum(r["captured"] for r in rows) / len(rows), 6),
    }  # fmt: skip
    return Calibration(plan=ModelPlan(plans=plans, model=model, about=about), rows=tuple(rows), mass=pictures)


def _claim(
    store: Path,
    settings: _Settings,
    prompts: Sequence[str | Mapping[str, Any]],
    seed: int,
    call: Mapping[str, Any] | None,
) -> None:
    """Make the folder this calibration's own, or see that it is."""
    told = json.dumps([vars(settings), repr(list(prompts)), seed, repr(sorted((call or {}).items()))], sort_keys=True)
    mark = hashlib.sha256(told.encode()).hexdigest()
    path = store / "settings.sha256"
    if path.exists():
        if path.read_text(encoding="utf-8") != mark:
            raise PlanError(f"{store} holds measurements of other prompts or settings: choose another folder.")
        return
    store.mkdir(parents=True, exist_ok=True)
    path.write_text(mark, encoding="utf-8")


def _write(path: Path, sums: dict[str, _Sums]) -> None:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for i, (name, held) in enumerate(sums.items()):
        facts[name] = {"i": i, "calls": held.calls, "call": held.call}
        tensors |= {f"{i}/mass/{g}": m.contiguous() for g, m in held.mass.items()}
        tensors |= {f"{i}/{mark}/0": m.contiguous() for mark, m in held.marks.items()}
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors or {"none": torch.zeros(1)}, fresh, metadata={"sites": json.dumps(facts)})
    os.replace(fresh, path)


def _read(path: Path) -> dict[str, _Sums]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as f:
            facts = json.loads((f.metadata() or {})["sites"])
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise PlanError(f"{path} cannot be read ({error}): delete it and run the calibration again.") from None
    found = {}
    for name, fact in facts.items():
        held = _Sums(fact["call"], fact["calls"])
        for key, tensor in tensors.items():
            i, kind, group = key.split("/") if "/" in key else ("", "", "")
            if i == str(fact["i"]):
                if kind == "mass":
                    held.mass[int(group)] = tensor
                else:
                    held.marks[kind] = tensor
        found[name] = held
    return found
