"""Mixers of one's own: registered by class, swapped in by class or kind, found by entry point; what is refused."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import attnctl
from attnctl.backbones.mixers import MIXERS, Mixer, Slot
from attnctl.errors import ConfigError, ConflictError, SiteError
from attnctl.processors import Capture

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 3}


class Powered(Mixer, kind="powered"):
    """Linear attention whose features are raised to a power."""

    def __init__(self, slot: Slot, *, power: float = 3.0, backend: str = "auto") -> None:
        super().__init__(slot, backend=backend)
        self.power = nn.Parameter(torch.tensor(power, device=slot.device, dtype=slot.dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mix tokens."""
        q, k = ((y.relu() + 1e-3) ** self.power for y in (q, k))
        return q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)


class Plain(Mixer, kind="plain mean"):
    """Average the values: a mixer without options of its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mix tokens."""
        return v.mean(2, keepdim=True).expand_as(v)


def vit() -> nn.Module:
    """Build a small vision transformer."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT).eval()


def test_a_class_and_its_kind_do_the_same() -> None:
    x = torch.rand(2, 3, 32, 32)
    plain = vit()(x)
    by_class, by_kind = attnctl.swap(vit(), Powered, power=2.0), attnctl.swap(vit(), "powered", power=2.0)
    assert torch.equal(by_class(x), by_kind(x))
    report = attnctl.swap_report(by_class)
    assert (report.kind, report.options) == ("powered", {"power": 2.0})
    assert list(report.new) == [f"blocks.{n}.attn.mixer.power" for n in range(2)]
    host: Any = by_class.blocks[0].attn  # type: ignore[index, union-attr]
    tokens = torch.rand(1, 17, 32)
    q, k, v = host.qkv(tokens).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    weights = (q.relu() + 1e-3) ** 2 @ ((k.relu() + 1e-3) ** 2).mT
    want = host.proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(host(tokens), want, atol=1e-5, rtol=1e-4)
    assert torch.equal(attnctl.unswap(by_class)(x), plain)


def test_a_mixer_without_options_takes_a_backend() -> None:
    model = attnctl.swap(vit(), Plain, backend="math")
    assert model(torch.rand(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(ConfigError, match="'plain mean' takes 'backend'"):
        attnctl.swap(vit(), Plain, power=2)


def test_a_class_of_its_own_is_read_too() -> None:
    model = attnctl.swap(vit(), Plain)
    with attnctl.control(model, Capture(points=((0.5, 0.5),))) as handle:
        model(torch.rand(1, 3, 32, 32))
        for layer in handle.maps.layers.values():
            torch.testing.assert_close(layer, torch.full_like(layer, 1 / 17), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (nn.Linear, "torch.nn.modules.linear.Linear was given; expected a kind or a subclass of Mixer"),
        (Mixer, 'has no kind. Declare it as class Mixer'),
        (Powered(Slot(8, 2)), "expected a kind by name or a subclass"),
        (3, "expected a kind by name or a subclass"),
        ("powerd", "Did you mean 'powered'"),
    ],
)  # fmt: skip
def test_what_is_no_mixer(kind: Any, said: str) -> None:
    model = vit()
    with pytest.raises(ConfigError, match=said):
        attnctl.swap(model, kind)
    assert "_attnctl_swaps" not in vars(model)


def test_kinds_are_unique_and_names() -> None:
    for kind, said in (("agent", "Two mixers have the kind 'agent'"), (3, "kind=3; expected a name")):
        with pytest.raises(ConfigError, match=said):
            type("Other", (Mixer,), {"__module__": __name__}, kind=kind)
    assert MIXERS["agent"].__name__ == "AgentMixer"
    again = type("Plain", (Mixer,), {"__module__": __name__, "__qualname__": "Plain"}, kind="plain mean")
    assert MIXERS["plain mean"] is again  # as when a cell of a notebook runs again
    MIXERS["plain mean"] = Plain


def test_entry_points_bring_mixers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_mixer.py").write_text(
        "from attnctl.backbones.mixers import Mixer\n"
        "class Theirs(Mixer, kind='theirs'):\n"
        "    def forward(self, q, k, v, x, grid):\n"
        "        return v\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("theirs", "their_mixer:Theirs", "attnctl.mixers")]
    monkeypatch.setattr("attnctl.data.controls.entry_points", lambda group: points if group == "attnctl.mixers" else [])
    assert attnctl.swap(vit(), "theirs")(torch.rand(1, 3, 32, 32)).isfinite().all()
    MIXERS.pop("theirs")
    sys.modules.pop("their_mixer")
    points[:] = [EntryPoint("gone", "no_such_module:Gone", "attnctl.mixers")]
    with pytest.raises(ConfigError, match=r"kind='gone' was given.*no_such_module.*cannot be imported"):
        attnctl.swap(vit(), "gone")
    points[:] = [EntryPoint("gone", "json:dumps", "attnctl.mixers")]
    with pytest.raises(ConfigError, match=r"kind='gone' was given.*names <function dumps.*no subclass of Mixer"):
        attnctl.swap(vit(), "gone")


def test_a_swapped_place_is_refused_until_it_is_taken_back() -> None:
    model, x = vit(), torch.rand(1, 3, 32, 32)
    plain = model(x)
    attnctl.swap(model, "agent", blocks=0, num_agents=4)
    for blocks in (None, 0, "blocks.*", lambda name, index: index == 0):
        with pytest.raises(ConflictError, match=r"blocks\.0\.attn is already swapped.*unswap.*first.*blocks\.1\.attn"):
            attnctl.swap(model, "sigmoid", blocks=blocks)
    attnctl.swap(model, "sigmoid", blocks=1)  # places count as before the first swap
    assert attnctl.swap_report(model).sites == ("blocks.1.attn",)
    with pytest.raises(ConflictError, match=r"already swapped \(2 of the 2 places chosen are\)\. Call .*first\.$"):
        attnctl.swap(model, "sigmoid")
    with pytest.raises(SiteError, match="0 to 1"):
        attnctl.swap(model, "sigmoid", blocks=2)
    assert torch.equal(attnctl.unswap(attnctl.unswap(model))(x), plain)
