"""Transformers for videos."""

from __future__ import annotations

from typing import Any

import torch

from attnctl.core.hosts.families import grids
from attnctl.core.hosts.families.images import CROSS
from attnctl.core.hosts.families.row import Bound, Family, Layout
from attnctl.core.hosts.published import Default

__all__ = ["VIDEOS"]

_STG = "STG, arXiv 2411.18664"
_REFINED = (("refiner", "text"), ("attn", "joint"))


def _image_first(name: str, module: torch.nn.Module) -> tuple[str, ...]:
    """Wan's image-to-video cross-attention reads the image prompt first, and then the text."""
    return ("aux", "cross") if name.endswith("attn2") and getattr(module, "add_k_proj", None) is not None else ()


def _text_first(name: str, module: torch.nn.Module) -> tuple[str, ...]:
    """Wan-Animate 2 reads the text first."""
    return ("cross", "aux") if name.endswith("cross_attn") else ()


def _caching(model: torch.nn.Module, bound: Bound) -> Layout | None:
    """Wan-Animate 2 runs its reference through the denoiser first, to keep its keys."""
    return "extra" if bound.get("kv_cache_mode") == "extract" else None


def _decoder(model: torch.nn.Module, name: str) -> str | None:
    """Motif-Video's last blocks attend to the image and to what its encoder has made of it, and to no text."""
    config: Any = model.config
    parts = name.split(".")
    decodes = parts[0] == "single_transformer_blocks" and parts[2] == "attn"
    return "self" if decodes and int(parts[1]) >= config.num_single_layers - config.num_decoder_layers else None


