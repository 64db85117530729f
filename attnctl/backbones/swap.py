"""Swap the attention of a timm model for another form; weights are kept, what is new is listed, undo is exact.

model = attnctl.swap(timm.create_model("deit_tiny_patch16_224", pretrained=True), "agent", num_agents=49)
print(attnctl.swap_report(model))
attnctl.unswap(model)
"""

from __future__ import annotations

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

from attnctl.backbones.grid import GridRecorder, watch_grid
from attnctl.backbones.hosts import HOSTS, build_host
from attnctl.backbones.mixers.base import AgentMixer, Grid, Mixer, MultiAxisMixer, RoutingMixer
from attnctl.backbones.mixers.linear import InLineMixer, MALAMixer, RALAMixer
from attnctl.backbones.mixers.softmax import MoHMixer, NeighborhoodMixer, SigmoidMixer
from attnctl.errors import ConfigError, SiteError, UnsupportedModelError, nearest

__all__ = ["KINDS", "SwapReport", "swap", "swap_report", "unswap"]

KINDS: dict[str, type[Mixer]] = {
    "agent": AgentMixer,
    "bra": RoutingMixer,
    "multiaxis": MultiAxisMixer,
    "inline": InLineMixer,
    "mala": MALAMixer,
    "rala": RALAMixer,
    "moh": MoHMixer,
    "sigmoid": SigmoidMixer,
    "neighborhood": NeighborhoodMixer,
}
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
    _old: dict[str, nn.Module] = field(repr=False, compare=False)
    _hook: Any = field(default=None, repr=False, compare=False)

    def macs(self, input_size: tuple[int, int, int] | None = None) -> tuple[int, int]:
        """Count the multiply-adds of one image before and after, by one forward pass each.

        input_size: (channels, height, width), the model's own if None.
        """
        size = input_size or _input_size(self._model)
        after = _count(self._model, size)
        new = {name: self._model.get_submodule(name) for name in self.sites}
        try:
            for name, module in self._old.items():
                _put(self._model, name, module)
            before = _count(self._model, size)
        finally:
            for name, module in new.items():
                _put(self._model, name, module)
        return before, after

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            f"{self.kind}: {len(self.sites)} places swapped, parameters {before:,} -> {after:,}",
            f"  new: {_grouped(self.new, self.sites)}",
            f"  unused now: {_grouped(self.dropped, self.sites)}",
        ]
        return "\n".join(lines)


def swap(model: nn.Module, kind: str, blocks: Blocks = None, *, grid: Grid | None = None, **options: Any) -> nn.Module:
    """Replace softmax attention in a timm ViT/DeiT, Swin, PVTv2 or MaxViT, in place; projections are kept.

    kind: "agent", "bra", "multiaxis", "inline", "mala", "rala", "moh", "sigmoid" or "neighborhood".
    blocks: which of the places, in the order they run: an index, names or globs, several of these, or a function of
        (name, index); all of them if None.
    grid: (height, width) in tokens of a ViT whose patch embedding does not tell.
    options: of the kind, such as num_agents, topk, window_size, kernel.

    Returns the model itself; `swap_report` says what changed and `unswap` takes it back. The model may be one of timm's
    feature extractors (features_only=True). Raises: ConfigError for unknown kinds and options, SiteError for blocks
    that do not exist, UnsupportedModelError for a model without such attention.
    """
    mixer = _kind(kind, options)
    places = _places(model)
    chosen = _choose(list(places), blocks)
    trunk = _trunk(model)
    prefix = int(getattr(trunk, "num_prefix_tokens", 0))
    grids = _grids(model, places, chosen, grid)
    recorder, hook = _recorder(trunk, chosen, places)

    try:
        make = functools.partial(mixer, **options)
        built = {name: build_host(places[name], make, grids[name], prefix, recorder) for name in chosen}
    except BaseException:
        if hook is not None:
            hook.remove()
        raise
    before = _state(model)
    count = sum(p.numel() for p in model.parameters())
    for name, module in built.items():
        _put(model, name, module)
    after = _state(model)
    report = SwapReport(
        kind,
        dict(options),
        tuple(chosen),
        {k: s for k, s in after.items() if k not in before},
        {k: s for k, s in before.items() if k not in after},
        (count, sum(p.numel() for p in model.parameters())),
        model,
        {name: places[name] for name in chosen},
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

    Raises: ConfigError for a model that was not swapped.
    """
    report = swap_report(model)
    for name, module in report._old.items():
        module.train(model.get_submodule(name).training)
        _put(model, name, module)
    if report._hook is not None:
        report._hook.remove()
    model.__dict__[_RECORD].pop()
    if not model.__dict__[_RECORD]:
        del model.__dict__[_RECORD]
    return model


def _kind(kind: str, options: dict[str, Any]) -> type[Mixer]:
    if kind not in KINDS:
        raise ConfigError(
            f"kind={kind!r} was given; expected one of {', '.join(map(repr, KINDS))}.{nearest(kind, KINDS)}"
        )
    signature = inspect.signature(KINDS[kind].__init__)
    known = [n for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"Option {name!r} was given; {kind!r} takes {', '.join(map(repr, known))}.{nearest(name, known)}"
            )
    return KINDS[kind]


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
    found: dict[str, nn.Module] = {}
    known: tuple[type[nn.Module], ...] = tuple(HOSTS)
    for name, module in model.named_modules():
        if isinstance(module, known):
            found[name] = module
    if not found:
        near = sorted(
            {type(m).__name__ for m in model.modules() if "ttention" in type(m).__name__ or "ttn" in type(m).__name__}
        )
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that can be swapped; swap knows {', '.join(HOSTS.values())}. "
            f"Found here: {', '.join(near) or 'no attention at all'}."
        )
    return found


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


def _grids(model: nn.Module, places: dict[str, nn.Module], chosen: list[str], given: Grid | None) -> dict[str, Grid]:
    """Tell the grid of every chosen place: given, from the patch embedding, or seen in one forward pass."""
    embed = getattr(getattr(_trunk(model), "patch_embed", None), "grid_size", None)
    tokens = all(_is_token(places[n]) for n in chosen)
    size = given or embed
    if tokens and size:
        return dict.fromkeys(chosen, (int(size[0]), int(size[1])))
    seen: dict[str, Grid] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            if args[0].ndim == 4:
                seen[name] = (args[0].shape[1], args[0].shape[2])
            elif len(args) > 1:
                seen[name] = (int(args[1][0]), int(args[1][1]))

        return hook

    hooks = [places[n].register_forward_pre_hook(note(n)) for n in chosen]
    try:
        _dry_run(model, _input_size(model))
    finally:
        for h in hooks:
            h.remove()
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
    trunk = _trunk(model)
    embed = getattr(trunk, "patch_embed", None)
    cfg = getattr(trunk, "pretrained_cfg", None) or {}
    chans = int(getattr(trunk, "in_chans", cfg.get("input_size", (3,))[0]))
    size = getattr(embed, "img_size", None) or cfg.get("input_size", (3, 224, 224))[1:]
    return chans, int(size[0]), int(size[1])


def _dry_run(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Run one image without gradients, keeping the modes and running statistics."""
    modes = {m: m.training for m in model.modules()}
    first = next(model.parameters())
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *size, device=first.device, dtype=first.dtype))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _count(model: nn.Module, size: tuple[int, int, int]) -> int:
    # The counter knows no fused kernel of the CPU; the written-out one does the same multiplications.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _dry_run(model, size)
    return counter.get_total_flops() // 2


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, module)


def _state(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}
