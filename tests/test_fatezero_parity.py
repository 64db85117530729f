"""FateZero's tensor functions against tensors recorded from the released controllers (tests/fixtures/fatezero)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from attnctl.errors import ConfigError, window
from attnctl.kernels import attention
from attnctl.kernels.maps import softmax_map
from attnctl.processors.editing.align import (
    equalizer_row,
    follow_table,
    refine_map,
    replace_matrix,
    word_tokens,
)
from attnctl.processors.editing.fusion import (
    CrossEdit,
    Split,
    blend_latents,
    blend_mask,
    cross_edit,
    fold_values,
    frame_indices,
    gather_frames,
    mask_score,
    self_fuse,
    take_queries,
)

FIXTURES = Path(__file__).parent / "fixtures"


def fixture(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = FIXTURES / "fatezero"
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    folder = FIXTURES / "tiny_tokenizer"
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def find_word(tokenizer: Any, prompt: str, word: str) -> tuple[int, ...]:
    """Token positions of every occurrence of a word, as released: words stand between single spaces."""
    places = word_tokens(tokenizer, prompt)
    return tuple(t for w, part in zip(prompt.split(" "), places, strict=True) if w == word for t in part)


ALIGN, ALIGN_TENSORS = fixture("align")
PAIRS = ALIGN["pairs"]


def tokens_of(kind: str, pair: dict[str, Any], side: str, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Positions of each word, from the recorded pieces."""
    pieces = pair[kind][f"{side}_tokens"][1:-1]
    found, at = [], 0
    for word in pair[side].split(" "):
        start, length = at, 0
        while length < len(word) and at < len(pieces):
            length += len(pieces[at])
            at += 1
        found.append(tuple(range(start + 1, at + 1)))
    return tuple(found)


def edit_of(pair: dict[str, Any], kind: str, tokenizer: Any, weight: Tensor | None = None) -> CrossEdit:
    weight = torch.ones(77) if weight is None else weight
    if kind == "refine":
        ids = [tokenizer(pair[s]).input_ids for s in ("source", "target")]
        return CrossEdit.refine(*refine_map(*ids), weight)
    words = [word_tokens(tokenizer, pair[s]) for s in ("source", "target")]
    return CrossEdit.replace(replace_matrix(pair["source"], pair["target"], *words, tail="official"), weight)


def follow_of(steps: int, given: Any, target: str, tokenizer: Any) -> Tensor:
    given = given if isinstance(given, dict) else {"default_": given}
    words = {find_word(tokenizer, target, w): window(v, "test") for w, v in given.items() if w != "default_"}
    return follow_table(steps, window(given.get("default_", (0.0, 1.0)), "test"), words)


@pytest.mark.parametrize("kind", ["tiny", "clip"])
@pytest.mark.parametrize("i", range(len(PAIRS)))
def test_alignment(i: int, kind: str, tokenizer: CLIPTokenizer) -> None:
    pair = PAIRS[i]
    words = [tokens_of(kind, pair, side, tokenizer) for side in ("source", "target")]
    mapper, known = refine_map(pair[kind]["source_ids"], pair[kind]["target_ids"])
    assert torch.equal(mapper, ALIGN_TENSORS[f"{i}.{kind}.refine_mapper"])
    assert torch.equal(known, ALIGN_TENSORS[f"{i}.{kind}.refine_alphas"])
    if not pair[kind]["has_replace"]:
        with pytest.raises(ConfigError, match="refine"):
            replace_matrix(pair["source"], pair["target"], *words)
        return
    matrix = replace_matrix(pair["source"], pair["target"], *words, tail="official")
    assert torch.equal(matrix, ALIGN_TENSORS[f"{i}.{kind}.replace_matrix"])
    aligned = replace_matrix(pair["source"], pair["target"], *words)
    assert (aligned.sum(0) > 0).all()
    for s, t in zip(*words, strict=True):  # every word is carried over to its counterpart, also behind the last change
        assert torch.allclose(aligned[list(s)][:, list(t)].sum(1), torch.ones(len(s)))