VIDEOS: tuple[Family, ...] = (
    Family(
        name="CogVideoX",
        classes=("CogVideoXTransformer3DModel",),
        kinds=(("attn1", "joint"),),
        text="first",
        grid=grids.frames_first,
        frames_first=True,
        all_frames=True,
        published={"Guidance": Default(depth=(11, 42), source=f"{_STG}: CogVideoX block 11; of 42 in CogVideoX-5B")},
    ),
    Family(
        name="ConsisID",
        classes=("ConsisIDTransformer3DModel",),
        kinds=(("transformer_blocks.*attn1", "joint"), ("", "aux")),
        text="first",
        grid=grids.frames_first,
        frames_first=True,
        all_frames=True,
    ),
    Family(
        name="EasyAnimate",
        classes=("EasyAnimateTransformer3DModel",),
        kinds=(("attn1", "joint"), ("attn2", "dual")),
        text="first",
        grid=grids.video,
        all_frames=True,
    ),
    Family(
        name="Wan",
        classes=("WanTransformer3DModel",),
        kinds=CROSS,
        grid=grids.video,
        calls=_image_first,
        all_frames=True,
        published={
            "Guidance": Default(
                depth=(2, 30), source=f"{_STG}: Wan 2.1 block 2, at scale 2; of 30 by our reading, as in the 1.3B model"
            )
        },
    ),
    Family(
        name="Wan VACE",
        classes=("WanVACETransformer3DModel",),
        kinds=CROSS,
        grid=grids.video,
        calls=_image_first,
        first="vace_blocks",
        all_frames=True,
    ),
    Family(
        name="Wan Animate",
        classes=("WanAnimateTransformer3DModel",),
        kinds=(("face_adapter", "aux"), *CROSS),
        grid=grids.video,
        tokens=grids.image_led,
        calls=_image_first,
        all_frames=True,
    ),
    Family(
        name="Wan-Animate 2",
        classes=("WanAnimate2Transformer3DModel",),
        kinds=(("self_attn", "self"), ("cross_attn", "cross")),
        grid=grids.offset_grid,
        layout=_caching,
        calls=_text_first,
        all_frames=True,
    ),
    Family(
        name="SkyReels V2",
        classes=("SkyReelsV2Transformer3DModel",),
        kinds=CROSS,
        grid=grids.video,
        calls=_image_first,
        all_frames=True,
    ),
    Family(
        name="ChronoEdit",
        classes=("ChronoEditTransformer3DModel",),
        kinds=CROSS,
        grid=grids.video,
        calls=_image_first,
        all_frames=True,
    ),
    Family(
        name="AnyFlow",
        classes=("AnyFlowTransformer3DModel",),
        kinds=CROSS,
        grid=grids.frames_first,
        frames_first=True,
        all_frames=True,
    ),
    Family(
        name="AnyFlow-FAR",
        classes=("AnyFlowFARTransformer3DModel",),
        kinds=CROSS,
        refusal="its self-attention is computed by flex_attention alone, where it cannot be intercepted: use "
        "AnyFlowTransformer3DModel, whose attention goes through scaled_dot_product_attention",
    ),
    Family(
        name="Helios",
        classes=("HeliosTransformer3DModel",),
        kinds=CROSS,
        grid=grids.video,
        tokens=grids.history(
            {
                "latents_history_short": (1, 2, 2),
                "latents_history_mid": (2, 4, 4),
                "latents_history_long": (4, 8, 8),
            }
        ),
        all_frames=True,
    ),
    Family(
        name="LTX-Video",
        classes=("LTXVideoTransformer3DModel",),
        kinds=CROSS,
        grid=grids.counted,
        tokens=grids.counted_last,
        all_frames=True,
        published={"Guidance": Default(depth=(19, 28), source=f"{_STG}: LTX-Video block 19 of 28")},
    ),
    Family(
        name="LTX-2",
        classes=("LTX2VideoTransformer3DModel",),
        kinds=(
            ("audio_attn1", "audio"),
            ("audio_attn2|audio_to_video|video_to_audio", "aux"),
            ("attn2", "cross"),
            ("attn1", "self"),
        ),
        grid=grids.counted,
        tokens=grids.counted_first,
        all_frames=True,
        published={"Guidance": Default(depth=(29, 48), source="diffusers LTX2Pipeline: STG at block 29 of 48")},
        note="LTX-2.3 is guided at block 28 by diffusers LTX2Pipeline: pass sites=; sound is left as it is",
    ),
    Family(
        name="SANA-WM refiner",
        classes=("SanaWMLTX2RefinerTransformer3DModel",),
        kinds=(("audio|video_to", ""), ("attn2", "cross"), ("attn1", "self")),
        all_frames=True,
    ),
    Family(
        name="HunyuanVideo",
        classes=("HunyuanVideoTransformer3DModel",),
        kinds=_REFINED,
        text="last",
        grid=grids.video,
        all_frames=True,
        published={"Guidance": Default(depth=(2, 60), source=f"{_STG}: HunyuanVideo block 2 of 60")},
    ),
    Family(
        name="HunyuanVideo 1.5",
        classes=("HunyuanVideo15Transformer3DModel",),
        kinds=_REFINED,
        text="last",
        grid=grids.video,
        tokens=grids.led_by_image,
        all_frames=True,
        note="its text stands in another order in each row: valid tokens first",
    ),
    Family(
        name="FramePack",
        classes=("HunyuanVideoFramepackTransformer3DModel",),
        kinds=_REFINED,
        text="last",
        grid=grids.video,
        tokens=grids.history(
            {
                "latents_clean": (1, 2, 2),
                "latents_history_2x": (2, 4, 4),
                "latents_history_4x": (4, 8, 8),
            }
        ),
        all_frames=True,
    ),
    Family(
        name="Motif-Video",
        classes=("MotifVideoTransformer3DModel",),
        kinds=(("cross_attn", "cross"), ("attn", "joint")),
        kind_at=_decoder,
        text="last",
        grid=grids.video,
        all_frames=True,
    ),
    Family(
        name="Mochi",
        classes=("MochiTransformer3DModel",),
        kinds=(("attn1", "joint"),),
        text="last",
        grid=grids.video,
        all_frames=True,
        published={"Guidance": Default(depth=(34, 48), source=f"{_STG}: Mochi block 34 of 48")},
    ),
    Family(
        name="Kandinsky 5",
        classes=("Kandinsky5Transformer3DModel",),
        kinds=(("text_transformer", "text"), ("self_attention", "self"), ("cross_attention", "cross")),
        grid=grids.channels_last,
        all_frames=True,
        note="attention of long videos that flex_attention computes (NABLA) is refused",
    ),
    Family(
        name="Kandinsky 6",
        classes=("Kandinsky6Transformer3DModel",),
        kinds=(
            ("text_transformer", "text"),
            (r"audio_dec_block\.self", "audio"),
            ("audio_dec_block|va_cross|av_cross", "aux"),
            ("self_attention", "self"),
            ("cross_attention", "cross"),
        ),
        grid=grids.channels_last,
        all_frames=True,
        note="attention of long videos that flex_attention computes (NABLA) is refused; sound is left as it is",
    ),
    Family(
        name="Kandinsky 6 SR",
        classes=("Kandinsky6SRTransformer3DModel",),
        kinds=(("self_attention", "self"),),
        refusal="its attention is computed by flex_attention alone (NABLA), where it cannot be intercepted: control "
        "Kandinsky6Transformer3DModel, whose result it enlarges",
    ),
    Family(
        name="Latte",
        classes=("LatteTransformer3DModel",),
        kinds=(("temporal_transformer_blocks", "temporal"), *CROSS),
        grid=grids.latte,
    ),
    Family(name="Allegro", classes=("AllegroTransformer3DModel",), kinds=CROSS, grid=grids.video, all_frames=True),
    Family(
        name="Cosmos",
        classes=("CosmosTransformer3DModel",),
        kinds=CROSS,
        grid=grids.video,
        all_frames=True,
        from_prompt=True,
    ),
    Family(
        name="Cosmos 3",
        classes=("Cosmos3OmniTransformer",),
        kinds=(("self_attn", "joint"),),
        text="first",
        grid=grids.vision_shapes,
        all_frames=True,
        note="a block computes the text by itself, which controls leave alone, and then the video over all",
    ),
    Family(
        name="MiniMax-H3",
        classes=("MiniMaxH3Transformer3DModel",),
        kinds=(("token_refiner", "text"), ("attn", "joint")),
        text="first",
        grid=grids.indexed,
        tokens=grids.indexed_tokens,
        all_frames=True,
        shared=frozenset(
            {
                "timestep",
                "timestep_indices",
                "token_tags",
                "position_ids",
                "video_indices",
                "audio_indices",
                "text_indices",
            }
        ),
    ),
    Family(
        name="Sana-Video",
        classes=("SanaVideoTransformer3DModel",),
        kinds=(("attn2", "cross"), ("attn1", "")),
        grid=grids.video,
        all_frames=True,
        note="attn1 is linear attention of its own, which no control reaches",
    ),
    Family(
        name="SANA-WM",
        classes=("SanaWMTransformer3DModel",),
        kinds=(("cross_attn", "cross"), ("attn", "self")),
        grid=grids.video,
        all_frames=True,
        note="most blocks attend by a linear form, which no control reaches",
    ),
)
