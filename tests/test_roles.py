"""Which tokens are the text's and which the image's, by what moves: with attention silenced, tokens never mix.

At every site the output of attention is zero. If then only the text changes, exactly the text's tokens change among the
queries and keys of each joint attention; if only the image changes, exactly the image's.
"""

from __future__ import annotations

import pytest
import torch
import zoo

import attnctl
from attnctl.pipelines.probing import moved, silenced, with_other_image, with_other_text

# The prompt's pooled embedding modulates every token of these hosts, so the change of text shows everywhere.
POOLED = ("mochi",)
# Their text is a summary that other layers make of the prompt.
SUMMARISED = ("bria_fibo2",)

ROLES = tuple(n for n in zoo.EVERY if n not in ("anyflow_far", "kandinsky6_sr", "prior"))


def differences(name: str) -> list[str]:
    """Compare the roles that attnctl gives with those that show, at every joint site of one model."""
    # Lumina 2 packs the text of each row by its length, so that only equal rows have parts.
    rows = 1 if name == "lumina2" or (name in zoo.HOSTS and zoo.HOSTS[name].rows == 1) else 2
    with torch.no_grad():
        model, inputs = zoo.build(name, rows)
        if not any(s.kind == "joint" for s in attnctl.find_sites(model)):
            return []
        base, text, image = (silenced(model, a) for a in (inputs, with_other_text(inputs), with_other_image(inputs)))
    found = []
    for call, other, another in zip(base, text, image, strict=True):
        site, at, words, keys = call.site, call.image, call.text, call.keys
        if site.kind != "joint":
            continue
        if at is None or words is None:
            found.append(f"{name} {site.name}: nothing tells the parts")
            continue
        # Learnt tokens stand in front of AuraFlow's text and count as its first places.
        learnt = model.register_tokens.shape[1] if hasattr(model, "register_tokens") else 0
        told, shown = set(range(words.start + learnt, words.stop)), set(moved(call.k, other.k))
        if name not in POOLED and told != shown:
            found.append(f"{name} {site.name}: text {words}, shown {sorted(shown)}")
        own = keys or at
        told, shown = set(range(own.start, own.stop)), set(moved(call.k, another.k))
        if not shown <= told or (name not in SUMMARISED and shown != told):
            found.append(f"{name} {site.name}: image keys {own}, shown {sorted(shown)}")
        told, shown = set(range(at.start, at.stop)), set(moved(call.q, another.q))
        if told != shown:
            found.append(f"{name} {site.name}: image rows {at}, shown {sorted(shown)}")
    return found


@pytest.mark.parametrize("name", ROLES)
def test_roles_of_tokens_are_those_that_show(name: str) -> None:
    assert not differences(name)