@pytest.mark.parametrize("i", range(len(PAIRS)))
def test_words_to_tokens(i: int, tokenizer: CLIPTokenizer) -> None:
    pair = PAIRS[i]
    for side in ("source", "target"):
        assert tokenizer(pair[side]).input_ids == pair["tiny"][f"{side}_ids"]
        assert list(map(list, word_tokens(tokenizer, pair[side]))) == list(
            map(list, tokens_of("tiny", pair, side, tokenizer))
        )
        for word, positions in pair["tiny"][f"word_inds_{side}"].items():
            assert list(find_word(tokenizer, pair[side], word)) == positions


@pytest.mark.parametrize("j", range(len(ALIGN["time_alphas"])))
def test_follow_table(j: int, tokenizer: CLIPTokenizer) -> None:
    case = ALIGN["time_alphas"][j]
    found = follow_of(case["num_steps"], case["cross_replace_steps"], PAIRS[case["pair"]]["target"], tokenizer)
    assert torch.equal(found, ALIGN_TENSORS[f"time_alpha.{j}"])


@pytest.mark.parametrize("j", range(len(ALIGN["equalizers"])))
def test_equalizer(j: int, tokenizer: CLIPTokenizer) -> None:
    case = ALIGN["equalizers"][j]
    target = PAIRS[case["pair"]]["target"]
    pairs = dict(zip(case["words"], case["values"], strict=False))
    row = equalizer_row({find_word(tokenizer, target, w): v for w, v in pairs.items()})
    assert torch.equal(row[None], ALIGN_TENSORS[f"equalizer.{j}"])


CROSS, CROSS_TENSORS = fixture("cross_edit")


@pytest.mark.parametrize("c", range(len(CROSS["cases"])))
def test_cross_edit(c: int, tokenizer: CLIPTokenizer) -> None:
    case = CROSS["cases"][c]
    eq = case["eq_params"]
    weight = None
    if eq:
        found = zip(eq["words"], eq["values"], strict=False)
        weight = equalizer_row({find_word(tokenizer, case["target"], w): v for w, v in found})
    how = edit_of(case, case["kind"].removeprefix("reweight_"), tokenizer, weight)
    follow = follow_of(CROSS["num_steps"], case["cross_replace_steps"], case["target"], tokenizer)[case["step"]]
    source, edit = CROSS_TENSORS["attn_base"], CROSS_TENSORS["attn_edit"]
    fused = cross_edit(source, edit, how, follow)
    torch.testing.assert_close(fused[0:1, 1:2], CROSS_TENSORS[case["tensor"]], atol=1e-6, rtol=0)
    v = torch.randn(2, 2, 77, 8, generator=torch.Generator().manual_seed(c))
    from_source, from_edit = fold_values(v, how, follow)
    torch.testing.assert_close(source @ from_source + edit @ from_edit, fused @ v, atol=1e-5, rtol=0)


MASKS, MASK_TENSORS = fixture("blend_mask")


def columns_of(layers: list[Tensor], tokens: list[int]) -> Tensor:
    return torch.stack([x.float()[..., tokens].sum(-1).mean(1) for x in layers]).mean(0)


@pytest.mark.parametrize("c", range(len(MASKS["cases"])))
def test_blend_mask(c: int, tokenizer: CLIPTokenizer) -> None:
    case = MASKS["cases"][c]
    sides = {"source": MASKS["blend_words"][0], "target": MASKS["blend_words"][1]}
    masks, size = [], (case["target_hw"],) * 2
    for side in ("source", "target")[: 2 if case["prompt_choose"] == "both" else 1]:
        tokens = [t for w in sides[side] for t in find_word(tokenizer, MASKS[side], w)]
        columns = columns_of([MASK_TENSORS[f"{side}.{layer}"] for layer in range(5)], tokens)
        masks.append(blend_mask(columns, (6, 6), size, case["th"][0]))
        if side == "source" and size == (6, 6):
            found = mask_score(columns, (6, 6), size)[None]
            torch.testing.assert_close(found, MASK_TENSORS["normalised_source_r6"], atol=1e-6, rtol=0)
    want = MASK_TENSORS[case["tensor"]].bool()
    assert torch.equal(masks[0], want[0])
    if len(masks) == 2:
        assert torch.equal(masks[0] | masks[1], want[1])


