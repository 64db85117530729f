"""Fusion of attention between rows of a transformer's call, against maps written out in float64."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from contract import distance
from dense_maps import map_of
from safetensors.torch import load_file
from torch import Tensor

import attnctl
from attnctl.core.call import AttnCall, Proceed
from attnctl.core.hosts.families import family_of
from attnctl.core.hosts.tokens import image_keys, parts_in
from attnctl.errors import UnsupportedModelError
from attnctl.kernels import attention
from attnctl.processors import Control, FateZero
from attnctl.processors.editing.fusion import CrossEdit, cross_edit
from attnctl.processors.editing.joint import Fusion, MapAttention, PairAttention, Tokens, fuse_image
from attnctl.processors.editing.rows import RowFusion, row_of

FIXTURE = Path(__file__).parent / "fixtures" / "flow_editing"
CASES = load_file(FIXTURE / "joint_fusion.safetensors")
SETTINGS = json.loads((FIXTURE / "joint_fusion.json").read_text())
FAMILIES = [
    "sd3", "sd35", "flux", "flux2", "qwen", "cogvideox", "hunyuanvideo", "mochi", "wan", "ltx", "pixart", "sana",
    "auraflow", "cogview4", "hunyuandit", "allegro",
]  # fmt: skip
# Of other grids than 8 x 8; the last row of them take one prompt in a call.
OTHERS = [
    "sd15", "sdxl", "cogvideox_rope", "wan_i2v", "cosmos", "bria", "bria_fibo", "ovis", "longcat_image", "chroma",
    "flux3", "hunyuan_image", "cogview3plus", "glm_image", "consisid", "easyanimate", "ernie_image", "krea2",
    "ideogram4", "nucleus", "joyimage", "joyimage_plus", "prx", "bria_fibo2", "chronoedit", "skyreels2", "wan_vace",
    "anyflow", "wan_animate", "sana_video", "kandinsky6", "lumina_next", "dit", "ltx2", "sana_wm_refiner", "unet2d",
    "dreamlite", "uvit", "ace_step", "longcat_audio", "stable_audio", "stable_audio3", "minimax_music3",
    "qwen21", "helios", "wan_animate2", "sana_wm", "cosmos3",
]  # fmt: skip


def fake_call() -> Any:
    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, scale: float | None = None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    link = SimpleNamespace(site=None, state=None, kernel=kernel)
    return AttnCall(CASES["q_e"], CASES["k_e"], CASES["v_e"], None, None, link, 0, parts_in(), kernel)


@pytest.mark.parametrize("kind", ["pair", "map"])
@pytest.mark.parametrize("mass", ["edit", "source"])
def test_fixture(mass: Any, kind: str) -> None:
    n, call = SETTINGS["image"], fake_call()
    q, k, q_s, k_s = (CASES[name] for name in ("q_e", "k_e", "q_s", "k_s"))
    tokens = Tokens(slice(0, n), slice(n, n + SETTINGS["text"]))
    length = SETTINGS["text"]
    how = CrossEdit(CASES["R"].double(), torch.zeros(length).double(), torch.ones(length).double())
    inside = CASES["M"][:, 0].bool()[None].expand(q.shape[0], -1)
    source = PairAttention(call, q_s, k_s) if kind == "pair" else MapAttention.of(q_s, k_s, None)
    fusion = Fusion(True, how, CASES["w"], inside, mass)
    out = fuse_image(source, PairAttention(call, q, k), (tokens, tokens), CASES["v_e"], fusion)
    assert distance(out, CASES[f"output.mass_{mass}"]) <= 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_the_text_mass_needs_no_second_pass_over_the_keys(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n, text = 192, 16
    q, k, v = (torch.randn(1, 2, n + m, 8, generator=torch.Generator().manual_seed(m)) for m in (0, text, text))
    mask = (torch.arange(n + text) < n + text - 3)[None, None, None] if masked else None
    link = SimpleNamespace(site=None, state=None, kernel=attention)
    pair = PairAttention(AttnCall(q, k, v, None, None, link, 0, parts_in(), attention), q, k, mask)
    part = slice(n, n + text)
    whole, mass = pair.whole(v), pair.mass(part)
    monkeypatch.setattr(PairAttention, "mass", lambda *_: pytest.fail("a second pass"))
    out, found = pair.whole_and_mass(v, part)
    assert distance(out, whole) <= 1e-6
    assert distance(found, mass) <= 1e-6


# Every family: a call of two rows, the source's and the edit's ------------------------------------------------------


class Words:
    """Words that correspond in a crooked way: some are new, some are made of two, some do not follow."""

    def how(self, of_source: int, of_target: int) -> CrossEdit:
        take = torch.zeros(of_source, of_target)
        for j in range(of_target):
            take[(j + 1) % of_source, j] = 0.75
            take[j % of_source, j] += 0.25
        new = (torch.arange(of_target) % 3 == 1).float()
        return CrossEdit(take * (1 - new), new, 1 + torch.arange(of_target) / 4)

    def follow(self, steps: int, length: int) -> Tensor:
        return (torch.arange(length) % 4 != 2).float().expand(steps + 1, length)


class Same(Words):
    """Words that correspond one to one, all following."""

    def how(self, of_source: int, of_target: int) -> CrossEdit:
        assert of_source == of_target
        return CrossEdit(torch.eye(of_source), torch.zeros(of_source), torch.ones(of_source))

    def follow(self, steps: int, length: int) -> Tensor:
        return torch.ones(steps + 1, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused(Control, abstract=True):
    """Fuse rows 0 and 1 at every site, and note how far each output is from the maps written out."""

    fusion: Any
    far: list[float] = dataclasses.field(default_factory=list)
    rows: dict[str, Any] = dataclasses.field(default_factory=dict)
    kinds = ("self", "cross", "joint", "dual")

    def default_sites(self, sites: Any, family: Any) -> Any:
        return self.fusion.control.resolve(sites, family)

    def wrapper(self, sites: Any) -> Any:
        return self.fused

    def fused(self, call: AttnCall, proceed: Proceed) -> Tensor:
        alone = call.q.shape[0] == 1
        if alone and call.site.name not in self.rows:
            self.rows[call.site.name] = call, row_of(call, 0)
            return proceed(call)
        source, kept = self.rows.pop(call.site.name) if alone else (call, row_of(call, 0))
        edit = 0 if alone else 1
        out = self.fusion.fuse(call, proceed, kept, edit)
        expected, others = explicit(self.fusion, source, 0, call, edit), proceed(call)
        self.far.append(distance(out[edit], expected))
        if not alone:
            assert distance(out[0], others[0]) <= 1e-14  # the source's own row
        return out


def explicit(fusion: RowFusion, source: AttnCall, s: int, call: AttnCall, e: int) -> Tensor:
    """Write the fused map of the edit's row out, and multiply the edit's values by it."""
    a_s, a_e = map_of(source)[s], map_of(call)[e]
    v = call.v[e].repeat_interleave(call.q.shape[1] // call.v.shape[1], 0)
    inside = fusion.mask_at(call)
    m = 0.0 if inside is None else inside[0, :, None].double()
    whose = 1.0 if fusion.control.text_mass == "edit" else m
    if call.site.kind in ("self", "dual"):
        of_image = torch.zeros(a_e.shape[1], 1, dtype=a_e.dtype)
        of_image[call.image or slice(None)] = 1
        return torch.where(of_image.bool(), m * a_e + (1 - m) * a_s, a_e) @ v
    if call.site.kind == "cross":
        return mapped(fusion, a_s, a_e) @ v
    queries, image, text = call.image, image_keys(call), call.text
    of_source = source.text
    assert None not in (queries, text, of_source, source.image)
    parts = [
        (a[:, i.image][..., image_keys(i)], a[:, i.image][..., t])  # type: ignore[index]
        for a, i, t in ((a_s, source, of_source), (a_e, call, text))
    ]
    (si, sx), (ei, ex) = ([p / p.sum(-1, keepdim=True) for p in both] for both in parts)
    gs, ge = (both[1].sum(-1, keepdim=True) for both in parts)
    g = whose * ge + (1 - whose) * gs
    rows = torch.zeros(a_e.shape[0], queries.stop - queries.start, a_e.shape[2], dtype=a_e.dtype)
    rows[..., image] = (1 - g) * (m * ei + (1 - m) * si)
    rows[..., text] = g * mapped(fusion, sx, ex)
    out = a_e @ v
    out[:, queries] = rows @ v
    return out


def mapped(fusion: RowFusion, a_s: Tensor, a_e: Tensor) -> Tensor:
    words: Any = fusion.exchange
    how = words.how(a_s.shape[-1], a_e.shape[-1]).to(a_e)
    return cross_edit(a_s, a_e, how, words.follow(1, a_e.shape[-1])[0].to(a_e))


@pytest.mark.parametrize(
    ("name", "masked", "mass"),
    [
        *((name, masked, "source") for name in FAMILIES for masked in (False, True)),
        *((name, False, "source") for name in OTHERS),
        ("sd3", True, "edit"),
    ],
)
def test_every_family_equals_maps_written_out(name: str, masked: bool, mass: Any) -> None:
    model, inputs = zoo.build(name, dtype=torch.float64)
    control = FateZero(source="a", target="b", cross_replace=1.0, self_replace=1.0, text_mass=mass)
    fusion = RowFusion(control, attnctl.find_sites(model), family_of(model))
    fusion.exchange, fusion.steps = Words(), 1  # type: ignore[assignment]
    fusion.selves = fusion.crossing = True
    if masked:
        fusion.region = torch.arange(8)[None, None].expand(1, 8, 8) < 4
    noted = Fused(fusion=fusion)
    with torch.no_grad(), attnctl.control(model, noted, layout="cond"):
        zoo.call(model, inputs)
        if not noted.far:  # the first call was the source's
            zoo.call(model, zoo.build(name, dtype=torch.float64, seed=1)[1])
    assert len(noted.far) >= 4
    assert max(noted.far) <= (1e-6 if name in ("sana", "hunyuandit") else 1e-12)


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen", "hunyuanvideo", "wan"])
def test_equal_rows_stay_what_they_are(name: str) -> None:
    """Taking the attention of an equal row, word by word, is the identity."""
    model, inputs = zoo.build(name, dtype=torch.float64)
    inputs = zoo.take(inputs, [1, 1])
    control = FateZero(source="a", target="b", cross_replace=1.0, self_replace=1.0)
    fusion = RowFusion(control, attnctl.find_sites(model), family_of(model))
    fusion.exchange, fusion.steps = Same(), 1  # type: ignore[assignment]
    fusion.selves = fusion.crossing = True
    with torch.no_grad():
        plain = zoo.call(model, inputs)
        with attnctl.control(model, Fused(fusion=fusion), layout="cond"):
            assert distance(zoo.call(model, inputs), plain) <= 1e-12


def fused_zimage(width: int) -> list[float]:
    """Fuse two rows of Z-Image, whose image has 4 * `width` tokens; return how far each site is."""
    model, inputs = zoo.build("zimage", dtype=torch.float64)
    inputs["x"] = [torch.cat([x, x], -1)[..., :width] for x in inputs["x"]]
    control = FateZero(source="a", target="b", cross_replace=1.0, self_replace=1.0)
    fusion = RowFusion(control, attnctl.find_sites(model), family_of(model))
    fusion.exchange, fusion.steps = Words(), 1  # type: ignore[assignment]
    fusion.selves = fusion.crossing = True
    noted = Fused(fusion=fusion)
    with torch.no_grad(), attnctl.control(model, noted, layout="cond"):
        try:
            zoo.call(model, inputs)
        finally:
            assert max(noted.far) <= 1e-12
    return noted.far


def test_keys_of_neither_image_nor_text_are_refused() -> None:
    """Z-Image fills its image up to a multiple of 32; what fills it asks in its refiner, and is a key behind."""
    assert len(fused_zimage(16)) == 5
    words = r"layers\.0\.attention attends to 96 keys, of which 48 are the image's and 32 the text's"
    with pytest.raises(UnsupportedModelError, match=words):
        fused_zimage(12)
