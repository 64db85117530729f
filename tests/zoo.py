"""Build a tiny random-weight denoiser of every family, with inputs for one call.

Every model has several heads, at least four attention sites, a token grid that is not square, and 7 text
tokens, a number that no other axis has. Every batched input has different rows, so that a row that is
dropped, repeated or swapped changes the output. Weights are drawn here and not by the host: several hosts
start at zero (gates, last layers) or leave memory unset, and then attention does not matter.

Example:
    model, inputs = zoo.build("sd15")
    out = zoo.call(model, inputs)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_3d_rotary_pos_embed
from torch import Tensor, nn
from zoo_hosts import HOSTS
from zoo_parts import TEXT, Draw, Inputs, Tiny, grid_ids

FRAMES = 3

# Tensors that are not batched: never slice these by row.
SHARED_INPUTS = frozenset({"txt_ids", "img_ids", "image_rotary_emb", "padding_mask"})

# Guidance in the host pipelines: one batch [uncond, cond] unless the family stands here.
COND_FIRST = frozenset({"zimage"})  # one batch [cond, uncond]
SEQUENTIAL = frozenset({"wan", "wan_i2v", "qwen", "lumina2", "cogview4", "cosmos"})  # a call for each
DISTILLED = frozenset({"flux", "flux2", "hunyuanvideo"})  # one call; true guidance adds a second one

_PROJECTIONS = frozenset(
    {"to_q", "to_k", "add_q_proj", "add_k_proj", "to_out", "to_add_out"}
    | {"to_query", "to_key", "out_layer"}  # Kandinsky 5 and 6
    | {"img_attn_qkv", "txt_attn_qkv", "img_attn_proj", "txt_attn_proj", "img_qkv_proj", "txt_kv_proj"}  # JoyImage, PRX
    | {"to_qkv", "to_kv", "q_linear", "kv_linear", "to_q_t", "to_k_t", "to_out_t"}  # Stable Audio 3, Sana WM, HiDream
)
_ATTENTION_NORMS = frozenset(
    {"norm_q", "norm_k", "norm_added_q", "norm_added_k", "query_norm", "key_norm", "q_norm", "k_norm"}
)

Family = Callable[..., tuple[nn.Module, Inputs]]

_FAMILIES: dict[str, Family] = {}


def family(host: str) -> Callable[[Family], Family]:
    """Register a family under its function's name if the installed diffusers has the host class."""

    def register(function: Family) -> Family:
        if host in dir(diffusers):
            _FAMILIES[function.__name__] = function
        return function

    return register


# UNets, image