FUSE, FUSE_TENSORS = fixture("self_fuse")


@pytest.mark.parametrize("form", ["fused", "map"])
@pytest.mark.parametrize("c", range(len(FUSE["cases"])))
def test_self_fuse(c: int, form: str, tokenizer: CLIPTokenizer) -> None:
    case, t = FUSE["cases"][c], FUSE_TENSORS
    indices = frame_indices(case["index"], FUSE["frames"])
    qe, qs = t["q_edit"], t["q_src"]
    ke, ks, ve = (gather_frames(t[n], indices) for n in ("k_edit", "k_src", "v_edit"))
    mask = None
    if case["blend_self_attention"]:
        tokens = [p for w in FUSE["blend_words"][0] for p in find_word(tokenizer, FUSE["source"], w)]
        columns = columns_of([t[f"cross_src.{layer}"] for layer in range(5)], tokens)
        mask = blend_mask(columns, (4, 4), (4, 4), case["th"][0])
        if f"{case['id']}.mask" in t:
            assert torch.equal(mask, t[f"{case['id']}.mask"].bool())
        mask = mask.flatten(1)

    def attend(own: bool, at: Tensor | None) -> Tensor:
        q, k = (qe, ke) if own else (qs, ks)
        q = take_queries(q, at)
        return attention(q, k, ve) if form == "fused" else softmax_map(q, k) @ ve

    start, end = window(case["self_replace_steps"], "test")
    active = int(case["num_steps"] * start) <= case["step"] < int(case["num_steps"] * end)
    out = self_fuse(attend, None if mask is None else Split.of(mask)) if active else attend(True, None)
    torch.testing.assert_close(out, t[f"{case['id']}.out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.1, 0.4]])
def test_split_attends_with_each_query_once(shares: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    f, h, n, d = len(shares), 2, 20, 8
    qe, qs, ke, ks, v = (torch.randn(f, h, n, d, generator=generator, dtype=torch.float64) for _ in range(5))
    mask = torch.stack([torch.randperm(n, generator=generator) < share * n for share in shares])
    asked: list[int] = []

    def attend(own: bool, at: Tensor | None) -> Tensor:
        assert at is not None
        asked.append(at.shape[1])
        return softmax_map(take_queries(qe if own else qs, at), ke if own else ks) @ v

    out = self_fuse(attend, Split.of(mask))
    whole = torch.where(mask[:, None, :, None], softmax_map(qe, ke) @ v, softmax_map(qs, ks) @ v)
    torch.testing.assert_close(out, whole, atol=1e-12, rtol=0)
    counts = mask.sum(1)
    assert sum(asked) == n + int(counts.max() - counts.min())  # no more than uneven masks ask for


def test_sequence(tokenizer: CLIPTokenizer) -> None:
    """Editing step k takes what inversion step N-1-k stored: maps, masks and the latent after that step."""
    told, t = fixture("sequence")
    t = {name: x.float() for name, x in t.items()}
    n, layers = told["num_steps"], told["layers"]
    how = edit_of(told, "replace", tokenizer)
    follow = follow_of(n, told["cross_replace_steps"], told["target"], tokenizer)
    words = [
        [p for w in told["blend_words"][i] for p in find_word(tokenizer, told[side], w)]
        for i, side in enumerate(("source", "target"))
    ]
    mask_layers = [i for i, name in enumerate(layers) if name == "down"][2:4]
    mask_layers += [i for i, name in enumerate(layers) if name == "up"][:3]
    threshold, summed = told["blend_th"][0], None
    for k in range(n):
        s = n - 1 - k
        columns = columns_of([t[f"inv.{s}.{i}.cross"] for i in mask_layers], words[0])
        for i in (2, 4, 6):
            side = 2 if layers[i] == "mid" else 4
            mask = blend_mask(columns, (4, 4), (side, side), threshold).flatten(1)
            a_s, a_e = t[f"inv.{s}.{i}.self"], t[f"edit.{k}.{i}.self"]
            active = k < int(n * told["self_replace_steps"])
            fused = torch.where(mask[:, None, :, None], a_e, a_s) if active else a_e
            torch.testing.assert_close(fused, t[f"fused.{k}.{i}.self"], atol=1e-6, rtol=0)
            found = cross_edit(t[f"inv.{s}.{i}.cross"], t[f"edit.{k}.{i}.cross"], how, follow[k])
            torch.testing.assert_close(found, t[f"fused.{k}.{i}.cross"], atol=1e-6, rtol=0)
        current = torch.stack([t[f"edit.{k}.{i}.cross"] for i in mask_layers])
        summed = current if summed is None else summed + current
        x, want = t[f"edit.{k}.latent_in"], t[f"edit.{k}.latent_out"]
        assert told["latent_changed"][k] == (not torch.equal(x, want))
        if told["latent_blend_window"][0] < k + 1 < told["latent_blend_window"][1]:
            own = blend_mask(columns, (4, 4), (8, 8), threshold)
            own |= blend_mask(columns_of(list(summed), words[1]), (4, 4), (8, 8), threshold)
            inverted = t[f"inv.{s}.latent_after"]
            blended = blend_latents(*(z[0].transpose(0, 1) for z in (x, inverted)), own)
            torch.testing.assert_close(blended.transpose(0, 1)[None], want, atol=1e-6, rtol=0)
        # The neighbouring stored step is another result: nobody can be off by one unnoticed.
        wrong = cross_edit(t[f"inv.{(s + 1) % n}.2.cross"], t[f"edit.{k}.2.cross"], how, follow[0])
        right = cross_edit(t[f"inv.{s}.2.cross"], t[f"edit.{k}.2.cross"], how, follow[0])
        assert (wrong - right).abs().max() > 1e-3


@pytest.mark.parametrize("case", fixture("ddim_inversion")[0]["cases"], ids=lambda c: str(c["num_steps"]))
def test_ddim_inversion(case: dict[str, Any]) -> None:
    told, t = fixture("ddim_inversion")
    n, w = case["num_steps"], t[f"{case['num_steps']}.W"]

    def eps(z: Tensor, time: int) -> Tensor:
        return torch.tanh(torch.einsum("ij,bjfhw->bifhw", w, z)) * (0.5 + time / 1000)

    inverse, forward = (cls(**told["scheduler"]) for cls in (DDIMInverseScheduler, DDIMScheduler))
    inverse.set_timesteps(n)
    forward.set_timesteps(n)
    assert forward.timesteps.tolist() == case["timesteps"] == inverse.timesteps.flip(0).tolist()
    x = t[f"{n}.x0"]
    for i, time in enumerate(inverse.timesteps):
        torch.testing.assert_close(x, t[f"{n}.traj"][i], atol=1e-5, rtol=1e-6)
        x = inverse.step(eps(x, int(time)), int(time), x).prev_sample
    torch.testing.assert_close(x, t[f"{n}.traj"][n], atol=1e-5, rtol=1e-6)
    for time in forward.timesteps:
        x = forward.step(eps(x, int(time)), int(time), x).prev_sample
    torch.testing.assert_close(x, t[f"{n}.resampled"], atol=1e-4, rtol=1e-4)
