"""Which tokens are the text's and which the image's, by what moves: with attention silenced, tokens never mix.

At every site the output of attention is zero. If then only the text changes, exactly the text's tokens change among the
queries and keys of each joint attention; if only the image changes, exactly the image's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import attnctl
from attnctl.core.control import Control
from attnctl.core.sites import KINDS

TEXT = re.compile(
    r"^(encoder_hidden_states(?!_image|.*mask)|text_bth|input_ids|clip_text$|cap_feats|text_encoder_layers)"
)
IMAGE = ("sample", "hidden_states", "x", "vision_tokens")
# The prompt's pooled embedding modulates every token of these hosts, so the change of text shows everywhere.
POOLED = ("mochi",)
# Their text is a summary that other layers make of the prompt.
SUMMARISED = ("bria_fibo2",)

ROLES = tuple(n for n in zoo.EVERY if n not in ("anyflow_far", "kandinsky6_sr", "prior"))


@dataclass(frozen=True, kw_only=True)
class _Silent(Control):
    """Note the queries and keys of each attention, and give zeros for it, except where text attends to text."""

    kinds = KINDS
    seen: list[Any] = field(default_factory=list, compare=False)

    def wrapper(self, sites: Any) -> Any:
        def silent(call: Any, proceed: Any) -> Tensor:
            if call.site.kind == "text":
                return proceed(call)
            self.seen.append((call.site, call.q, call.k, call.image, call.text, call.keys))
            return torch.zeros_like(call.q[..., : call.v.shape[-1]])

        return silent


def calls(model: nn.Module, inputs: dict[str, Any]) -> list[Any]:
    """Run a model with attention silenced, and return what each attention saw."""
    sites = attnctl.find_sites(model)
    names = [s.name for s in sites if s.kind in ("self", "cross", "joint", "dual", "text")]
    control = _Silent(sites=names)
    inputs = inputs | ({"kv_cache": type(inputs["kv_cache"])(2)} if "kv_cache" in inputs else {})
    with attnctl.control(model, control, layout="cond"):
        zoo.call(model, inputs)
    return control.seen


def changed(value: Any) -> Any:
    """Return other values of the same shape."""
    if isinstance(value, Tensor):
        g = torch.Generator().manual_seed(9)
        if value.is_floating_point():
            return value + torch.randn(value.shape, generator=g).to(value)
        return (value + 1) % 8
    if isinstance(value, (list, tuple)):
        return type(value)(changed(v) for v in value)
    return value


def moved(a: Tensor, b: Tensor) -> set[int]:
    """Return the tokens that differ between two [B, H, N, D]."""
    return set((a != b).any(3).any(1).any(0).nonzero()[:, 0].tolist())


def differences(name: str) -> list[str]:
    """Compare the roles that attnctl gives with those that show, at every joint site of one model."""
    # Lumina 2 packs the text of each row by its length, so that only equal rows have parts.
    rows = 1 if name == "lumina2" or (name in zoo.HOSTS and zoo.HOSTS[name].rows == 1) else 2
    with torch.no_grad():
        model, inputs = zoo.build(name, rows)
        if not any(s.kind == "joint" for s in attnctl.find_sites(model)):
            return []
        base = calls(model, inputs)
        text = calls(model, inputs | {n: changed(v) for n, v in inputs.items() if TEXT.search(n)})
        image = calls(model, inputs | {n: changed(v) for n, v in inputs.items() if n in IMAGE})
    found = []
    for (site, q, k, at, words, keys), (_, _, k_text, *_), (_, q_image, k_image, *_) in zip(
        base, text, image, strict=True
    ):
        if site.kind != "joint":
            continue
        if at is None or words is None:
            found.append(f"{name} {site.name}: nothing tells the parts")
            continue
        # Learnt tokens stand in front of AuraFlow's text and count as its first places.
        learnt = model.register_tokens.shape[1] if hasattr(model, "register_tokens") else 0
        told, shown = set(range(words.start + learnt, words.stop)), moved(k, k_text)
        if name not in POOLED and told != shown:
            found.append(f"{name} {site.name}: text {words}, shown {sorted(shown)}")
        own = keys or at
        told, shown = set(range(own.start, own.stop)), moved(k, k_image)
        if not shown <= told or (name not in SUMMARISED and shown != told):
            found.append(f"{name} {site.name}: image keys {own}, shown {sorted(shown)}")
        told, shown = set(range(at.start, at.stop)), moved(q, q_image)
        if told != shown:
            found.append(f"{name} {site.name}: image rows {at}, shown {sorted(shown)}")
    return found


@pytest.mark.parametrize("name", ROLES)
def test_roles_of_tokens_are_those_that_show(name: str) -> None:
    assert not differences(name)
