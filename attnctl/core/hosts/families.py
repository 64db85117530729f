"""Per-family facts about diffusers' denoisers, in one table.

A family answers four questions that no denoiser answers by itself: what kind of attention each site computes, in which
order the sites run, how the tokens lie on the image or video, and which layers a paper perturbs in it. Everything else
in attnctl is generic; a new model family is a new row here (and a tiny model in `tests/zoo.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from attnctl.core.hosts.published import Default
from attnctl.core.hosts.readings import read_once
from attnctl.core.sites import Grid

__all__ = ["FAMILIES", "GENERIC", "Family", "family_of", "kind_of"]

Bound = Mapping[str, Any]
"""Arguments of one denoiser call by parameter name."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What attnctl knows about one denoiser architecture.

    Attributes:
        name: Short name used in tables and reports.
        classes: Class names of the denoisers; compared by name so that no model is imported.
        kinds: Pairs (pattern, kind): the first pattern found in a site's name decides its kind.
        text: Where text tokens lie in a joint sequence.
        grid: Gives frames, rows and columns of the token grid from the arguments of a denoiser call.
        image_tokens: Gives the number of image tokens in a packed sequence, or None where rows differ in it; no
            function means the product of the grid.
        first: Pattern of the sites that run before all others although they are registered later.
        unet: Whether the sites lie in down, mid and up stages of halving resolution.
        all_frames: Whether its self or joint attention runs over the tokens of all frames, frame by frame.
        cond_first: Whether its pipelines batch the prompt before the negative prompt.
        from_prompt: Whether its pipelines count guidance from the prompt, c + s (c - u), and not from u + s (c - u).
        published: Published sites by the kind of control that acts there, named by its class: "Guidance" for the
            perturbation of attention, "LatentGuidance" for attention to words. A control that has sites of its own in
            some families names them in its own file (`Control.published`).
        note: A limit that `report()` prints.
    """

    name: str
    classes: tuple[str, ...]
    kinds: tuple[tuple[str, str], ...]
    text: Literal["first", "last"] | None = None
    grid: Callable[[torch.nn.Module, Bound], Grid | None] = lambda model, bound: None
    image_tokens: Callable[[torch.nn.Module, Bound], int | None] | None = None
    first: str | None = None
    unet: bool = False
    all_frames: bool = False
    cond_first: bool = False
    from_prompt: bool = False
    published: Mapping[str, Default] = field(default_factory=dict)
    note: str | None = None


def _patch(model: torch.nn.Module, default: int = 1) -> tuple[int, int]:
    """Return the patch size (time, space) from a model's config."""
    config: Any = model.config
    size = getattr(config, "patch_size", default)
    if isinstance(size, (tuple, list)):  # (time, height, width)
        return int(size[0]), int(size[-1])
    return int(getattr(config, "patch_size_t", None) or 1), int(size)


