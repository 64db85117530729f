"""Transformers for images."""

from __future__ import annotations

import math
from typing import Any

import torch

from attnctl.core.hosts.families import grids, listed
from attnctl.core.hosts.families.row import Bound, Family, Layout, Tokens
from attnctl.core.hosts.published import Default

__all__ = ["CROSS", "IMAGES"]

_JOINT = (("attn", "joint"),)
CROSS = (("attn2", "cross"), ("attn1", "self"))


def _caching(model: torch.nn.Module, bound: Bound) -> Layout | None:
    """GLM-Image runs its reference images through the denoiser first, to keep their keys."""
    layers: Any = getattr(bound.get("kv_caches"), "caches", None)
    return "extra" if layers and layers[0].mode == "write" else None


def _kept(model: torch.nn.Module, bound: Bound) -> Tokens:
    """Count GLM-Image's tokens: keys of its references stand in front of a call that reads them."""
    layers: Any = getattr(bound.get("kv_caches"), "caches", None)
    reads = bool(layers) and layers[0].mode == "read" and bool(layers[0].k_caches)
    return Tokens(math.prod(grids.image(model, bound)), led=layers[0].k_caches[0].shape[1] if reads else 0)


def _classes(model: torch.nn.Module, bound: Bound) -> Layout:
    """Read DiT's rows off their classes: the second half of a guided batch has the class that stands for none."""
    config: Any = model.config
    labels, none = bound.get("class_labels"), config.num_embeds_ada_norm
    guided = labels is not None and len(labels) % 2 == 0 and bool((labels.chunk(2)[1] == none).all())
    return "cond_first" if guided else "cond"


def _pictures(bound: Bound, rows: slice) -> dict[str, Any]:
    """OmniGen counts the places of its pictures by rows, and lists the pictures of all rows in that order."""
    sizes, latents = bound["input_image_sizes"], iter(bound["input_img_latents"])
    of_rows = {row: [(place, next(latents)) for place in places] for row, places in sizes.items()}
    selection = {row: pairs for row, pairs in of_rows.items() if rows.start <= row < rows.stop}
    return {
        "input_image_sizes": {row - rows.start: [place for place, _ in pairs] for row, pairs in selection.items()},
        "input_img_latents": [picture for pairs in selection.values() for _, picture in pairs],
    }