@family("UNet2DConditionModel")
def sd15(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an SD1.5-like UNet: cross attention at three resolutions, convolutional projections."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,  # diffusers reads this as the number of heads
        "norm_num_groups": 8,
    }
    model = diffusers.UNet2DConditionModel(**settings | config)
    inputs = {
        "sample": draw.rows(model.config.in_channels, 16, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw.rows(TEXT, 32),
    }
    return model, inputs


@family("UNet2DConditionModel")
def sd2(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an SD2-like UNet: linear projections and a number of heads that differs between levels."""
    return sd15(draw, **{"attention_head_dim": (2, 4, 8), "use_linear_projection": True} | config)


@family("UNet2DConditionModel")
def sdxl(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an SDXL-like UNet: no attention at the top, two transformer layers at the bottom."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,  # 32 pooled text + 6 sizes of 8
        "norm_num_groups": 8,
    }
    model = diffusers.UNet2DConditionModel(**settings | config)
    inputs = {
        "sample": draw.rows(model.config.in_channels, 16, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw.rows(TEXT, 64),
        "added_cond_kwargs": {"text_embeds": draw.rows(32), "time_ids": 16 * draw.rows(6).abs()},
    }
    return model, inputs


# Transformers, image


@family("SD3Transformer2DModel")
def sd3(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an SD3-like transformer: joint attention, image tokens first."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
    }
    model = diffusers.SD3Transformer2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, 16, 12),
        "timestep": draw.times(500, 20),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "pooled_projections": draw.rows(64),
    }
    return model, inputs


@family("SD3Transformer2DModel")
def sd35(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an SD3.5-like transformer: query-key norms, a second attention in the first blocks."""
    return sd3(draw, **{"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)} | config)


@family("FluxTransformer2DModel")
def flux(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a FLUX-like transformer: double and single blocks, text tokens first, embedded guidance."""
    settings: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    model = diffusers.FluxTransformer2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(8 * 6, model.config.in_channels),
        "timestep": draw.times(0.5, 0.1),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "pooled_projections": draw.rows(32),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": grid_ids(8, 6),
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = draw.times(3.5, 1)
    return model, inputs


@family("Flux2Transformer2DModel")
def flux2(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a FLUX.2-like transformer: single blocks with one matrix for attention and MLP."""
    settings: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    model = diffusers.Flux2Transformer2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(8 * 6, model.config.in_channels),
        "timestep": draw.times(0.5, 0.1),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "txt_ids": torch.cat([torch.zeros(TEXT, 3), torch.arange(TEXT)[:, None]], dim=1),
        "img_ids": torch.cat([grid_ids(8, 6), torch.zeros(8 * 6, 1)], dim=1),
        "guidance": draw.times(3.5, 1),
    }
    return model, inputs


@family("PixArtTransformer2DModel")
def pixart(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a PixArt-like transformer: self attention, then cross attention under a text mask."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,  # noise and variance
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "caption_channels": 32,
        "use_additional_conditions": False,
    }
    model = diffusers.PixArtTransformer2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, 16, 12),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "encoder_attention_mask": draw.mask().float(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


@family("SanaTransformer2DModel")
def sana(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a Sana-like transformer: linear self attention without softmax, then cross attention."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 24,
    }
    model = diffusers.SanaTransformer2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, 8, 6),
        "timestep": draw.times(500, 20),
        "encoder_hidden_states": draw.rows(TEXT, 24),
        "encoder_attention_mask": draw.mask().float(),
    }
    return model, inputs


@family("HunyuanDiT2DModel")
def hunyuandit(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a HunyuanDiT-like transformer: cross attention to two texts, skip connections."""
    # As many text as image tokens: equal lengths do not make an attention self attention.
    text_t5 = 8 * 6 - TEXT
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "hidden_size": 24,
        "cross_attention_dim": 32,
        "cross_attention_dim_t5": 32,
        "pooled_projection_dim": 16,
        "activation_fn": "gelu-approximate",
        "text_len": TEXT,
        "text_len_t5": text_t5,
    }
    model = diffusers.HunyuanDiT2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, 16, 12),
        "timestep": draw.times(500, 20),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "text_embedding_mask": draw.mask().float(),
        "encoder_hidden_states_t5": draw.rows(text_t5, 32),
        "text_embedding_mask_t5": draw.mask(text_t5).float(),
        "image_meta_size": 16 * draw.rows(6).abs(),
        "style": torch.zeros(draw.batch, dtype=torch.long),  # batched, but the model knows one style only
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), (8, 6)), (8, 6), output_type="pt"),
    }
    return model, inputs


@family("AuraFlowTransformer2DModel")
def auraflow(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an AuraFlow-like transformer: joint and single blocks, 8 register tokens before the text."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pos_embed_max_size": 64,
    }
    model = diffusers.AuraFlowTransformer2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, 16, 12),
        "timestep": draw.times(0.5, 0.1),
        "encoder_hidden_states": draw.rows(TEXT, 32),
    }
    return model, inputs


@family("Lumina2Transformer2DModel")
def lumina2(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a Lumina2-like transformer: refiners for text and image, then packed layers with grouped keys."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 2,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (32, 32, 32),
        "cap_feat_dim": 8,
    }
    model = diffusers.Lumina2Transformer2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, 16, 12),
        "timestep": draw.times(0.5, 0.1),
        "encoder_hidden_states": draw.rows(TEXT, 8),
        "encoder_attention_mask": draw.mask(),
    }
    return model, inputs


@family("CogView4Transformer2DModel")
def cogview4(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a CogView4-like transformer: joint attention, text tokens first, size conditions."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
        "condition_dim": 4,
        "rope_axes_dim": (16, 16),
    }
    model = diffusers.CogView4Transformer2DModel(**settings | config)
    sizes = draw.times(64, 16)[:, None].repeat(1, 2)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, 16, 12),
        "timestep": draw.times(500, 20),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "original_size": sizes,
        "target_size": sizes + 8,
        "crop_coords": sizes - 64,
    }
    return model, inputs


@family("QwenImageTransformer2DModel")
def qwen(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a QwenImage-like transformer: joint attention under a text mask, text tokens first."""
    settings: dict[str, Any] = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    model = diffusers.QwenImageTransformer2DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(8 * 6, model.config.in_channels),
        "timestep": draw.times(0.5, 0.1),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "encoder_hidden_states_mask": draw.mask(),
        "img_shapes": [[(1, 8, 6)]] * draw.batch,
    }
    return model, inputs


@family("ZImageTransformer2DModel")
def zimage(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a Z-Image-like transformer: lists of samples, tokens padded to multiples of 32."""
    settings: dict[str, Any] = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 4,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [128, 32, 32],
    }
    model = diffusers.ZImageTransformer2DModel(**settings | config)
    inputs = {
        "x": [draw.normal(model.config.in_channels, 1, 16, 12) for _ in range(draw.batch)],
        "t": draw.times(0.5, 0.1),
        "cap_feats": [draw.normal(TEXT, 16) for _ in range(draw.batch)],
    }
    return model, inputs


# Video


@family("UNetMotionModel")
def animatediff(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an AnimateDiff-like UNet: SD1.5 with temporal modules; text has one row per frame."""
    unet, _ = sd15(draw, **config)
    adapter = diffusers.MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
    )
    model = diffusers.UNetMotionModel.from_unet2d(unet, adapter)
    inputs = {
        "sample": draw.rows(unet.config.in_channels, FRAMES, 16, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw.rows(TEXT, 32).repeat_interleave(FRAMES, dim=0),
    }
    return model, inputs


@family("UNetSpatioTemporalConditionModel")
def svd(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an SVD-like UNet: frames before channels, one image token as condition."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 8,
        "out_channels": 4,
        "block_out_channels": (32, 64),  # the host fixes 32 groups
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "cross_attention_dim": 32,
        "num_attention_heads": 4,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 48,  # 3 ids of 16
    }
    model = diffusers.UNetSpatioTemporalConditionModel(**settings | config)
    inputs = {
        "sample": draw.rows(FRAMES, model.config.in_channels, 16, 12),
        "timestep": torch.tensor(10.0),
        "encoder_hidden_states": draw.rows(1, 32),
        "added_time_ids": draw.rows(3).abs(),
    }
    return model, inputs


@family("UNet3DConditionModel")
def unet3d(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a ModelScope-like UNet: temporal transformers beside the spatial ones and at the input."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    model = diffusers.UNet3DConditionModel(**settings | config)
    inputs = {
        "sample": draw.rows(model.config.in_channels, FRAMES, 16, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw.rows(TEXT, 8),
    }
    return model, inputs


@family("CogVideoXTransformer3DModel")
def cogvideox(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a CogVideoX-2B-like transformer: joint attention, text tokens first, frames before channels."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": 4,
        "sample_width": 8,
        "sample_height": 12,
        "sample_frames": 4 * (FRAMES - 1) + 1,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT,
    }
    model = diffusers.CogVideoXTransformer3DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(FRAMES, model.config.in_channels, 12, 8),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 32),
    }
    if model.config.use_rotary_positional_embeddings:
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(16, ((0, 0), (6, 4)), (6, 4), FRAMES)
    return model, inputs


@family("CogVideoXTransformer3DModel")
def cogvideox_rope(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a CogVideoX-5B-like transformer: the same with rotary positions."""
    return cogvideox(draw, **{"use_rotary_positional_embeddings": True} | config)


@family("WanTransformer3DModel")
def wan(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a Wan-like transformer, text to video: self attention over all frames, cross attention."""
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 4,
        "rope_max_seq_len": 32,
    }
    model = diffusers.WanTransformer3DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, FRAMES, 12, 8),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 16),
    }
    return model, inputs