def _image(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off hidden states [B, C, H, W]."""
    h, w = bound["hidden_states"].shape[-2:]
    p = _patch(model)[1]
    return 1, h // p, w // p


def _video(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off hidden states [B, C, F, H, W]."""
    f, h, w = bound["hidden_states"].shape[-3:]
    pt, p = _patch(model)
    return math.ceil(f / pt), h // p, w // p


def _frames_first(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off hidden states [B, F, C, H, W]."""
    _, f, _, h, w = bound["hidden_states"].shape
    pt, p = _patch(model)
    return math.ceil(f / pt), h // p, w // p


def _latte(model: torch.nn.Module, bound: Bound) -> Grid:
    f, h, w = bound["hidden_states"].shape[-3:]
    p = _patch(model)[1]
    return f, h // p, w // p


def _sample(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the full-resolution grid of a UNet off its sample [B, C, H, W] or [B, C, F, H, W]."""
    shape = bound["sample"].shape
    return (1 if len(shape) == 4 else shape[2]), shape[-2], shape[-1]


def _sample_frames_first(model: torch.nn.Module, bound: Bound) -> Grid:
    _, f, _, h, w = bound["sample"].shape
    return f, h, w


def _ids(model: torch.nn.Module, bound: Bound) -> Grid | None:
    """Read the grid off position ids [N, 3 or 4] (time, row, column, ...)."""
    ids = bound.get("img_ids")
    if ids is None or ids.is_meta:
        return None
    return read_once(ids, "grid", _extent)


def _extent(ids: Tensor) -> Grid:
    ids = ids[0] if ids.ndim == 3 else ids
    size = (ids.amax(0) - ids.amin(0) + 1).tolist()
    return int(size[0]), int(size[1]), int(size[2])


def _img_shapes(model: torch.nn.Module, bound: Bound) -> Grid | None:
    shapes = bound.get("img_shapes")
    if not shapes:
        return None
    first = shapes[0]
    if isinstance(first, list):  # an edit pipeline adds its reference images: the first entry is what is generated
        first = first[0]
    return int(first[0]), int(first[1]), int(first[2])


def _ltx(model: torch.nn.Module, bound: Bound) -> Grid | None:
    size = (bound.get("num_frames"), bound.get("height"), bound.get("width"))
    return None if None in size else (int(size[0]), int(size[1]), int(size[2]))  # type: ignore[arg-type]


def _listed(model: torch.nn.Module, bound: Bound) -> Grid:
    """Read the grid off a list of images [C, F, H, W] (Z-Image)."""
    _, f, h, w = bound["x"][0].shape
    p = int(bound.get("patch_size") or 2)
    return f // int(bound.get("f_patch_size") or 1), h // p, w // p


def _listed_tokens(model: torch.nn.Module, bound: Bound) -> int:
    # Z-Image pads the image part of the sequence to a multiple of 32.
    return math.ceil(math.prod(_listed(model, bound)) / 32) * 32


def _even_text(model: torch.nn.Module, bound: Bound) -> int | None:
    # Lumina 2 packs the valid text of each row before its image: uneven prompts put the image at uneven places.
    mask = bound.get("encoder_attention_mask")
    if mask is not None and len(mask) > 1 and not read_once(mask, "even", _even_rows):
        return None
    return math.prod(_image(model, bound))


def _even_rows(mask: Tensor) -> bool:
    counts = mask.sum(1)
    return bool((counts == counts[0]).all())


def _packed(model: torch.nn.Module, bound: Bound) -> int:
    return int(bound["hidden_states"].shape[1])


_SD = Default(sites="mid", source="PAG, arXiv 2403.17377: the mid block")
_WORDS = Default(reduction=4, source="Attend-and-Excite, arXiv 2301.13826: 16 x 16 maps of 64 x 64 latents")
_UNET = (("fuser", "aux"), ("attn2", "cross"), ("attn1", "self"))  # GLIGEN's fuser attends to places and phrases
_DIT = (("attn2", "cross"), ("attn1", "self"))
_TEMPORAL = r"motion_modules|temporal_transformer_blocks|temp_attentions|transformer_in"
_VIDEO_UNET = ((rf"(?:{_TEMPORAL}).*attn", "temporal"), *_UNET)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="Stable Diffusion 1, 2, XL",
        classes=("UNet2DConditionModel",),
        kinds=_UNET,
        grid=_sample,
        unet=True,
        published={"Guidance": _SD, "LatentGuidance": _WORDS},
    ),
    Family(
        name="AnimateDiff",
        classes=("UNetMotionModel",),
        kinds=_VIDEO_UNET,
        grid=_sample,
        unet=True,
        published={
            "Guidance": Default(sites="mid", source="diffusers AnimateDiffPAGPipeline: mid_block.*attn1"),
            "LatentGuidance": _WORDS,
        },
    ),
    Family(
        name="Stable Video Diffusion",
        classes=("UNetSpatioTemporalConditionModel",),
        kinds=(("temporal_transformer_blocks.*attn2", "cross"), *_VIDEO_UNET),
        grid=_sample_frames_first,
        unet=True,
    ),
    Family(name="UNet3D", classes=("UNet3DConditionModel",), kinds=_VIDEO_UNET, grid=_sample, unet=True),
    Family(
        name="I2VGenXL",
        classes=("I2VGenXLUNet",),
        kinds=(("image_latents_temporal_encoder", "temporal"), *_VIDEO_UNET),
        grid=_sample,
        first="image_latents_temporal_encoder",
        unet=True,
    ),
    Family(
        name="Stable Diffusion 3, 3.5",
        classes=("SD3Transformer2DModel",),
        kinds=(("attn2", "dual"), ("attn", "joint")),
        text="last",
        grid=_image,
        published={
            "Guidance": Default(depth=(13, 24), source="PAG for SD3 by its authors (diffusers#8861): block 13 of 24"),
            "LatentGuidance": Default(
                span=(5, 13, 24), source="Self-Cross guidance, arXiv 2411.18936: blocks 5 to 12 of 24"
            ),
        },
    ),
    Family(
        name="FLUX.1",
        classes=("FluxTransformer2DModel",),
        kinds=(("attn", "joint"),),
        text="first",
        grid=_ids,
        image_tokens=_packed,
        published={
            "LatentGuidance": Default(
                sites="transformer_blocks.*", source="FOCUS, arXiv 2510.02315: all double-stream blocks"
            )
        },
    ),
    Family(
        name="FLUX.2",
        classes=("Flux2Transformer2DModel",),
        kinds=(("attn", "joint"),),
        text="first",
        grid=_ids,
        image_tokens=_packed,
    ),
    Family(
        name="Chroma",
        classes=("ChromaTransformer2DModel",),
        kinds=(("attn", "joint"),),
        text="first",
        grid=_ids,
        image_tokens=_packed,
    ),
    Family(
        name="PixArt",
        classes=("PixArtTransformer2DModel",),
        kinds=_DIT,
        grid=_image,
        published={"Guidance": Default(depth=(14, 28), source="PAG for PixArt-Sigma (diffusers#8921): block 14 of 28")},
    ),
    Family(
        name="Sana",
        classes=("SanaTransformer2DModel",),
        kinds=_DIT,
        grid=_image,
        published={"Guidance": Default(depth=(8, 20), source="diffusers SanaPAGPipeline example: block 8 of 20")},
        note="attn1 is linear attention: targets identity and uniform only",
    ),
    Family(
        name="HunyuanDiT",
        classes=("HunyuanDiT2DModel",),
        kinds=_DIT,
        grid=_image,
        published={"Guidance": Default(depth=(14, 40), source="PAG for HunyuanDiT (diffusers#8936): block 14 of 40")},
    ),
    Family(
        name="AuraFlow",
        classes=("AuraFlowTransformer2DModel",),
        kinds=(("attn", "joint"),),
        text="first",
        grid=_image,
    ),
    Family(
        name="Lumina 2",
        classes=("Lumina2Transformer2DModel",),
        kinds=(("context_refiner", "text"), ("noise_refiner", "self"), ("attn", "joint")),
        text="first",
        grid=_image,
        image_tokens=_even_text,
        first="context_refiner",
    ),
    Family(
        name="CogView 4",
        classes=("CogView4Transformer2DModel",),
        kinds=(("attn1", "joint"),),
        text="first",
        grid=_image,
    ),
    Family(
        name="Qwen-Image",
        classes=("QwenImageTransformer2DModel",),
        kinds=(("attn", "joint"),),
        text="first",
        grid=_img_shapes,
        image_tokens=_packed,
    ),
    Family(
        name="Z-Image",
        classes=("ZImageTransformer2DModel",),
        kinds=(("context_refiner", "text"), ("noise_refiner", "self"), ("attention", "joint")),
        text="last",
        grid=_listed,
        image_tokens=_listed_tokens,
        cond_first=True,
    ),
    Family(
        name="CogVideoX",
        classes=("CogVideoXTransformer3DModel",),
        kinds=(("attn1", "joint"),),
        text="first",
        grid=_frames_first,
        all_frames=True,
    ),
    Family(name="Wan", classes=("WanTransformer3DModel",), kinds=_DIT, grid=_video, all_frames=True),
    Family(
        name="LTX-Video",
        classes=("LTXVideoTransformer3DModel",),
        kinds=_DIT,
        grid=_ltx,
        all_frames=True,
        image_tokens=_packed,
        published={"Guidance": Default(depth=(19, 28), source="STG, arXiv 2411.18664: LTX-Video block 19 of 28")},
    ),
    Family(
        name="HunyuanVideo",
        classes=("HunyuanVideoTransformer3DModel",),
        kinds=(("token_refiner", "text"), ("attn", "joint")),
        text="last",
        grid=_video,
        all_frames=True,
        published={"Guidance": Default(depth=(2, 60), source="STG, arXiv 2411.18664: HunyuanVideo block 2 of 60")},
    ),
    Family(
        name="Mochi",
        classes=("MochiTransformer3DModel",),
        kinds=(("attn1", "joint"),),
        text="last",
        grid=_video,
        all_frames=True,
        published={"Guidance": Default(depth=(34, 48), source="STG, arXiv 2411.18664: Mochi block 34 of 48")},
    ),
    Family(
        name="Latte",
        classes=("LatteTransformer3DModel",),
        kinds=(("temporal_transformer_blocks", "temporal"), *_DIT),
        grid=_latte,
    ),
    Family(name="Allegro", classes=("AllegroTransformer3DModel",), kinds=_DIT, grid=_video, all_frames=True),
    Family(
        name="Cosmos",
        classes=("CosmosTransformer3DModel",),
        kinds=_DIT,
        grid=_video,
        all_frames=True,
        from_prompt=True,
    ),
)

GENERIC = Family(
    name="unlisted",
    classes=(),
    kinds=((rf"(?:{_TEMPORAL}).*attn", "temporal"),),
    note="not in attnctl's family table: site kinds are read off the modules; joint token scopes are refused",
)

_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}


def family_of(denoiser: torch.nn.Module) -> Family:
    """Look up a denoiser's family by its class name, subclasses included."""
    for cls in type(denoiser).__mro__:
        if cls.__name__ in _BY_CLASS:
            return _BY_CLASS[cls.__name__]
    return GENERIC


def kind_of(family: Family, name: str, module: torch.nn.Module) -> str:
    """Name the kind of attention at one site: self, cross, joint, dual, temporal, text or aux."""
    for pattern, kind in family.kinds:
        if re.search(pattern, name):
            return kind
    if getattr(module, "is_cross_attention", False):
        return "cross"
    return "joint" if getattr(module, "added_kv_proj_dim", None) is not None else "self"
