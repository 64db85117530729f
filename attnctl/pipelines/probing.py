"""What a denoiser's attention sees, read from one of its own calls; and the row that would list the denoiser.

With attention silenced (every site gives zeros, except where text attends to text) tokens never mix. If then only the
text of a call changes, exactly the text's tokens change among queries and keys; if only the latents change, exactly the
image's. No name of a module or argument says more than which arguments are text.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, Proceed, Wrapper
from attnctl.core.control import Control
from attnctl.core.hosts.arguments import main_name, own_containers
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.kinds import shown_kind
from attnctl.core.hosts.listing import denoisers_of
from attnctl.core.live import LiveControl, LiveDenoiser
from attnctl.core.sites import KINDS, Site
from attnctl.data.quiet import without_bar
from attnctl.errors import UnsupportedModelError

__all__ = ["SeenSite", "probe", "probe_pipeline", "silenced", "suggested_row"]

_TEXT = re.compile(
    r"^(encoder_hidden_states(?!_image|.*mask)|text_bth|input_ids|clip_text$|cap_feats|text_encoder_layers)"
)


@dataclass(frozen=True)
class SeenSite:
    """One attention of one call.

    Attributes:
        site: The site, with the kind that the family's row or its name gives it.
        counted: The kind that counts of tokens show, or None where they do not decide.
        queries: Number of query tokens.
        keys: Number of key tokens.
        image: Keys that change when only the latents change.
        text: Keys that change when only the text changes.
    """

    site: Site
    counted: str | None
    queries: int
    keys: int
    image: tuple[int, ...]
    text: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Silent(Control):
    """Keep the calls of all sites, and give zeros for them, except where text attends to text."""

    kinds = KINDS
    calls: list[AttnCall] = field(default_factory=list, compare=False)

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        def silent(call: AttnCall, proceed: Proceed) -> Tensor:
            if call.site.kind == "text":
                return proceed(call)
            self.calls.append(call)
            return torch.zeros_like(call.q[..., : call.v.shape[-1]])

        return silent


@dataclass(frozen=True, kw_only=True)
class _Arguments(Control):
    """Keep the arguments of the first call of a run."""

    kinds = KINDS
    found: list[dict[str, Any]] = field(default_factory=list, compare=False)

    def attached(self, sites: tuple[Site, ...], denoiser: torch.nn.Module, pipe: Any) -> LiveControl:
        calls = self.found

        class Keeping(LiveControl):
            def before_call(self, passes: LiveDenoiser) -> None:
                if not calls:
                    calls.append(own_containers(dict(passes.state.bound)))

        return Keeping()


def silenced(denoiser: torch.nn.Module, arguments: Mapping[str, Any]) -> list[AttnCall]:
    """Call a denoiser with its attention silenced; return the calls of all its sites but those of text alone."""
    names = [s.name for s in attnctl.find_sites(denoiser) if s.kind in ("self", "cross", "joint", "dual", "text")]
    control = _Silent(sites=names)
    with torch.no_grad(), attnctl.control(denoiser, control, layout="cond"):
        denoiser(**own_containers(dict(arguments)))
    return control.calls


def changed(value: Any) -> Any:
    """Return other values of the same shape."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return value + torch.randn(value.shape, generator=torch.Generator().manual_seed(9)).to(value)
        return (value + 1) % 8
    return type(value)(changed(v) for v in value) if isinstance(value, (list, tuple)) else value