@family("WanTransformer3DModel")
def wan_i2v(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a Wan-like transformer, image to video: cross attention to the image, then to the text."""
    model, inputs = wan(draw, **{"image_dim": 8, "added_kv_proj_dim": 24} | config)
    inputs["encoder_hidden_states"] = draw.rows(512, 16)  # the host tells the image tokens apart by this length
    inputs["encoder_hidden_states_image"] = draw.rows(5, 8)
    return model, inputs


@family("LTXVideoTransformer3DModel")
def ltx(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an LTX-like transformer: packed video tokens, cross attention under a text mask."""
    settings: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "num_layers": 4,
        "caption_channels": 16,
    }
    model = diffusers.LTXVideoTransformer3DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(FRAMES * 6 * 4, model.config.in_channels),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "encoder_attention_mask": draw.mask(),
        "num_frames": FRAMES,
        "height": 6,
        "width": 4,
        "rope_interpolation_scale": (1.0, 1.0, 1.0),
    }
    return model, inputs


@family("HunyuanVideoTransformer3DModel")
def hunyuanvideo(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a HunyuanVideo-like transformer: image tokens first in double and single blocks, refined text."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 3,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }
    model = diffusers.HunyuanVideoTransformer3DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, FRAMES, 6, 4),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "encoder_attention_mask": draw.mask().float(),
        "pooled_projections": draw.rows(8),
        "guidance": draw.times(6000, 500),
    }
    return model, inputs


