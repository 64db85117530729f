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

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attnctl.backbones.grid import GridRecorder, GridSource, watch_grid
from attnctl.backbones.hosts import HOSTS, Host, build_host, put
from attnctl.backbones.mixers import Mixer, find_mixer
from attnctl.backbones.modes import evaluating
from attnctl.errors import ConfigError, ConflictError, SiteError, UnsupportedModelError, nearest

__all__ = ["SwapReport", "swap", "swap_report", "unswap"]

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
    _hook: Any = field(default=None, repr=False, compare=False)

    def macs(self, input_size: tuple[int, int, int] | None = None) -> tuple[int, int]:
        """Count the multiply-adds of one image before and after, by one forward pass each.

        input_size: (channels, height, width), the model's own if None.
        """
        size = input_size or _input_size(self._model)
        after = _count(self._model, size)
        present = {name: self._model.get_submodule(name) for name in self.sites}
        try:
            for name, host in self._hosts.items():
                put(self._model, name, host.original)
            before = _count(self._model, size)
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
    """Replace softmax attention in a timm ViT/DeiT, Swin, PVTv2 or MaxViT, in place; projections are kept.

    kind: "agent", "bra", "multiaxis", "inline", "mala", "rala", "moh", "sigmoid", "neighborhood", the kind of a mixer
        of your own, or its class.
    blocks: which of the places, in the order they run: an index, names or globs, several of these, or a function of
        (name, index); all of them if None.
    grid: (height, width) in tokens of a ViT whose patch embedding does not tell.
    options: of the kind, such as num_agents, topk, window_size, kernel.

    Returns the model itself; `swap_report` says what changed and `unswap` takes it back. The model may be one of timm's
    feature extractors (features_only=True). Raises: ConfigError for unknown kinds and options, SiteError for blocks
    that do not exist, ConflictError for blocks that are swapped already, UnsupportedModelError for a model without
    such attention.
    """
    mixer = find_mixer(kind)
    _check_options(mixer, options)
    places = _places(model)
    chosen = _choose(list(places), blocks)
    _check_unswapped(places, chosen)
    trunk = _trunk(model)
    prefix = int(getattr(trunk, "num_prefix_tokens", 0))
    grids = _grids(model, places, chosen, grid)
    recorder, hook = _recorder(trunk, chosen, places)
    embed = None if grid else _embed_with_grid(trunk)
    try:
        make = functools.partial(mixer, **options)
        hosts = {
            n: build_host(places[n], make, grids[n], prefix, GridSource(grids[n], embed, recorder)) for n in chosen
        }
    except BaseException:
        if hook is not None:
            hook.remove()
        raise
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
        hook,
    )
    vars(model).setdefault(_RECORD, []).append(report)
    return model


def swap_report(model: nn.Module) -> SwapReport:
    """Return the report of the last swap. Raises: ConfigError for a model that was not swapped."""
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
    if report._hook is not None:
        report._hook.remove()
    model.__dict__[_RECORD].pop()
    if not model.__dict__[_RECORD]:
        del model.__dict__[_RECORD]
    return model


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


def _trunk(model: nn.Module) -> nn.Module:
    """Return the module that embeds patches: the model, or what timm's feature extractor holds."""
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "patch_embed") else model


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """List the attention that can be swapped or is, by name, in the order in which it runs."""
    kinds: tuple[type[nn.Module], ...] = (*HOSTS, Host)
    places = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if not places:
        near = sorted(
            {type(m).__name__ for m in model.modules() if "ttention" in type(m).__name__ or "ttn" in type(m).__name__}
        )
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that can be swapped; swap knows {', '.join(HOSTS.values())}. "
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
    kept: set[str] = set()
    for item in [blocks] if isinstance(blocks, (int, str)) else list(blocks):
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
        kept.update(hits)
    if not kept:
        raise SiteError(f"blocks={blocks!r} names nothing; expected at least one of the {len(names)} places.")
    return [n for n in names if n in kept]


def _embed_with_grid(trunk: nn.Module) -> nn.Module | None:
    embed = getattr(trunk, "patch_embed", None)
    return embed if getattr(embed, "grid_size", None) else None


def _grids(model: nn.Module, places: dict[str, nn.Module], chosen: list[str], given: Grid | None) -> dict[str, Grid]:
    """Find the grid of every chosen place: given, from the patch embedding, or seen in one forward pass."""
    size: Any = given or getattr(_embed_with_grid(_trunk(model)), "grid_size", None)
    if size and all(_is_token(places[n]) for n in chosen):
        return dict.fromkeys(chosen, (int(size[0]), int(size[1])))
    seen: dict[str, Grid] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            if args[0].ndim == 4:
                seen[name] = (args[0].shape[1], args[0].shape[2])
            elif len(args) > 1:
                seen[name] = (int(args[1][0]), int(args[1][1]))

        return hook

    with contextlib.ExitStack() as hooks:
        for name in chosen:
            hooks.callback(places[name].register_forward_pre_hook(note(name)).remove)
        _dry_run(model, _input_size(model))
    missing = [n for n in chosen if n not in seen]
    if missing:
        raise SiteError(
            f"The grid of {missing[0]!r} cannot be told from {type(model).__name__}. "
            "Give grid=(height, width) in tokens."
        )
    return seen


def _is_token(module: nn.Module) -> bool:
    return HOSTS[next(t for t in HOSTS if isinstance(module, t))].startswith("attention of ViT")


def _recorder(model: nn.Module, chosen: list[str], places: dict[str, nn.Module]) -> tuple[GridRecorder | None, Any]:
    embed = getattr(model, "patch_embed", None)
    if embed is None or not getattr(model, "dynamic_img_size", False) or not any(_is_token(places[n]) for n in chosen):
        return None, None
    return watch_grid(model)


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return the size (channels, height, width) of the images that a model was built or resized for."""
    trunk = _trunk(model)
    cfg = getattr(trunk, "pretrained_cfg", None) or {}
    first = next((m for m in trunk.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(trunk, "in_chans", None) or (first.in_channels if first else cfg.get("input_size", (3,))[0])
    size = (
        getattr(getattr(trunk, "patch_embed", None), "img_size", None)
        or getattr(trunk, "img_size", None)
        or (getattr(trunk, "_traits", None) or {}).get("img_size")  # timm 1.0.31 notes it on every model
        or cfg.get("input_size", (3, 224, 224))[1:]
    )
    height, width = (size, size) if isinstance(size, int) else size
    return int(channels), int(height), int(width)


def _dry_run(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Run one image without gradients, keeping the modes and running statistics.

    Raises: UnsupportedModelError if the model refuses an image of that size.
    """
    first = next(model.parameters())
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *size, device=first.device, dtype=first.dtype))
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on an image of {size[0]} x {size[1]} x {size[2]}, the size that it "
            f"seems to be built for: {error}"
        ) from error


def _count(model: nn.Module, size: tuple[int, int, int]) -> int:
    # The counter knows no fused kernel of the CPU; the written-out one does the same multiplications.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _dry_run(model, size)
    return counter.get_total_flops() // 2


def _state(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}
