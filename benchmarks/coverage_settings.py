"""What each control is told on a tiny model whose defaults name no place and no word, for benchmarks/coverage.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from contract import other_texts
from torch import Tensor, nn

import attnctl
from attnctl.core.call import AttnCall
from attnctl.core.hosts.arguments import row_count, take_rows
from attnctl.core.hosts.families import family_of
from attnctl.core.sites import Site
from attnctl.data.controls import controls
from attnctl.plans import BlockPlan, Online
from attnctl.processors import Guidance
from attnctl.processors.combining.combiner import Combining

__all__ = ["OF_PIPELINES", "SEVERAL", "Model", "settings"]

TEXT_INPUTS = (
    *("encoder_hidden_states", "encoder_hidden_states_2", "encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
    *("text_bth", "cap_feats", "clip_text", "text_encoder_layers", "input_ids"),
)


@dataclass
class Model:
    """One tiny model with what a control needs to be told about it.

    Attributes:
        name: What the zoo calls it.
        module: The denoiser.
        inputs: Keyword arguments of one call.
        plain: The prediction without any control.
        calls: The first attention call of each site.
        layout: How its rows lie: a negative prompt and a prompt, or one prompt where the host takes one row.
        own: Variables that the host itself sets anew in a call.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    plain: Tensor
    calls: dict[str, AttnCall]
    layout: Any
    own: frozenset[str] = frozenset()

    def sites(self, *kinds: str) -> list[Site]:
        """List the sites of some kinds."""
        return [s for s in attnctl.find_sites(self.module) if s.kind in kinds]

    def run(self) -> Tensor:
        """Call the denoiser."""
        return zoo.call(self.module, self.inputs)

    def without_own(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Leave out of a snapshot what the host sets by itself."""
        return {k: v for k, v in variables.items() if k not in self.own}


# What a control is told where its defaults name no place or no word


def guidance(cls: Any, model: Model) -> Any:
    """Guide at every self and joint attention."""
    return cls(sites=_names(model, cls, "self", "joint"), start=0.0, stop=1.0)


def words(cls: Any, model: Model) -> Any:
    """Look at two words, at every place where text is attended to."""
    return cls(concepts=(1, 3), step_size=5.0, sites=_names(model, cls, "cross", "joint"), start=0.0, stop=1.0)


def blocks(cls: Any, model: Model) -> Any:
    """Keep about half of the blocks at the first site that a plan fits."""
    site = next((s for s in model.sites("self", "joint") if s.name in model.calls), None)
    if site is None:
        return cls(plan=BlockPlan.from_mask(torch.ones(1, 1, 1, dtype=torch.bool)), sites="self")
    call = model.calls[site.name]
    image = call.q.shape[-2] if call.image is None else len(range(call.q.shape[-2])[call.image])
    n = -(-image // 8)
    keep = torch.rand(1, site.heads, n, n, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[..., 0] = True
    first = call.text is None or not call.text.start
    plan = BlockPlan.from_mask(keep, 8, None, call.q.shape[-2] - image, block_q=8, n_image=image, text_first=first)
    return cls(plan=plan, sites=site.name)


def region(cls: Any, model: Model) -> Any:
    """Give the left half a text of its own."""
    text = other_texts(model.inputs, TEXT_INPUTS) or {}
    if model.layout != "cond":
        total = row_count(model.inputs)
        kept = take_rows(model.inputs | text, slice(total // 2, total), total, zoo.FRAMES, family_of(model.module))
        text = {name: kept[name] for name in text}
    return cls(embeds=(text,), areas=((0, 0, 0.5, 1),), stop=1.0, sites=_names(model, cls, "cross", "joint"))


def isolated(cls: Any, model: Model) -> Any:
    """Keep the halves of each of two pictures apart."""
    boxes = ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
    return cls(boxes=(boxes, boxes), sites=_names(model, cls, "self", "joint"))


def chosen(cls: Any, model: Model) -> Any:
    """Choose half of the blocks by pooled queries and keys, in the first step."""
    return cls(Online(density=0.5, by="pooled", block=8), sites=_names(model, cls, "self", "joint"))


def _names(model: Model, cls: Any, *kinds: str) -> list[str]:
    names = [s.name for s in model.sites(*kinds) if s.kind in cls.kinds]
    return names or ["*"]  # nothing to name: the control says so itself


# These share attention between prompts: each row is one.
SEVERAL = ("Consistent", "IRDiffusion", "MasaCtrl", "ShareAttention", "StyleAligned")
SETTINGS: dict[str, Callable[[Any, Model], Any]] = {
    "AStar": words,
    "AttendExcite": words,
    "TextCenGen": words,
    "TextCenGenMaps": lambda cls, model: cls(concepts=(1, 3), theta=0.0),
    "BroadWay": lambda cls, model: cls(stop=1.0),
    "Capture": lambda cls, model: cls(words=(1, 3)),
    "EnhanceAVideo": lambda cls, model: cls(weight=40.0),
    "NAG": lambda cls, m: cls(negative_embeds=other_texts(m.inputs, TEXT_INPUTS) if m.layout == "cond" else None),
    "PARO": blocks,
    "Regions": region,
    "SparseAttention": chosen,
    **dict.fromkeys(SEVERAL, lambda cls, model: cls(start=0.0)),
    "IRDiffusion": isolated,
    "Consistent": lambda cls, model: cls(chance=1.0, late_chance=1.0),
}
# Edits of a prompt need a pipeline's words, sums of predictions its negative prompt, references its autoencoder:
# pipelines run them in tests.
SUMS = {name for name, cls in controls("attnctl").items() if issubclass(cls, Combining)}
EDITS = {"FateZero", "FlowEdit", "Inject", "PromptToPrompt", "ReferenceOnly"}
OF_PIPELINES = frozenset(EDITS) | SUMS


def settings(name: str, cls: Any, model: Model) -> Any:
    """Make a control for a tiny model."""
    make = SETTINGS.get(name, guidance if issubclass(cls, Guidance) else lambda cls, model: cls())
    return make(cls, model)