@family("MochiTransformer3DModel")
def mochi(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a Mochi-like transformer: one attention call per sample over its valid text tokens only."""
    settings: dict[str, Any] = {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "max_sequence_length": 16,
    }
    model = diffusers.MochiTransformer3DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, FRAMES, 12, 8),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "encoder_attention_mask": draw.mask(),
    }
    return model, inputs


@family("LatteTransformer3DModel")
def latte(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a Latte-like transformer: spatial and temporal blocks that alternate in execution only."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "caption_channels": 32,
        "num_embeds_ada_norm": 1000,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_bias": True,
        "video_length": FRAMES,
    }
    model = diffusers.LatteTransformer3DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, FRAMES, 12, 8),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "enable_temporal_attentions": True,
    }
    return model, inputs


@family("CosmosTransformer3DModel")
def cosmos(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build a Cosmos-like transformer: rotary self attention, cross attention under a text mask."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 4,
        "mlp_ratio": 2,
        "text_embed_dim": 32,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,  # the learnable kind cannot run in float64
    }
    model = diffusers.CosmosTransformer3DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, FRAMES, 12, 8),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "attention_mask": draw.mask(),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 12, 8),  # one row for all samples: the host repeats it
    }
    return model, inputs


@family("AllegroTransformer3DModel")
def allegro(draw: Draw, **config: Any) -> tuple[nn.Module, Inputs]:
    """Build an Allegro-like transformer: rotary self attention, cross attention under a text mask."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "cross_attention_dim": 24,
        "sample_width": 8,
        "sample_height": 12,
        "sample_frames": FRAMES,
        "caption_channels": 24,
    }
    model = diffusers.AllegroTransformer3DModel(**settings | config)
    inputs = {
        "hidden_states": draw.rows(model.config.in_channels, FRAMES, 12, 8),
        "timestep": draw.times(500, 20).long(),
        "encoder_hidden_states": draw.rows(TEXT, 24),
        "encoder_attention_mask": draw.mask(),
        "image_rotary_emb": _allegro_rope(12, FRAMES, 6, 4),
    }
    return model, inputs


NAMES: tuple[str, ...] = tuple(_FAMILIES)
"""Families that every test of the contract runs on, several configurations of one class among them."""
EVERY: tuple[str, ...] = (*NAMES, *HOSTS)
"""These, and one model of each other denoiser class of diffusers."""


