"""UNets, for images and videos."""

from __future__ import annotations

from attnctl.core.hosts.families import grids
from attnctl.core.hosts.families.row import Family
from attnctl.core.hosts.published import Default

__all__ = ["TEMPORAL", "UNETS"]

_SD = Default(sites="mid", source="PAG, arXiv 2403.17377: the mid block")
_WORDS = Default(reduction=4, source="Attend-and-Excite, arXiv 2301.13826: 16 x 16 maps of 64 x 64 latents")
_UNET = (("fuser", "aux"), ("attn2", "cross"), ("attn1", "self"))  # GLIGEN's fuser attends to places and phrases
TEMPORAL = r"motion_modules|temporal_transformer_blocks|temp_attentions|transformer_in"
_VIDEO_UNET = ((rf"(?:{TEMPORAL}).*attn", "temporal"), *_UNET)

UNETS: tuple[Family, ...] = (
    Family(
        name="Stable Diffusion 1, 2, XL",
        classes=("UNet2DConditionModel",),
        kinds=_UNET,
        grid=grids.sample,
        unet=True,
        published={"Guidance": _SD, "LatentGuidance": _WORDS},
    ),
    Family(
        name="AnimateDiff",
        classes=("UNetMotionModel",),
        kinds=_VIDEO_UNET,
        grid=grids.sample,
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
        grid=grids.sample_frames_first,
        unet=True,
    ),
    Family(name="UNet3D", classes=("UNet3DConditionModel",), kinds=_VIDEO_UNET, grid=grids.sample, unet=True),
    Family(
        name="I2VGenXL",
        classes=("I2VGenXLUNet",),
        kinds=(("image_latents_temporal_encoder", "temporal"), *_VIDEO_UNET),
        grid=grids.sample,
        first="image_latents_temporal_encoder",
        unet=True,
    ),
    Family(
        name="Unconditional UNet",
        classes=("UNet2DModel",),
        kinds=(("attentions", "self"),),
        grid=grids.sample,
        unet=True,
        layout=lambda model, bound: "cond",
    ),
    Family(
        name="Kandinsky 3",
        classes=("Kandinsky3UNet",),
        kinds=(("add_time_condition", "aux"), (r"attentions\.0\.", "self"), ("attention", "cross")),
        grid=grids.sample,
        unet=True,
        from_prompt=True,
    ),
    Family(
        name="DreamLite",
        classes=("DreamLiteUNetModel",),
        kinds=(("attn2", "cross"), ("attn1", "self")),
        grid=grids.sample,
        unet=True,
        note="in edits the grid spans the picture beside its source",
    ),
    Family(
        name="Stable Cascade",
        classes=("StableCascadeUNet",),
        kinds=(("attention", "joint"),),
        text="last",
        grid=grids.patched_sample,
        tokens=grids.pooled_text,
        unet=True,
        cond_first=True,
    ),
)
