"""Look at a model's attention while it runs, and add up the blocks: what a calibration measures.

No map is ever built: `attnctl.kernels.sparse.block_mass` takes a few rows at a time. What each prompt gave is a file,
so that an interrupted calibration goes on, and several processes can share the prompts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.core.call import AttnCall, Proceed, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.families import Family
from attnctl.core.sites import Selector, Site, select
from attnctl.data.progress import Progress
from attnctl.errors import ConfigError, PlanError
from attnctl.kernels.sparse.block_mass import BlockMass, block_mass
from attnctl.pipelines.refusals import explained
from attnctl.plans.orders import LAYOUTS
from attnctl.plans.reading import Expected, open_tensors, parse_json
from attnctl.plans.writing import publish, recover

__all__ = ["Settings", "Sums", "over_prompts", "processes", "read_store", "runner"]

_STORE = Expected("what a calibration measured", PlanError)
_MOST = 1 << 40  # tokens, calls and parts of a run: no count reaches this


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold what a calibration was asked for."""

    density: float
    block_q: int
    block_k: int
    groups: int
    metric: str
    eps: float
    sigma: float
    alpha: float
    budget: str


@dataclass
class Sums:
    """Sums of one attention over the calls so far."""

    call: dict[str, Any]
    calls: dict[int, int] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)
    marks: dict[str, Tensor] = field(default_factory=dict)

    def add(self, group: int, mass: BlockMass) -> None:
        self.calls[group] = self.calls.get(group, 0) + 1
        self.mass[group] = self.mass.get(group, 0) + mass.mass.cpu()
        for name, value in (("sparse", mass.sparse), ("uneven", mass.uneven)):
            if value is not None:
                self.marks[name] = self.marks.get(name, 0) + value.cpu()

    def average(self) -> BlockMass:
        """Average over the calls."""
        calls = sum(self.calls.values())
        whole = sum(self.mass.values()) / calls
        marks = [self.marks[m] / calls if m in self.marks else None for m in ("sparse", "uneven")]
        assert isinstance(whole, Tensor)
        return BlockMass(whole, *marks)

    def by_group(self) -> list[Tensor]:
        """Average over the calls of each part of the run."""
        return [self.mass[g] / self.calls[g] for g in sorted(self.mass)]


@dataclass(frozen=True, kw_only=True)
class _Look(Control):
    """Watch the attention of a run and add up its blocks; nothing is changed."""

    settings: Settings
    sums: dict[str, Sums]
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
                    mass = block_mass(
                        call.q, call.k, grid, s.block_q, s.block_k, image=image, scale=call.scale, orders=chosen,
                        eps=s.eps if s.metric != "mass" and chosen is None else None, sigma=s.sigma,
                    )  # fmt: skip
                facts = {
                    "grid": list(grid), "n_text": call.q.shape[2] - (image.stop - image.start),
                    "text_first": image.start > 0 or call.image is None,
                }  # fmt: skip
                sums = self.sums.setdefault(call.site.name, Sums(facts))
                if sums.call["grid"] != facts["grid"]:
                    raise ConfigError(
                        f"{call.site.name} saw the grids {sums.call['grid']} and {facts['grid']}: calibrate one "
                        "resolution at a time."
                    )
                sums.add(min(group, self.groups - 1), mass)
            return proceed(call)

        return watch


def runner(
    pipe: Any,
    settings: Settings,
    sites: Selector | None,
    groups: int,
    orders: Mapping[str, Sequence[int]] | None,
    arguments: dict[str, Any],
) -> Callable[[str | Mapping[str, Any], int], dict[str, Sums]]:
    """Return what runs one prompt and returns its sums."""

    def run(prompt: str | Mapping[str, Any], seed: int) -> dict[str, Sums]:
        sums: dict[str, Sums] = {}
        unknown: set[str] = set()
        call = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        options = {"generator": torch.Generator().manual_seed(seed), "output_type": "latent", **arguments, **call}
        watch = _Look(settings=settings, sums=sums, unknown=unknown, groups=groups, orders=orders, sites=sites)
        with explained(pipe, arguments), attach(pipe, watch):
            pipe(**options)
        if unknown:
            warnings.warn(
                f"attnctl: the token grid of {len(unknown)} sites is not known ({sorted(unknown)[0]}, ...): they get "
                "no plan and stay dense.",
                stacklevel=4,
            )
        return sums

    return run