IMAGES: tuple[Family, ...] = (
    Family(
        name="Stable Diffusion 3, 3.5",
        classes=("SD3Transformer2DModel",),
        kinds=(("attn2", "dual"), ("attn", "joint")),
        text="last",
        grid=grids.image,
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
        kinds=_JOINT,
        text="first",
        grid=grids.ids,
        tokens=grids.ids_tokens,
        published={
            "LatentGuidance": Default(
                sites="transformer_blocks.*", source="FOCUS, arXiv 2510.02315: all double-stream blocks"
            )
        },
    ),
    Family(
        name="FLUX.2",
        classes=("Flux2Transformer2DModel",),
        kinds=_JOINT,
        text="first",
        grid=grids.ids,
        tokens=grids.ids_tokens,
    ),
    Family(
        name="FLUX.3",
        classes=("Flux3Transformer2DModel",),
        kinds=(
            ("txt_mode_blocks", "text"),
            ("mode_blocks.*_cond", "aux"),
            (r"mode_blocks\.audio", "audio"),
            ("mode_blocks", "self"),
            ("single", "joint"),
        ),
        text="first",
        grid=grids.ids,
        tokens=grids.ids_tokens,
    ),
    Family(
        name="Chroma",
        classes=("ChromaTransformer2DModel",),
        kinds=_JOINT,
        text="first",
        grid=grids.ids,
        tokens=grids.ids_tokens,
    ),
    Family(
        name="Bria",
        classes=("BriaTransformer2DModel", "BriaFiboTransformer2DModel"),
        kinds=_JOINT,
        text="first",
        grid=grids.ids,
        tokens=grids.ids_tokens,
    ),
    Family(
        name="Ovis-Image",
        classes=("OvisImageTransformer2DModel",),
        kinds=_JOINT,
        text="first",
        grid=grids.ids,
        tokens=grids.ids_tokens,
    ),
    Family(
        name="LongCat-Image",
        classes=("LongCatImageTransformer2DModel",),
        kinds=_JOINT,
        text="first",
        grid=grids.ids,
        tokens=grids.ids_tokens,
    ),
    Family(
        name="PixArt",
        classes=("PixArtTransformer2DModel",),
        kinds=CROSS,
        grid=grids.image,
        published={"Guidance": Default(depth=(14, 28), source="PAG for PixArt-Sigma (diffusers#8921): block 14 of 28")},
    ),
    Family(
        name="Sana",
        classes=("SanaTransformer2DModel",),
        kinds=CROSS,
        grid=grids.image,
        published={"Guidance": Default(depth=(8, 20), source="diffusers SanaPAGPipeline example: block 8 of 20")},
        note="attn1 is linear attention: targets identity and uniform only",
    ),
    Family(
        name="HunyuanDiT",
        classes=("HunyuanDiT2DModel",),
        kinds=CROSS,
        grid=grids.image,
        published={"Guidance": Default(depth=(14, 40), source="PAG for HunyuanDiT (diffusers#8936): block 14 of 40")},
    ),
    Family(
        name="Lumina-Next",
        classes=("LuminaNextDiT2DModel",),
        kinds=CROSS,
        grid=grids.image,
        cond_first=True,
        shared=frozenset({"image_rotary_emb"}),
        note="its pipeline guides three channels of the prediction",
    ),
    Family(
        name="DiT", classes=("DiTTransformer2DModel",), kinds=(("attn1", "self"),), grid=grids.image, layout=_classes
    ),
    Family(
        name="AMUSED",
        classes=("UVit2DModel",),
        kinds=(("attention_blocks", "cross"), ("attn2", "cross"), ("attn1", "self")),
        grid=grids.masked,
    ),
    Family(
        name="AuraFlow",
        classes=("AuraFlowTransformer2DModel",),
        kinds=_JOINT,
        text="first",
        grid=grids.image,
    ),
    Family(
        name="Lumina 2",
        classes=("Lumina2Transformer2DModel",),
        kinds=(("context_refiner", "text"), ("noise_refiner", "self"), ("attn", "joint")),
        text="first",
        grid=grids.image,
        tokens=grids.even_text,
        first="context_refiner",
    ),
    Family(
        name="CogView 3+",
        classes=("CogView3PlusTransformer2DModel",),
        kinds=(("attn1", "joint"),),
        text="first",
        grid=grids.image,
    ),
    Family(
        name="CogView 4",
        classes=("CogView4Transformer2DModel",),
        kinds=(("attn1", "joint"),),
        text="first",
        grid=grids.image,
    ),
    Family(
        name="GLM-Image",
        classes=("GlmImageTransformer2DModel",),
        kinds=(("attn1", "joint"),),
        text="first",
        grid=grids.image,
        tokens=_kept,
        layout=_caching,
        note="negative prompts (NAG), regions and sharing are refused beside reference images",
    ),
    Family(
        name="Qwen-Image",
        classes=("QwenImageTransformer2DModel",),
        kinds=_JOINT,
        text="first",
        grid=grids.shapes("img_shapes"),
        tokens=grids.shapes_tokens("img_shapes"),
    ),
    Family(
        name="Qwen-Image 2.1",
        classes=("QwenImage21Transformer2DModel",),
        kinds=_JOINT,
        text="first",
        grid=grids.last_shape,
        note="a block computes the text by itself, which controls leave alone, and then the image over all",
    ),
    Family(
        name="Nucleus-Image",
        classes=("NucleusMoEImageTransformer2DModel",),
        kinds=_JOINT,
        text="last",
        grid=grids.shapes("img_shapes"),
        tokens=grids.shapes_tokens("img_shapes"),
    ),
    Family(
        name="Z-Image",
        classes=("ZImageTransformer2DModel",),
        kinds=(
            ("context_refiner", "text"),
            ("siglip_refiner", "aux"),
            ("noise_refiner", "self"),
            ("attention", "joint"),
        ),
        text="last",
        grid=listed.grid,
        tokens=listed.tokens,
        cond_first=True,
        from_prompt=True,
    ),
    Family(
        name="HiDream",
        classes=("HiDreamImageTransformer2DModel",),
        kinds=(("attn1", "joint"),),
        text="last",
        grid=grids.image,
        tokens=grids.squared,
        row_axis={"encoder_hidden_states_llama3": 1},
    ),
    Family(
        name="HunyuanImage",
        classes=("HunyuanImageTransformer2DModel",),
        kinds=(("refiner", "text"), ("attn", "joint")),
        text="last",
        grid=grids.image,
        note="its text stands in another order in each row: valid tokens first",
    ),
    Family(
        name="ERNIE-Image",
        classes=("ErnieImageTransformer2DModel",),
        kinds=(("self_attention", "joint"),),
        text="last",
        grid=grids.image,
    ),
    Family(
        name="Krea 2",
        classes=("Krea2Transformer2DModel",),
        kinds=(("text_fusion", "text"), ("attn", "joint")),
        text="first",
        grid=grids.last_ids,
        tokens=grids.last_tokens,
        from_prompt=True,
        shared=frozenset({"position_ids"}),
    ),
    Family(
        name="Ideogram 4",
        classes=("Ideogram4Transformer2DModel",),
        kinds=(("attention", "joint"),),
        text="first",
        grid=grids.marked,
        note="guidance acts on the prompt's transformer; the other sees no text",
    ),
    Family(
        name="OmniGen",
        classes=("OmniGenTransformer2DModel",),
        kinds=(("self_attn", "joint"),),
        text="first",
        grid=grids.image,
        tokens=grids.timed,
        cond_first=True,
        cut=_pictures,
    ),
    Family(
        name="PRX",
        classes=("PRXTransformer2DModel",),
        kinds=(("attention", "joint"),),
        text="first",
        grid=grids.image,
    ),
    Family(
        name="FIBO 2",
        classes=("BriaFibo2Transformer2DModel",),
        kinds=(
            ("noise_refiner", "self"),
            ("perceiver", "text"),
            ("cross_attention", "cross"),
            ("attention", "joint"),
        ),
        text="first",
        grid=grids.image,
        first="noise_refiner|perceiver",
        note="the text of its joint attention is a summary of the prompt, not its words",
    ),
    Family(
        name="JoyImage-Edit",
        classes=("JoyImageEditTransformer3DModel",),
        kinds=_JOINT,
        text="last",
        grid=grids.video,
        tokens=grids.items_tokens,
    ),
    Family(
        name="JoyImage-Edit Plus",
        classes=("JoyImageEditPlusTransformer3DModel",),
        kinds=_JOINT,
        text="last",
        grid=grids.shapes("shape_list"),
        tokens=grids.shapes_tokens("shape_list"),
    ),
    Family(
        name="unCLIP prior",
        classes=("PriorTransformer",),
        kinds=(("attn1", "joint"),),
        text="first",
        refusal="it predicts one image embedding and no image: control the pipeline that decodes it",
    ),
)
