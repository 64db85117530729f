"""Swap the attention of a timm model for another form; weights are kept, what is new is listed, undo is exact.

model = attnctl.swap(timm.create_model("deit_tiny_patch16_224", pretrained=True), "agent", num_agents=49)
print(attnctl.swap_report(model))
attnctl.unswap(model)
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from attnctl.backbones.find_grids import dry_run, grids_of, image_size, modules_around, sources_of, trunk_of
from attnctl.backbones.hosts import Host, put
from attnctl.backbones.look.frames import frame_of, prefix_of
from attnctl.backbones.mixers import Mixer, find_mixer
from attnctl.backbones.modules.attend import check_model
from attnctl.backbones.places import PLACES, SWAPPABLE, build_host, is_sequence
from attnctl.errors import ConfigError, ConflictError, SiteError, UnsupportedModelError, nearest, shown

__all__ = ["SwapReport", "multiply_adds", "swap", "swap_report", "unswap"]

Grid = tuple[int, int]
_RECORD = "_attnctl_swaps"
Blocks = int | str | Callable[[str, int], bool] | Iterable[int | str] | None


@dataclass
class SwapReport:
    """What a swap changed.

    kind, options: as given. sites: dotted names of the replaced modules. new: parameters that were not there before,
    name -> shape. dropped: state that the new form does not use. parameters: count before and after.
    """

    kind: str
    options: dict[str, Any]
    sites: tuple[str, ...]
    new: dict[str, tuple[int, ...]]
    dropped: dict[str, tuple[int, ...]]
    parameters: tuple[int, int]
    _model: nn.Module = field(repr=False, compare=False)
    _hosts: dict[str, Host] = field(repr=False, compare=False)
    _hooks: list[RemovableHandle] = field(default_factory=list, repr=False, compare=False)

    def macs(self, input_size: tuple[int, int, int] | None = None) -> tuple[int, int]:
        """Count the multiply-adds of one image before and after, by one forward pass each.

        input_size: (channels, height, width), the model's own if None.
        """
        size = input_size or image_size(self._model)
        after = multiply_adds(self._model, size)
        present = {name: self._model.get_submodule(name) for name in self.sites}
        try:
            for name, host in self._hosts.items():
                put(self._model, name, host.original)
            before = multiply_adds(self._model, size)
        finally:
            for name, module in present.items():
                put(self._model, name, module)
        return before, after

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{self.kind}: {len(self.sites)} places swapped, parameters {before:,} -> {after:,}",
            f"  new: {_grouped(self.new, self.sites)}",
            f"  unused now: {_grouped(self.dropped, self.sites)}",
        ]
        return "\n".join(lines)


def swap(
    model: nn.Module,
    kind: str | type[Mixer],
    blocks: Blocks = None,
    *,
    grid: Grid | None = None,
    **options: Any,
) -> nn.Module:
    """Replace softmax attention in a timm model, in place; projections, rotary embeddings and gates are kept.

    kind: "agent", "bra", "multiaxis", "inline", "mala", "rala", "hedgehog", "moh", "gated", "sigmoid", "neighborhood",
        "sparsifiner", "vsa", "ssa", "local_linear", "tic", "reversed", the kind of a mixer of your own, or its class.
    blocks: which of the places, in the order they run: an index, names or globs, several of these, or a function of
        (name, index); all of them if None.
    grid: (height, width) in tokens of a ViT whose patch embedding does not tell.
    options: of the kind, such as num_agents, topk, window_size, kernel.

    Returns the model itself; `swap_report` says what changed and `unswap` takes it back. The model may be one of timm's
    feature extractors (features_only=True). Raises: ConfigError for unknown kinds and options, SiteError for blocks
    that do not exist, ConflictError for blocks that are swapped already, UnsupportedModelError for a model without
    such attention.
    """
    check_model(model)
    mixer = find_mixer(kind)
    _check_grid(grid)
    _check_options(mixer, options)
    places = _places(model)
    chosen = _choose(list(places), blocks)
    _check_unswapped(places, chosen)
    trunk = trunk_of(model)
    frames = {n: frame_of(places[n], modules_around(model, n)) for n in chosen if is_sequence(places[n])}
    grids = grids_of(model, places, chosen, grid, frames)
    make = functools.partial(mixer, **options)
    with contextlib.ExitStack() as undo:
        sources, hooks = sources_of(trunk, chosen, grids, frames, bool(grid))
        for hook in hooks:
            undo.callback(hook.remove)
        hosts = {n: build_host(places[n], make, grids[n], prefix_of(trunk), sources[n]) for n in chosen}
        undo.pop_all()
    before = _state(model)
    count = sum(p.numel() for p in model.parameters())
    for name, host in hosts.items():
        put(model, name, host)
    after = _state(model)
    report = SwapReport(
        mixer.kind,
        dict(options),
        tuple(chosen),
        {k: s for k, s in after.items() if k not in before},
        {k: s for k, s in before.items() if k not in after},
        (count, sum(p.numel() for p in model.parameters())),
        model,
        hosts,
        hooks,
    )
    vars(model).setdefault(_RECORD, []).append(report)
    return model


def swap_report(model: nn.Module) -> SwapReport:
    """Return the report of the last swap. Raises: ConfigError for a model that was not swapped."""
    check_model(model)
    stack = model.__dict__.get(_RECORD)
    if not stack:
        raise ConfigError(
            f"This {type(model).__name__} has no swapped attention. Call attnctl.swap(model, kind) first."
        )
    return stack[-1]


def unswap(model: nn.Module) -> nn.Module:
    """Take back the last swap: the original modules return, with the projections as trained in between.

    The model is then what it would be without the swap, in the dtype, on the device and for the image size that it has
    come to. Raises: ConfigError for a model that was not swapped.
    """
    report = swap_report(model)
    originals = {name: host.restored() for name, host in report._hosts.items()}
    for name, module in originals.items():
        put(model, name, module)
    for hook in report._hooks:
        hook.remove()
    model.__dict__[_RECORD].pop()
    if not model.__dict__[_RECORD]:
        del model.__dict__[_RECORD]
    return model


def _check_grid(grid: Any) -> None:
    """Raise ConfigError unless a grid is None or a pair of counts."""
    pair = isinstance(grid, (tuple, list)) and len(grid) == 2
    if grid is not None and not (pair and all(isinstance(n, int) and n >= 1 for n in grid)):
        raise ConfigError(f"grid={shown(grid)} was given; expected (height, width) in tokens, such as (14, 14).")


def _check_options(mixer: type[Mixer], options: dict[str, Any]) -> None:
    """Raise ConfigError for an option that a mixer does not take."""
    parameters = inspect.signature(mixer.__init__).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in takes:
            raise ConfigError(
                f"Option {name!r} was given; {mixer.kind!r} takes {', '.join(map(repr, takes)) or 'none'}."
                f"{nearest(name, takes)}"
            )


def _grouped(names: Iterable[str], sites: Sequence[str]) -> str:
    """List what lies below the sites once, with how many of them have it: a model has dozens of the same."""
    counts: dict[str, int] = {}
    for name in names:
        site = next((s for s in sites if name.startswith(f"{s}.")), "")
        below = name.removeprefix(f"{site}.") if site else name
        counts[below] = counts.get(below, 0) + 1
    return ", ".join(f"{name} ({n})" for name, n in counts.items()) or "nothing"


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """List the attention that can be swapped or is, by name, in the order in which it runs."""
    kinds: tuple[type[nn.Module], ...] = (*PLACES, Host)
    places = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not places:
        near = sorted(
            {type(m).__name__ for m in model.modules() if "ttention" in type(m).__name__ or "ttn" in type(m).__name__}
        )
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that can be swapped; swap knows {SWAPPABLE}. "
            f"Found here: {', '.join(near) or 'no attention at all'}."
        )
    return places


def _check_unswapped(places: dict[str, nn.Module], chosen: list[str]) -> None:
    """Raise ConflictError if a chosen place holds a swapped form."""
    swapped = [n for n in chosen if isinstance(places[n], Host)]
    if swapped:
        free = [n for n in places if not isinstance(places[n], Host)]
        rest = f", or choose other blocks: {', '.join(free[:4])}{', ...' if len(free) > 4 else ''}" if free else ""
        raise ConflictError(
            f"{swapped[0]} is already swapped ({len(swapped)} of the {len(chosen)} places chosen are). Call "
            f"attnctl.unswap(model) first{rest}."
        )


def _choose(names: list[str], blocks: Blocks) -> list[str]:
    if blocks is None:
        return names
    if callable(blocks):
        chosen = [n for i, n in enumerate(names) if blocks(n, i)]
        if not chosen:
            raise SiteError(f"blocks chose none of the {len(names)} places: {', '.join(names[:4])}, ...")
        return chosen
    selection: set[str] = set()
    for item in [blocks] if isinstance(blocks, str) or not isinstance(blocks, Iterable) else list(blocks):
        if isinstance(item, str):
            hits = fnmatch.filter(names, item) or [n for n in names if n.startswith(item + ".")]
        elif isinstance(item, int) and not isinstance(item, bool) and -len(names) <= item < len(names):
            hits = [names[item]]
        else:
            hits = []
        if not hits:
            hint = nearest(item, names) if isinstance(item, str) else ""
            raise SiteError(
                f"blocks={item!r} was given; expected an index from 0 to {len(names) - 1}, or a name or glob.{hint}"
            )
        selection.update(hits)
    if not selection:
        raise SiteError(f"blocks={blocks!r} names nothing; expected at least one of the {len(names)} places.")
    return [n for n in names if n in selection]


def multiply_adds(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Count the multiply-adds of one image of (channels, height, width), by one forward pass."""
    # The counter knows no fused kernel of the CPU; the written-out one does the same multiplications.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        dry_run(model, size)
    return counter.get_total_flops() // 2


def _state(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}