def build(
    name: str, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> tuple[nn.Module, Inputs]:
    """Build one denoiser in evaluation mode, with the keyword arguments of one call.

    Args:
        name: One of EVERY.
        batch: Rows of every batched input; some hosts take one (`HOSTS[name].rows`).
        dtype: Type of weights and inputs; the values are drawn in float32 and are the same for every type.
        seed: Seeds weights and inputs; the global generator stays untouched.
        **config: Replaces constructor arguments of the host class.
    """
    draw = Draw(batch, seed, FRAMES)
    with torch.random.fork_rng(devices=[]):  # the host's own initialisation, replaced below, takes global numbers
        if name in HOSTS:
            drawn = HOSTS[name].draw(draw)
            model, inputs = getattr(diffusers, HOSTS[name].name)(**drawn.config | config), drawn.inputs
        else:
            model, inputs = _FAMILIES[name](draw, **config)
    randomize(model, draw.generator)
    return model.to(dtype).eval(), cast(inputs, dtype)


_TWO_LEVELS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_SHALLOW: dict[str, dict[str, Any]] = {
    "sd15": _TWO_LEVELS,
    "sd2": _TWO_LEVELS | {"attention_head_dim": (2, 4)},
    "sdxl": {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
    },
    "animatediff": _TWO_LEVELS,
    "flux": {"num_layers": 1, "num_single_layers": 2},
    "flux2": {"num_layers": 1, "num_single_layers": 2},
    "auraflow": {"num_mmdit_layers": 1, "num_single_dit_layers": 2},
    "hunyuanvideo": {"num_layers": 1, "num_single_layers": 2},
    "zimage": {"n_layers": 2},  # behind a refiner
    "lumina2": {"num_layers": 2},
}
_DEEP = frozenset({"hunyuandit", "svd", "unet3d"})  # fewer have no skip connection, or no level to change to


def shallow(name: str, layers: int = 3) -> dict[str, Any]:
    """Return constructor arguments with no more layers than a test needs that perturbs two sites and leaves one plain.

    Args:
        name: One of EVERY; those of HOSTS keep their layers.
        layers: Layers of a model with blocks of one kind; 2 where one perturbed site is enough.
    """
    return {} if name in HOSTS or name in _DEEP else _SHALLOW.get(name, {"num_layers": layers})


def tiny(name: str, batch: int = 2, seed: int = 0) -> Tiny:
    """Tell of what a model of HOSTS is made, and which token grid and text its call means."""
    return HOSTS[name].draw(Draw(batch, seed, FRAMES))


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """Call a denoiser and return its prediction as one tensor, whatever container the host returns."""
    return unpack(model(**inputs))


def unpack(output: Any) -> Tensor:
    """Take the prediction out of a tuple, an output dataclass or a list of samples."""
    if isinstance(output, Tensor):
        return output
    sample = output[0]  # tuples and diffusers' output classes alike
    return torch.stack(sample) if isinstance(sample, list) else sample


def take(inputs: Inputs, rows: list[int], batch: int = 2, shared: frozenset[str] = frozenset()) -> Inputs:
    """Select rows of a call's inputs; an input with several rows for each sample keeps them together.

    Args:
        inputs: Keyword arguments of one call.
        rows: Which rows.
        batch: Rows of the call.
        shared: Inputs that all rows share, besides SHARED_INPUTS (`HOSTS[name].shared`).
    """
    whole = SHARED_INPUTS | shared
    return {key: value if key in whole else _take(value, rows, batch) for key, value in inputs.items()}


def _take(value: Any, rows: list[int], batch: int) -> Any:
    if isinstance(value, dict):
        return take(value, rows, batch)
    if isinstance(value, list) and len(value) == batch:
        return [value[row] for row in rows]
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, Tensor) for x in value):
        return type(value)(_take(x, rows, batch) for x in value)
    if isinstance(value, Tensor) and value.ndim:
        return value.unflatten(0, (batch, -1))[rows].flatten(0, 1)
    return value


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Cast every floating-point tensor of nested inputs."""
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: cast(value, dtype) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(cast(value, dtype) for value in tree)
    return tree


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight anew: none is zero, attention maps are far from uniform and weigh in the output.

    Matrices keep the variance of their input, but those around attention raise it. A norm between
    projection and product undoes a scale of the matrix, so its own scale is raised too.
    """
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        parent = name.split(".")[-2:]
        attention = leaf in _PROJECTIONS or "to_out" in parent
        is_norm = "norm" in type(module).__name__.lower() or "norm" in leaf
        for key, weight in module.named_parameters(recurse=False):
            noise = torch.randn(weight.shape, generator=generator)
            if key == "weight" and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                gain = 1.5 if attention else 1.0
                weight.copy_(gain / math.sqrt(weight[0].numel()) * noise)
            elif key in ("weight", "gamma") and weight.ndim == 1 and is_norm:
                gain = 1.5 if leaf in _ATTENTION_NORMS else 1.0
                weight.copy_(gain + 0.1 * noise)
            elif key == "bias":
                weight.copy_(0.1 * noise)
            else:  # tables, learned positions, pad tokens
                weight.copy_(0.3 * noise)


def _allegro_rope(head_dim: int, frames: int, height: int, width: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Compute rotary tables and token positions as Allegro's pipeline does."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *tables, t, y, x = get_3d_rotary_pos_embed_allegro(
        embed_dim=head_dim,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
    )
    positions = torch.cartesian_prod(t.long(), y.long(), x.long())  # tokens, 3
    return tuple(tables), positions.T.reshape(3, 1, -1)