def moved(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Return the tokens that differ between two [B, H, N, D]."""
    return tuple((a != b).any(3).any(1).any(0).nonzero()[:, 0].tolist())


def with_other_text(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with other text."""
    return {n: changed(v) if _TEXT.search(n) else v for n, v in arguments.items()}


def with_other_image(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with other latents."""
    return dict(arguments) | {main_name(arguments): changed(arguments[main_name(arguments)])}


def probe(denoiser: torch.nn.Module, arguments: Mapping[str, Any]) -> tuple[SeenSite, ...]:
    """Say what each attention of a denoiser sees in one call, given by its arguments."""
    runs = (arguments, with_other_text(arguments), with_other_image(arguments))
    base, text, image = (silenced(denoiser, a) for a in runs)
    seen = []
    for call, other, another in zip(base, text, image, strict=True):
        queries, keys = int(call.q.shape[-2]), int(call.k.shape[-2])
        hidden = None if call.hidden is None or call.hidden.ndim != 3 else int(call.hidden.shape[1])
        kind = shown_kind(denoiser, arguments, queries, keys, hidden, None)
        seen.append(SeenSite(call.site, kind, queries, keys, moved(call.k, another.k), moved(call.k, other.k)))
    return tuple(seen)


def probe_pipeline(pipe: Any) -> tuple[torch.nn.Module, dict[str, Any], tuple[SeenSite, ...]]:
    """Run a pipeline for two steps, and probe its first denoiser with the arguments of the first call.

    Raises:
        UnsupportedModelError: The pipeline needs more than a prompt or a class.
    """
    denoiser = next(iter(denoisers_of(pipe).values()))
    control = _Arguments(sites=[s.name for s in attnctl.find_sites(denoiser)])
    names = inspect.signature(type(pipe).__call__).parameters
    options: dict[str, Any] = {"num_inference_steps": 2} | ({"output_type": "latent"} if "prompt" in names else {})
    options |= {"prompt": "a photo"} if "prompt" in names else {"class_labels": [0]} if "class_labels" in names else {}
    try:
        with without_bar(pipe), attnctl.control(pipe, control):
            pipe(**options)
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} cannot be probed with {', '.join(options)} alone: {error}. Call "
            "attnctl.pipelines.probing.probe with the denoiser and the arguments of a call of your own."
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return denoiser, control.found[0], probe(denoiser, control.found[0])


def suggested_row(denoiser: torch.nn.Module, arguments: Mapping[str, Any], seen: Sequence[SeenSite]) -> str:
    """Write the row that would list a denoiser in the table of families, as far as a call shows it."""
    kinds: dict[str, str] = {}
    for s in seen:
        listed = family_of(denoiser).classes
        kind = s.site.kind if listed else _kind(s)
        kinds.setdefault(s.site.name.rpartition(".")[2], kind)
    joint = next((s for s in seen if s.image and s.text and kinds[s.site.name.rpartition(".")[2]] == "joint"), None)
    text = None if joint is None else "first" if joint.text[0] < joint.image[0] else "last"
    name = type(denoiser).__name__
    pairs = " ".join(f'("{pattern}", "{kind}"),' for pattern, kind in kinds.items())
    lines = [
        "Family(",
        f'    name="{name.partition("Transformer")[0]}",',
        f'    classes=("{name}",),',
        f"    kinds=({pairs}),",
        *([f'    text="{text}",'] if text else []),
        f"    grid=grids.{_grid(denoiser, arguments)},",
        "),",
    ]
    return "\n".join(lines)


def _kind(seen: SeenSite) -> str:
    """Name the kind of an attention by the tokens that moved."""
    if seen.image and seen.text:
        return "joint"
    if seen.text:
        return "cross" if seen.queries != seen.keys else "text"
    return "self" if seen.image and seen.queries == seen.keys else "aux"


def _grid(denoiser: torch.nn.Module, arguments: Mapping[str, Any]) -> str:
    """Name the reader of the token grid that fits the shape of the latents."""
    latents = arguments[main_name(arguments)]
    latents = latents[0] if isinstance(latents, (list, tuple)) else latents
    if main_name(arguments) == "sample":
        return "sample"
    if latents.ndim == 3:
        return "ids" if "img_ids" in arguments else "shapes('img_shapes')" if "img_shapes" in arguments else "counted"
    channels = getattr(getattr(denoiser, "config", None), "in_channels", None)
    if latents.ndim == 5:
        return "frames_first" if latents.shape[2] == channels != latents.shape[1] else "video"
    return "image"