def over_prompts(
    run: Callable[[str | Mapping[str, Any], int], dict[str, Sums]],
    prompts: Sequence[str | Mapping[str, Any]],
    seed: int,
    store: Path | None,
    name: str,
    showing: Callable[[int], AbstractContextManager[Progress]],
) -> dict[str, Sums]:
    """Run every prompt once, here or in another process, and add up; `showing(runs)` shows how far that is."""
    rank, world, wait = processes() if store is not None else (0, 1, lambda: None)
    by_prompt: dict[int, dict[str, Sums]] = {}
    paths = {i: None if store is None else store / f"{name}-{i}.safetensors" for i in range(rank, len(prompts), world)}
    if store is not None:
        recover(store)  # what a killed run was just placing is measured anew: the next writing here would undo it
    todo = [i for i, path in paths.items() if path is None or not path.exists()]
    with showing(len(todo)) as shown:
        for n, i in enumerate(todo, 1):
            shown.describe(f"prompt {n} of {len(todo)}")
            by_prompt[i] = run(prompts[i], seed + i)
            if (path := paths[i]) is not None:
                _write(path, by_prompt[i])
    wait()
    total: dict[str, Sums] = {}
    for i in range(len(prompts)):
        part = read_store(store / f"{name}-{i}.safetensors") if store is not None else by_prompt[i]
        for site, sums in part.items():
            into = total.setdefault(site, Sums(sums.call))
            _check_alike(site, into, sums)
            for group, mass in sums.mass.items():
                into.calls[group] = into.calls.get(group, 0) + sums.calls[group]
                into.mass[group] = into.mass.get(group, 0) + mass
            for mark, value in sums.marks.items():
                into.marks[mark] = into.marks.get(mark, 0) + value
    return total


def _check_alike(site: str, total: Sums, part: Sums) -> None:
    """Raise PlanError where the measurements of two prompts cannot be added up."""
    shapes = {tuple(t.shape) for s in (total, part) for t in s.mass.values()}
    if total.call["grid"] != part.call["grid"] or len(shapes) != 1:
        raise PlanError(
            f"The prompts measured {site} on other grids or blocks ({total.call} and {part.call}): calibrate one "
            "resolution at a time, and choose another folder."
        )


def processes() -> tuple[int, int, Callable[[], None]]:
    """Return which of how many processes this is, and what waits for all of them."""
    from attnctl.pipelines.workers import Workers

    crew = Workers()
    return crew.rank, crew.size, crew.wait


def _write(path: Path, sums: dict[str, Sums]) -> None:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for i, (name, site_sums) in enumerate(sums.items()):
        facts[name] = {"i": i, "calls": site_sums.calls, "call": site_sums.call}
        tensors |= {f"{i}/mass/{g}": m.contiguous() for g, m in site_sums.mass.items()}
        tensors |= {f"{i}/{mark}/0": m.contiguous() for mark, m in site_sums.marks.items()}
    content = save(tensors or {"none": torch.zeros(1)}, metadata={"sites": json.dumps(facts)})
    publish({path: content}, force=True)  # another process may have measured the same


def read_store(path: Path) -> dict[str, Sums]:
    """Read the sums of one prompt.

    Raises:
        PlanError: The file is missing or damaged.
    """
    cure = "Delete it and run the calibration again."
    with open_tensors(path, _STORE, cure=cure) as file:
        facts = parse_json((file.metadata() or {}).get("sites", ""), path.name, _STORE)
        try:
            by_site = {name: _sums(fact) for name, fact in facts.items()}
            places = {fact["i"]: name for name, fact in facts.items()}
            if len(places) != len(by_site):
                raise ValueError("two sites have one place")
            for key in list(file.keys()):
                if key != "none":
                    _add(by_site, places, key, file.get_tensor(key))
            for name, sums in by_site.items():
                if not sums.calls or sums.mass.keys() != sums.calls.keys():
                    raise ValueError(f"{name} lacks a part of the run")
                shapes = {tuple(t.shape) for t in sums.mass.values()}
                if len(shapes) != 1 or any(tuple(t.shape) != next(iter(shapes))[:2] for t in sums.marks.values()):
                    raise ValueError(f"{name} has parts of different shapes")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{path.name} cannot be read ({error!r:.160}): it is damaged. {cure}") from None
    return by_site


def _sums(fact: Any) -> Sums:
    """Check what a store says of one site: which part of the run had how many calls, and how its tokens lie."""
    call, calls = fact["call"], {int(group): n for group, n in fact["calls"].items()}
    grid, n_text, first = call["grid"], call["n_text"], call["text_first"]
    wholes = [fact["i"], n_text, *grid, *calls]
    if len(grid) != 3 or not all(type(n) is int and 0 <= n < _MOST for n in wholes) or not all(grid):
        raise ValueError("a size is out of range")
    if not all(type(n) is int and 0 < n < _MOST for n in calls.values()) or not isinstance(first, bool):
        raise ValueError("a number of calls is out of range")
    return Sums({"grid": grid, "n_text": n_text, "text_first": first}, calls)


def _add(by_site: dict[str, Sums], places: Mapping[int, str], key: str, tensor: Tensor) -> None:
    """Put a tensor of a store where its name says."""
    place, kind, group = key.split("/")
    sums = by_site[places[int(place)]]
    axes = 4 if kind == "mass" else 2
    shape = tensor.shape if tensor.ndim == axes and tensor.dtype in (torch.float32, torch.float64) else (0, 0)
    if not tensor.numel() or shape[1] not in (1, len(LAYOUTS)):
        raise ValueError(f"{key} is {tensor.dtype} {list(tensor.shape)}")
    if not bool(tensor.isfinite().all()) or (kind == "mass" and bool((tensor < 0).any())):
        raise ValueError(f"{key} holds what is no attention")
    if kind == "mass":
        sums.mass[int(group)] = tensor
    elif kind in ("sparse", "uneven"):
        sums.marks[kind] = tensor
    else:
        raise ValueError(f"{key} is unknown")
