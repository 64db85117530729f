"""Tiny denoisers of the classes that `zoo` has no family of its own for: one row per class.

What is shared by a kind of host (FLUX's double and single blocks, Wan's blocks) stands once, above its rows. Images
are 8 x 6 tokens, videos 6 x 4 tokens a frame, unless the host asks for something else.

Sources: diffusers' own tests and models. No size has a meaning but that it is small.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers.models import embeddings
from zoo_parts import HOSTS, TEXT, Draw, Inputs, Tiny, grid_ids, host

__all__ = ["HOSTS"]

IMAGE = (8, 6)  # tokens
VIDEO = (6, 4)  # tokens of a frame
IMAGE_GRID = (1, *IMAGE)


def packed_image(draw: Draw, channels: int, text: int, time: float = 0.5) -> Inputs:
    """Give packed image tokens [B, HW, C], text [B, T, D] and a time."""
    tokens = IMAGE[0] * IMAGE[1]
    return {
        "hidden_states": draw.rows(tokens, channels),
        "encoder_hidden_states": draw.rows(TEXT, text),
        "timestep": draw.times(time, time / 5),
    }


def latent_image(draw: Draw, channels: int, text: int, patch: int = 2, time: float = 500) -> Inputs:
    """Give an image of latents [B, C, H, W], text [B, T, D] and a time."""
    return {
        "hidden_states": draw.rows(channels, IMAGE[0] * patch, IMAGE[1] * patch),
        "encoder_hidden_states": draw.rows(TEXT, text),
        "timestep": draw.times(time, time / 25),
    }


def latent_video(draw: Draw, channels: int, text: int, patch: int = 2, time: float = 500) -> Inputs:
    """Give a video of latents [B, C, F, H, W], text [B, T, D] and a time."""
    return {
        "hidden_states": draw.rows(channels, draw.frames, VIDEO[0] * patch, VIDEO[1] * patch),
        "encoder_hidden_states": draw.rows(TEXT, text),
        "timestep": draw.times(time, time / 25),
    }


def video_grid(draw: Draw) -> tuple[int, int, int]:
    """Name the token grid of a video."""
    return (draw.frames, *VIDEO)


# Double blocks with two streams, then single blocks; text first: FLUX and its kin

FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}


def flux_call(draw: Draw, text: int = 32, axes: int = 3, time: float = 0.5) -> Inputs:
    """Give what FLUX-like transformers are called with."""
    return packed_image(draw, 16, text, time) | {
        "img_ids": grid_ids(*IMAGE, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


@host("BriaTransformer2DModel")
def bria(draw: Draw) -> Tiny:
    """Build Bria 3."""
    return Tiny(FLUX | {"pooled_projection_dim": None}, flux_call(draw, time=500), IMAGE_GRID)


@host("BriaFiboTransformer2DModel")
def bria_fibo(draw: Draw) -> Tiny:
    """Build FIBO: every block gets the text of another layer of the encoder."""
    config = FLUX | {"joint_attention_dim": 64, "text_encoder_dim": 32, "pooled_projection_dim": None}
    inputs = flux_call(draw, text=64, time=500)
    layers = [draw.rows(TEXT, 32) for _ in range(FLUX["num_layers"] + FLUX["num_single_layers"])]
    return Tiny(config, inputs | {"text_encoder_layers": layers}, IMAGE_GRID)


@host("OvisImageTransformer2DModel")
def ovis(draw: Draw) -> Tiny:
    """Build Ovis-Image."""
    return Tiny(FLUX | {"out_channels": 16}, flux_call(draw), IMAGE_GRID)


@host("LongCatImageTransformer2DModel")
def longcat_image(draw: Draw) -> Tiny:
    """Build LongCat-Image."""
    return Tiny(FLUX | {"pooled_projection_dim": 32}, flux_call(draw) | {"guidance": draw.times(3.5, 1)}, IMAGE_GRID)


@host("ChromaTransformer2DModel")
def chroma(draw: Draw) -> Tiny:
    """Build Chroma: FLUX whose modulations come from a small network."""
    config = FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    image = torch.ones(draw.batch, IMAGE[0] * IMAGE[1], dtype=torch.bool)
    return Tiny(config, flux_call(draw) | {"attention_mask": torch.cat([draw.mask(), image], dim=1)}, IMAGE_GRID)


@host("Flux3Transformer2DModel")
def flux3(draw: Draw) -> Tiny:
    """Build FLUX.3: blocks for each modality first, single blocks over all."""
    config = {k: v for k, v in FLUX.items() if k != "patch_size"}
    config |= {"cond_in_channels": 16, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    return Tiny(config, flux_call(draw, axes=4), IMAGE_GRID)


@host("HunyuanImageTransformer2DModel")
def hunyuan_image(draw: Draw) -> Tiny:
    """Build HunyuanImage 2.1: image first; glyphs' text before the prompt's."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 12,
        "rope_axes_dim": (4, 4),
        "patch_size": (1, 1),
    }
    inputs = latent_image(draw, 4, 16, patch=1) | {
        "encoder_attention_mask": draw.mask(),
        "encoder_hidden_states_2": draw.rows(5, 12),
        "encoder_attention_mask_2": draw.mask(5),
    }
    return Tiny(config, inputs, IMAGE_GRID, TEXT + 5)


@host("HunyuanVideo15Transformer3DModel")
def hunyuan15(draw: Draw) -> Tiny:
    """Build HunyuanVideo 1.5: text of three sources, valid tokens first."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "image_embed_dim": 12,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 16,
        "task_type": "t2v",
    }
    inputs = latent_video(draw, 4, 16, patch=1) | {
        "encoder_hidden_states_2": draw.rows(5, 8),
        "encoder_attention_mask": draw.mask(),
        "encoder_attention_mask_2": draw.mask(5),
        "image_embeds": torch.zeros(draw.batch, 3, 12),  # none in text to video, as the pipeline says it
    }
    return Tiny(config, inputs, video_grid(draw), TEXT + 5 + 3)


@host("HunyuanVideoFramepackTransformer3DModel", rows=1)
def framepack(draw: Draw) -> Tiny:
    """Build FramePack: tokens of the past before the image, the image prompt before the text."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
        "has_image_proj": True,
        "image_proj_dim": 16,
        "has_clean_x_embedder": True,
    }
    size = (4, 8)
    inputs: Inputs = {
        "hidden_states": draw.rows(4, draw.frames, *size),
        "timestep": draw.times(500, 20),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "encoder_attention_mask": draw.mask(),
        "pooled_projections": draw.rows(8),
        "guidance": draw.times(6000, 500),
        "image_embeds": draw.rows(5, 16),
        "indices_latents": torch.ones(draw.frames),
    }
    for name, frames in (("clean", 2), ("history_2x", 2), ("history_4x", 8)):
        inputs |= {f"latents_{name}": draw.rows(4, frames, *size), f"indices_latents_{name}": torch.ones(frames)}
    return Tiny(config, inputs, (draw.frames, 2, 4))


@host("MotifVideoTransformer3DModel")
def motif_video(draw: Draw) -> Tiny:
    """Build Motif-Video: the last single blocks are a decoder that sees no text."""
    config = {
        "in_channels": 5,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_decoder_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "norm_type": "layer_norm",
        "text_embed_dim": 32,
        "image_embed_dim": 4,
        "rope_axes_dim": (4, 4, 4),
        "enable_text_cross_attention_dual": False,
        "enable_text_cross_attention_single": False,
    }
    return Tiny(config, latent_video(draw, 5, 32, patch=1), video_grid(draw))


# One joint sequence, one attention a block

COGVIEW: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 4,
}


def sizes(draw: Draw, *names: str) -> Inputs:
    """Give sizes [B, 2] that differ by row."""
    return {name: draw.times(64 + 8 * i, 16)[:, None].repeat(1, 2) for i, name in enumerate(names)}


@host("CogView3PlusTransformer2DModel")
def cogview3plus(draw: Draw) -> Tiny:
    """Build CogView 3+."""
    inputs = latent_image(draw, 4, 16) | sizes(draw, "original_size", "target_size", "crop_coords")
    return Tiny(COGVIEW | {"pos_embed_max_size": 8, "sample_size": 8}, inputs, IMAGE_GRID)


@host("GlmImageTransformer2DModel")
def glm_image(draw: Draw) -> Tiny:
    """Build GLM-Image: joint attention, and a prior of image codes."""
    tokens = IMAGE[0] * IMAGE[1]
    inputs = latent_image(draw, 4, 16) | sizes(draw, "target_size", "crop_coords")
    inputs |= {
        "prior_token_id": draw.whole(64, tokens),
        "prior_token_drop": torch.zeros(draw.batch, tokens, dtype=torch.bool),
    }
    return Tiny(COGVIEW | {"prior_vq_quantizer_codebook_size": 64}, inputs, IMAGE_GRID)


@host("ConsisIDTransformer3DModel")
def consisid(draw: Draw) -> Tiny:
    """Build ConsisID: CogVideoX with a face."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": 4,
        "sample_width": 8,
        "sample_height": 12,
        "sample_frames": 4 * (draw.frames - 1) + 1,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT,
        "cross_attn_interval": 2,
        "is_kps": False,
        "is_train_face": True,
        "cross_attn_dim_head": 1,
        "cross_attn_num_heads": 1,
        "LFE_id_dim": 2,
        "LFE_vit_dim": 2,
        "LFE_depth": 5,
        "LFE_dim_head": 8,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 1,
        "LFE_num_querie": 1,
        "LFE_output_dim": 10,
        "LFE_ff_mult": 1,
        "LFE_num_scale": 1,
    }
    inputs = latent_video(draw, 4, 32)
    inputs["hidden_states"] = inputs["hidden_states"].transpose(1, 2)  # frames before channels
    inputs |= {"id_vit_hidden": [draw.rows(2, 2)], "id_cond": draw.rows(2)}
    return Tiny(config, inputs, video_grid(draw))


@host("EasyAnimateTransformer3DModel")
def easyanimate(draw: Draw) -> Tiny:
    """Build EasyAnimate."""
    config = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "in_channels": 4,
        "out_channels": 4,
        "mmdit_layers": 4,
        "num_layers": 4,
        "patch_size": 2,
        "sample_height": 12,
        "sample_width": 8,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "time_position_encoding_type": "3d_rope",
        "timestep_activation_fn": "silu",
    }
    return Tiny(config, latent_video(draw, 4, 16), video_grid(draw))


@host("ErnieImageTransformer2DModel")
def ernie_image(draw: Draw) -> Tiny:
    """Build ERNIE-Image: image first, lengths of texts instead of a mask."""
    config = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 4,
        "ffn_hidden_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 1,
        "text_in_dim": 16,
        "rope_theta": 256,
        "rope_axes_dim": (8, 4, 4),
        "eps": 1e-6,
        "qk_layernorm": True,
    }
    inputs = {
        "hidden_states": draw.rows(4, *IMAGE),
        "timestep": draw.times(1, 0.2),
        "text_bth": draw.rows(TEXT, 16),
        "text_lens": draw.mask().sum(1),
    }
    return Tiny(config, inputs, IMAGE_GRID)


@host("HiDreamImageTransformer2DModel")
def hidream(draw: Draw) -> Tiny:
    """Build HiDream: an image that is not square is padded to 16 x 16 tokens; the text of Llama changes by block."""
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": [8, 4],
        "text_emb_dim": 8,
        "num_routed_experts": 2,
        "num_activated_experts": 2,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (32, 32),
        "llama_layers": (0, 1, 2, 3),
        "force_inference_output": True,
    }
    inputs = {
        "hidden_states": draw.rows(4, 16, 12),
        "timesteps": draw.times(500, 20),
        "encoder_hidden_states_t5": draw.rows(8, 8),
        "encoder_hidden_states_llama3": draw.normal(4, draw.batch, TEXT, 4),  # layers before rows
        "pooled_embeds": draw.rows(8),
    }
    return Tiny(config, inputs, IMAGE_GRID, 8 + 2 * TEXT)


@host("Krea2Transformer2DModel", "position_ids")
def krea2(draw: Draw) -> Tiny:
    """Build Krea 2: text of several layers of its encoder, fused first; grouped keys; gated outputs."""
    config = {
        "in_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "timestep_embed_dim": 8,
        "text_hidden_dim": 16,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 2, 2),
        "rope_theta": 1000.0,
        "norm_eps": 1e-5,
    }
    inputs = packed_image(draw, 4, 16) | {
        "encoder_hidden_states": draw.rows(TEXT, 3, 16),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid_ids(*IMAGE)]),
        "encoder_attention_mask": draw.mask(),
    }
    return Tiny(config, inputs, IMAGE_GRID)


@host("Ideogram4Transformer2DModel")
def ideogram4(draw: Draw) -> Tiny:
    """Build Ideogram 4: text and image in one sequence of their own channels."""
    module = importlib.import_module("diffusers.models.transformers.transformer_ideogram4")
    config = {
        "in_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": 24,
        "rope_theta": 10000,
        "mrope_section": (2, 1, 1),
        "norm_eps": 1e-5,
    }
    image, text = draw.rows(IMAGE[0] * IMAGE[1], 4), draw.rows(TEXT, 24)
    length = TEXT + image.shape[1]
    positions = torch.arange(TEXT)[:, None].repeat(1, 3)
    positions = torch.cat([positions, (grid_ids(*IMAGE) + module.IMAGE_POSITION_OFFSET).long()])
    kinds = torch.full((draw.batch, length), module.OUTPUT_IMAGE_INDICATOR)
    kinds[:, :TEXT] = module.LLM_TOKEN_INDICATOR
    inputs = {
        "hidden_states": torch.cat([torch.zeros(draw.batch, TEXT, 4), image], dim=1),
        "encoder_hidden_states": torch.cat([text, torch.zeros(*image.shape[:2], 24)], dim=1),
        "timestep": draw.times(0.5, 0.1),
        "position_ids": positions[None].repeat(draw.batch, 1, 1),
        "segment_ids": torch.ones(draw.batch, length, dtype=torch.long),
        "indicator": kinds,
    }
    return Tiny(config, inputs, IMAGE_GRID)


@host("NucleusMoEImageTransformer2DModel")
def nucleus(draw: Draw) -> Tiny:
    """Build Nucleus-Image: queries of the image alone, text that no block changes."""
    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
        "moe_enabled": False,
        "capacity_factors": [8.0] * 4,
    }
    inputs = packed_image(draw, 16, 16) | {
        "encoder_hidden_states_mask": draw.mask().long(),
        "img_shapes": [IMAGE_GRID] * draw.batch,
    }
    return Tiny(config, inputs, IMAGE_GRID)


@host("QwenImage21Transformer2DModel", rows=1)
def qwen21(draw: Draw) -> Tiny:
    """Build Qwen-Image 2.1: two attention calls a block, the text's, then the image's over both."""
    config = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 16,
        "mlp_ratio": 2,
        "axes_dims_rope": (8, 4, 4),
    }
    slots = torch.zeros(draw.batch, TEXT + IMAGE[0] * IMAGE[1] // 4, dtype=torch.bool)
    slots[:, TEXT:] = True  # the places of the target image close the sequence of the language model
    inputs = packed_image(draw, 4, 16) | {
        "img_shapes": [[IMAGE_GRID]] * draw.batch,
        "img_mask": slots,
        "encoder_hidden_states_mask": torch.ones(draw.batch, TEXT, dtype=torch.bool),
    }
    return Tiny(config, inputs, IMAGE_GRID)


@host("OmniGenTransformer2DModel")
def omnigen(draw: Draw) -> Tiny:
    """Build OmniGen: words, the time as a token, then the image."""
    config = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_layers": 4,
        "pad_token_id": 0,
        "vocab_size": 1000,
        "in_channels": 4,
        "time_step_dim": 4,
        "rope_scaling": {"long_factor": [1] * 4, "short_factor": [1] * 4},
    }
    length = TEXT + 1 + IMAGE[0] * IMAGE[1]
    inputs = {
        "hidden_states": draw.rows(4, 16, 12),
        "timestep": draw.times(0.5, 0.1),
        "input_ids": draw.whole(1000, TEXT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(draw.batch, length, length),
        "position_ids": torch.arange(length)[None].repeat(draw.batch, 1),
    }
    return Tiny(config, inputs, IMAGE_GRID)


JOYIMAGE: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 4,
    "rope_dim_list": [4, 6, 6],
    "theta": 256,
}


@host("JoyImageEditTransformer3DModel")
def joyimage(draw: Draw) -> Tiny:
    """Build JoyImage Edit: image first; one matrix makes queries, keys and values."""
    inputs = latent_image(draw, 4, 16, time=1)
    return Tiny(JOYIMAGE, inputs | {"hidden_states": inputs["hidden_states"][:, :, None]}, IMAGE_GRID)


@host("JoyImageEditPlusTransformer3DModel")
def joyimage_plus(draw: Draw) -> Tiny:
    """Build JoyImage Edit Plus: the same, called with patches."""
    inputs = packed_image(draw, 4, 16, time=1)
    inputs["hidden_states"] = draw.rows(IMAGE[0] * IMAGE[1], 4, 1, 2, 2)
    return Tiny(JOYIMAGE, inputs | {"shape_list": [[IMAGE_GRID]] * draw.batch}, IMAGE_GRID)


@host("PRXTransformer2DModel")
def prx(draw: Draw) -> Tiny:
    """Build PRX: queries of the image alone, text that no block changes."""
    config = {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 4,
        "axes_dim": [8, 8],
        "theta": 10000,
    }
    return Tiny(config, latent_image(draw, 4, 16, time=0.5) | {"attention_mask": draw.mask()}, IMAGE_GRID)


@host("BriaFibo2Transformer2DModel")
def bria_fibo2(draw: Draw) -> Tiny:
    """Build FIBO 2: gist tokens stand for the text, made of it by a perceiver."""
    config = {
        "in_channels": 4,
        "patch_size": 2,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 16,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 2,
        "max_num_gist_tokens": 4,
        "gist_step": 2,
        "gist_min_text_len": 2,
        "gist_max_text_len": 16,
        "axes_dims": (4, 6, 6),
        "axes_lens": (64, 32, 32),
    }
    inputs = latent_image(draw, 4, 16, time=0.5)
    inputs |= {"encoder_hidden_states": draw.rows(2, TEXT, 16), "encoder_attention_mask": draw.mask()}
    return Tiny(config, inputs, IMAGE_GRID, 2)


# Self, then cross attention, over a video: Wan and its kin

WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 4,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


@host("ChronoEditTransformer3DModel")
def chronoedit(draw: Draw) -> Tiny:
    """Build ChronoEdit."""
    return Tiny(WAN, latent_video(draw, 4, 16), video_grid(draw))


@host("SkyReelsV2Transformer3DModel")
def skyreels2(draw: Draw) -> Tiny:
    """Build SkyReels V2."""
    return Tiny(WAN, latent_video(draw, 4, 16), video_grid(draw))


@host("WanVACETransformer3DModel")
def wan_vace(draw: Draw) -> Tiny:
    """Build Wan VACE: blocks of the control video beside the others."""
    inputs = latent_video(draw, 4, 16)
    control = draw.rows(6, *inputs["hidden_states"].shape[2:])
    config = WAN | {"vace_layers": [0, 2], "vace_in_channels": 6}
    return Tiny(config, inputs | {"control_hidden_states": control}, video_grid(draw))


@host("AnyFlowTransformer3DModel")
def anyflow(draw: Draw) -> Tiny:
    """Build AnyFlow: frames before channels, a time for each frame, and the time to go to."""
    inputs = latent_video(draw, 4, 16)
    times = inputs["timestep"][:, None].repeat(1, draw.frames)
    inputs |= {"hidden_states": inputs["hidden_states"].transpose(1, 2), "timestep": times, "r_timestep": times / 2}
    return Tiny(WAN | {"gate_value": 0.25, "deltatime_type": "r"}, inputs, video_grid(draw))


@host("AnyFlowFARTransformer3DModel", rows=1)
def anyflow_far(draw: Draw) -> Tiny:
    """Build AnyFlow FAR: attention by flex alone, chunk after chunk."""
    config = WAN | {
        "gate_value": 0.25,
        "deltatime_type": "r",
        "compressed_patch_size": (1, 4, 4),
        "full_chunk_limit": 3,
    }
    times = draw.times(500, 20)[:, None].repeat(1, 4)
    inputs = {
        "hidden_states": draw.rows(4, 4, 16, 16),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "timestep": times,
        "r_timestep": times / 2,
        "chunk_partition": [2, 2],
    }
    return Tiny(config, inputs, (4, 8, 8))


@host("HeliosTransformer3DModel", rows=1)
def helios(draw: Draw) -> Tiny:
    """Build Helios: tokens of the past, coarser the longer ago, before the video."""
    config = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {
        "rope_dim": (4, 4, 4),
        "has_multi_term_memory_patch": True,
        "guidance_cross_attn": True,
        "zero_history_timestep": True,
        "is_amplify_history": False,
    }
    size = (8, 16)
    inputs: Inputs = {
        "hidden_states": draw.rows(4, draw.frames, *size),
        "timestep": draw.times(500, 20),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "indices_hidden_states": torch.ones(draw.batch, draw.frames),
    }
    for name, frames in (("short", 1), ("mid", 1), ("long", 4)):
        inputs[f"latents_history_{name}"] = draw.rows(4, frames, *size)
        inputs[f"indices_latents_history_{name}"] = torch.ones(draw.batch, frames)
    return Tiny(config, inputs, (draw.frames, 4, 8))


@host("WanAnimateTransformer3DModel")
def wan_animate(draw: Draw) -> Tiny:
    """Build Wan Animate: a pose, a face, and an image prompt before the text."""
    channels = {"4": 16, "8": 16, "16": 16}
    config = WAN | {
        "in_channels": 12,
        "latent_channels": 4,
        "image_dim": 16,
        "motion_encoder_channel_sizes": channels,
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    frames = draw.frames
    inputs = {
        "hidden_states": draw.rows(12, frames + 1, 12, 8),
        "timestep": draw.times(500, 20),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "encoder_hidden_states_image": draw.rows(5, 16),
        "pose_hidden_states": draw.rows(4, frames, 12, 8),
        "face_pixel_values": draw.rows(3, 4 * (frames - 1) + 1, 16, 16),
    }
    return Tiny(config, inputs, (frames + 1, *VIDEO), TEXT + 5)


@host("WanAnimate2Transformer3DModel", rows=1)
def wan_animate2(draw: Draw) -> Tiny:
    """Build Wan Animate 2: lists instead of batches; attention to the text, then to the image prompt."""
    module: Any = importlib.import_module("diffusers.models.transformers.transformer_wan_animate_2")
    config = {
        "patch_size": (1, 2, 2),
        "text_len": 16,
        "in_dim": 10,
        "dim": 32,
        "ffn_dim": 32,
        "freq_dim": 16,
        "text_dim": 16,
        "out_dim": 4,
        "num_heads": 2,
        "num_layers": 4,
        "cross_attn_norm": True,
        "use_img_emb": True,
    }
    inputs = {
        "hidden_states": [draw.normal(4, draw.frames, 12, 8)],
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": [draw.normal(TEXT, 16)],
        "condition_latents": [draw.normal(6, draw.frames, 12, 8)],
        "encoder_hidden_states_image": draw.rows(5, 1280),
        "kv_cache": module.WanAnimate2KVCache(4),
        "kv_cache_mode": "extract",
        "seq_len": draw.frames * VIDEO[0] * VIDEO[1],
        "offset_grid_sizes": torch.tensor([[draw.frames, *VIDEO]]),
    }
    return Tiny(config, inputs, video_grid(draw), 16)


# Self, then cross attention, under other names


@host("SanaVideoTransformer3DModel")
def sana_video(draw: Draw) -> Tiny:
    """Build Sana-Video: linear self attention, cross attention under a text mask."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "mlp_ratio": 2.5,
        "sample_size": 8,
        "patch_size": (1, 2, 2),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return Tiny(config, latent_video(draw, 4, 16) | {"encoder_attention_mask": draw.mask()}, video_grid(draw))


KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "patch_size": (1, 2, 2),
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 4, 4),
}


def kandinsky_call(draw: Draw) -> Inputs:
    """Give a video with channels last [B, F, H, W, C], text and its pooled vector."""
    inputs = latent_video(draw, 4, 16) | {"pooled_projections": draw.rows(8)}
    return inputs | {"hidden_states": inputs["hidden_states"].movedim(1, -1).contiguous()}


@host("Kandinsky5Transformer3DModel", "visual_rope_pos", "text_rope_pos")
def kandinsky5(draw: Draw) -> Tiny:
    """Build Kandinsky 5."""
    inputs = kandinsky_call(draw) | {
        "visual_rope_pos": [torch.arange(n) for n in video_grid(draw)],
        "text_rope_pos": torch.arange(TEXT),
    }
    return Tiny(KANDINSKY, inputs, video_grid(draw))


@host("Kandinsky6Transformer3DModel")
def kandinsky6(draw: Draw) -> Tiny:
    """Build Kandinsky 6: video and audio, each attending to the other."""
    config = KANDINSKY | {"visual_cond": False, "in_audio_dim": 5, "out_audio_dim": 5}
    return Tiny(config, kandinsky_call(draw) | {"audio_hidden_states": draw.rows(9, 5)}, video_grid(draw))


@host("Kandinsky6SRTransformer3DModel")
def kandinsky6_sr(draw: Draw) -> Tiny:
    """Build the super-resolution of Kandinsky 6: attention by flex alone, no text."""
    names = ("in_visual_dim", "out_visual_dim", "time_dim", "model_dim", "ff_dim", "num_visual_blocks", "axes_dims")
    config = {name: KANDINSKY[name] for name in names} | {"patch_size": (1, 1, 1)}
    return Tiny(config, {"hidden_states": draw.rows(2, 16, 8, 9), "timestep": draw.times(500, 20)}, (2, 16, 8), text=0)


@host("LuminaNextDiT2DModel")
def lumina_next(draw: Draw) -> Tiny:
    """Build Lumina-Next: attention to image and to text added, grouped keys."""
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "norm_eps": 1e-5,
        "learn_sigma": False,
        "qk_norm": True,
        "cross_attention_dim": 32,
        "scaling_factor": 1.0,
    }
    inputs = latent_image(draw, 4, 32, time=0.5) | {
        "encoder_mask": draw.mask(),
        "image_rotary_emb": embeddings.get_2d_rotary_pos_embed_lumina(8, 16, 16),
        "cross_attention_kwargs": {},
    }
    return Tiny(config, inputs, IMAGE_GRID)


@host("DiTTransformer2DModel")
def dit(draw: Draw) -> Tiny:
    """Build DiT: classes instead of text; square images."""
    config = {
        "in_channels": 4,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "attention_bias": True,
        "num_layers": 4,
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 8,
        "patch_size": 2,
        "sample_size": 12,
    }
    inputs = {
        "hidden_states": draw.rows(4, 12, 12),
        "timestep": draw.times(500, 20).long(),
        "class_labels": torch.arange(draw.batch),
    }
    return Tiny(config, inputs, (1, 6, 6), text=0)


@host("SanaWMTransformer3DModel", rows=1)
def sana_wm(draw: Draw) -> Tiny:
    """Build Sana's world model: softmax attention in every second block, linear attention in the others."""
    config = {
        "in_channels": 4,
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "patch_size": (1, 1, 1),
        "softmax_every_n": 2,
        "linear_head_dim": 16,
        "caption_channels": 16,
        "chunk_plucker_channels": 6,
        "chunk_plucker_post_attn_blocks": 0,
        "mlp_ratio": 2.0,
    }
    inputs = latent_video(draw, 4, 16, patch=1) | {
        "timestep": draw.times(500, 20)[:, None, None].repeat(1, 1, draw.frames),
        "encoder_hidden_states": draw.rows(1, TEXT, 16),
        "encoder_attention_mask": draw.mask().float(),
    }
    return Tiny(config, inputs, video_grid(draw))


# Video and audio in one model

LTX2: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 3,
    "caption_channels": 16,
    "rope_double_precision": False,
}


@host("LTX2VideoTransformer3DModel")
def ltx2(draw: Draw) -> Tiny:
    """Build LTX-2: six attentions a block, of video, of audio, and between them."""
    inputs = {
        "hidden_states": draw.rows(draw.frames * VIDEO[0] * VIDEO[1], 4),
        "audio_hidden_states": draw.rows(9, 4),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "audio_encoder_hidden_states": draw.rows(TEXT, 16),
        "timestep": draw.times(500, 20),
        "encoder_attention_mask": draw.mask(),
        "num_frames": draw.frames,
        "height": VIDEO[0],
        "width": VIDEO[1],
        "audio_num_frames": 9,
        "fps": 25.0,
    }
    return Tiny(
        LTX2 | {"qk_norm": "rms_norm_across_heads", "patch_size": 1, "patch_size_t": 1}, inputs, video_grid(draw)
    )


@host("SanaWMLTX2RefinerTransformer3DModel")
def sana_wm_refiner(draw: Draw) -> Tiny:
    """Build the refiner of Sana's world model: the video half of LTX-2, called with its rotary tables."""
    tokens = draw.frames * VIDEO[0] * VIDEO[1]
    angles = draw.rows(tokens, 16)
    inputs = {
        "hidden_states": draw.rows(tokens, 4),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "timestep": draw.times(0.5, 0.1)[:, None].repeat(1, tokens),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": draw.mask(),
    }
    return Tiny(LTX2, inputs, video_grid(draw))


@host(
    "MiniMaxH3Transformer3DModel",
    *("timestep", "timestep_indices", "token_tags", "position_ids"),
    *("video_indices", "audio_indices", "text_indices"),
)
def minimax_h3(draw: Draw) -> Tiny:
    """Build MiniMax H3: text, audio and video in one sequence."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 24,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": 4,
        "audio_in_channels": 6,
        "patch_size": (1, 2, 2),
        "text_dim": 8,
        "freq_dim": 8,
        "time_embed_hidden_dim": 24,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    }
    audio_tokens, (frames, height, width) = 5, video_grid(draw)
    image = frames * height * width
    text, audio, video = torch.arange(TEXT + audio_tokens + image).split([TEXT, audio_tokens, image])
    tags = torch.zeros(TEXT + audio_tokens + image, dtype=torch.long)
    tags[text], tags[audio] = 1, 2
    times = torch.zeros_like(tags)
    times[audio] = 1
    positions = torch.zeros(len(tags), 3)
    positions[:, 0] = torch.arange(len(tags))
    positions[video] = torch.cat([grid_ids(height, width, time=TEXT + i) for i in range(frames)])
    inputs = {
        "hidden_states": draw.rows(image, 16),
        "audio_hidden_states": draw.rows(audio_tokens, 6),
        "encoder_hidden_states": draw.rows(TEXT, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": times,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }
    return Tiny(config, inputs, video_grid(draw))


@host("Cosmos3OmniTransformer", rows=1)
def cosmos3(draw: Draw) -> Tiny:
    """Build Cosmos 3: words and image in one sequence without a batch, two attention calls a block."""
    config = {
        "head_dim": 6,
        "hidden_act": "relu2",
        "hidden_size": 24,
        "intermediate_size": 24,
        "latent_channel": 2,
        "latent_patch_size": 1,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "patch_latent_dim": 2,
        "qk_norm_for_text": False,
        "rms_norm_eps": 1e-5,
        "rope_axes_dim": [1, 1, 1],
        "rope_theta": 1e8,
        "vocab_size": 32,
    }
    frames, height, width = grid = video_grid(draw)
    image = frames * height * width
    text, vision = torch.arange(TEXT + image).split([TEXT, image])
    positions = torch.arange(TEXT + image).repeat(3, 1)
    places = torch.cat([grid_ids(height, width, time=i) for i in range(frames)])
    positions[:, TEXT:] = (TEXT + places).long().T
    inputs = {
        "input_ids": draw.whole(32, TEXT)[0],
        "text_indexes": text,
        "position_ids": positions,
        "und_len": TEXT,
        "sequence_length": TEXT + image,
        "vision_tokens": [draw.normal(1, 2, *grid)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.full((image,), 0.5),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }
    return Tiny(config, inputs, grid)


# Audio alone

AUDIO = 16  # tokens


@host("AceStepTransformer1DModel")
def ace_step(draw: Draw) -> Tiny:
    """Build ACE-Step: music, grouped keys."""
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "in_channels": 24,
        "audio_acoustic_hidden_dim": 8,
        "patch_size": 2,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "sliding_window": 16,
    }
    inputs = {
        "hidden_states": draw.rows(2 * AUDIO, 8),
        "timestep": draw.times(0.5, 0.1),
        "timestep_r": draw.times(0.3, 0.1),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "context_latents": draw.rows(2 * AUDIO, 16),
    }
    return Tiny(config, inputs, (1, 1, AUDIO))


@host("LongCatAudioDiTTransformer")
def longcat_audio(draw: Draw) -> Tiny:
    """Build LongCat-Audio: speech."""
    config = {
        "dit_dim": 64,
        "dit_depth": 2,
        "dit_heads": 4,
        "dit_text_dim": 32,
        "latent_dim": 8,
        "text_conv": False,
    }
    inputs = {
        "hidden_states": draw.rows(AUDIO, 8),
        "encoder_hidden_states": draw.rows(TEXT, 32),
        "encoder_attention_mask": draw.mask(),
        "attention_mask": torch.ones(draw.batch, AUDIO, dtype=torch.bool),
        "timestep": draw.times(0.5, 0.1),
    }
    return Tiny(config, inputs, (1, 1, AUDIO))


@host("StableAudioDiTModel", "timestep", "rotary_embedding")
def stable_audio(draw: Draw) -> Tiny:
    """Build Stable Audio: one token of lengths before the audio."""
    config = {
        "sample_size": AUDIO,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_attention_heads": 2,
        "cross_attention_dim": 16,
        "time_proj_dim": 16,
        "global_states_input_dim": 12,
        "cross_attention_input_dim": 16,
    }
    rope: Any = embeddings.get_1d_rotary_pos_embed(4, AUDIO + 1, use_real=True, repeat_interleave_real=False)
    inputs = {
        "hidden_states": draw.rows(4, AUDIO),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "global_hidden_states": draw.rows(1, 12),
        "rotary_embedding": rope,
    }
    return Tiny(config, inputs, (1, 1, AUDIO))


@host("StableAudio3DiTModel")
def stable_audio3(draw: Draw) -> Tiny:
    """Build Stable Audio 3: memory tokens before the audio."""
    config = {
        "io_channels": 8,
        "patch_size": 1,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "cond_token_dim": 16,
        "global_cond_dim": 12,
        "local_add_cond_dim": 5,
        "timestep_features_dim": 16,
        "ff_mult": 2,
        "num_memory_tokens": 3,
        "use_differential_attention": True,
    }
    inputs = {
        "hidden_states": draw.rows(8, AUDIO),
        "timestep": draw.times(0.5, 0.1),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "global_hidden_states": draw.rows(12),
    }
    return Tiny(config, inputs, (1, 1, AUDIO))


@host("MiniMaxMusic3Transformer1DModel")
def minimax_music3(draw: Draw) -> Tiny:
    """Build MiniMax Music 3: what is sung lies beside the audio, channel by channel."""
    config = {
        "in_channels": 8,
        "condition_dim": 16,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "ff_inner_dim": 32,
        "rotary_dim": 4,
        "fourier_embedding_dim": 8,
    }
    inputs = {
        "hidden_states": draw.rows(8, AUDIO),
        "encoder_hidden_states": draw.rows(AUDIO, 16),
        "timestep": draw.times(0.5, 0.1),
    }
    return Tiny(config, inputs, (1, 1, AUDIO), text=0)


# UNets, and what makes embeddings


@host("UNet2DModel")
def unet2d(draw: Draw) -> Tiny:
    """Build a UNet without a prompt."""
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return Tiny(config, {"sample": draw.rows(4, 16, 12), "timestep": torch.tensor(500)}, (1, 16, 12), text=0)


@host("I2VGenXLUNet")
def i2vgenxl(draw: Draw) -> Tiny:
    """Build I2VGenXL: attention between frames beside that within one, and an image prompt."""
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "num_attention_heads": None,
    }
    inputs = {
        "sample": draw.rows(4, draw.frames, 16, 12),
        "timestep": torch.tensor(500),
        "fps": draw.times(16, 4).long(),
        "image_latents": draw.rows(4, draw.frames, 16, 12),
        "image_embeddings": draw.rows(8),
        "encoder_hidden_states": draw.rows(TEXT, 8),
    }
    return Tiny(config, inputs, (draw.frames, 16, 12))


@host("Kandinsky3UNet")
def kandinsky3(draw: Draw) -> Tiny:
    """Build Kandinsky 3: in each block one self attention, then cross attention; the time attends to the text."""
    config = {
        "in_channels": 4,
        "time_embedding_dim": 32,
        "groups": 2,
        "attention_head_dim": 4,
        "layers_per_block": 2,
        "block_out_channels": (16, 32),
        "cross_attention_dim": 16,
        "encoder_hid_dim": 16,
    }
    inputs = {
        "sample": draw.rows(4, 16, 12),
        "timestep": draw.times(500, 20),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "encoder_attention_mask": draw.mask().float(),
    }
    return Tiny(config, inputs, (1, 16, 12))


@host("DreamLiteUNetModel")
def dreamlite(draw: Draw) -> Tiny:
    """Build DreamLite: self attention at the lowest resolution alone."""
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    inputs = {
        "sample": draw.rows(4, 16, 12),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw.rows(TEXT, 32),
    }
    return Tiny(config, inputs, (1, 16, 12))


@host("StableCascadeUNet")
def stable_cascade(draw: Draw) -> Tiny:
    """Build Stable Cascade: queries of the image; keys of the image, of pooled text, of text and of an image prompt."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 8,
        "patch_size": 1,
        "conditioning_dim": 32,
        "block_out_channels": (32, 32),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 1),
        "clip_text_in_channels": 16,
        "clip_text_pooled_in_channels": 12,
        "clip_image_in_channels": 20,
        "clip_seq": 2,
        "dropout": (0.0, 0.0),
        "switch_level": (False,),
    }
    inputs = {
        "sample": draw.rows(4, *IMAGE),
        "timestep_ratio": draw.times(0.5, 0.1),
        "clip_text_pooled": draw.rows(1, 12),
        "clip_text": draw.rows(TEXT, 16),
        "clip_img": draw.rows(1, 20),
    }
    return Tiny(config, inputs, IMAGE_GRID, 2 + TEXT + 2)


@host("UVit2DModel")
def uvit(draw: Draw) -> Tiny:
    """Build aMUSEd's transformer: codes of a picture, some of them masked."""
    config = {
        "hidden_size": 32,
        "use_bias": False,
        "hidden_dropout": 0.0,
        "cond_embed_dim": 16,
        "micro_cond_encode_dim": 4,
        "micro_cond_embed_dim": 20,
        "encoder_hidden_size": 16,
        "vocab_size": 32,
        "codebook_size": 32,
        "in_channels": 32,
        "block_out_channels": 32,
        "num_res_blocks": 1,
        "downsample": True,
        "upsample": True,
        "block_num_heads": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.0,
        "intermediate_size": 32,
        "sample_size": 16,
    }
    inputs = {
        "input_ids": draw.whole(31, 16, 12),
        "encoder_hidden_states": draw.rows(TEXT, 16),
        "pooled_text_emb": draw.rows(16),
        "micro_conds": draw.rows(5).abs(),
    }
    return Tiny(config, inputs, IMAGE_GRID)


@host("PriorTransformer")
def prior(draw: Draw) -> Tiny:
    """Build the prior of Kandinsky 2: one image embedding, and no image."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "embedding_dim": 8,
        "num_embeddings": TEXT,
        "additional_embeddings": 4,
    }
    inputs = {
        "hidden_states": draw.rows(8),
        "timestep": 2,
        "proj_embedding": draw.rows(8),
        "encoder_hidden_states": draw.rows(TEXT, 8),
    }
    return Tiny(config, inputs, (1, 1, 1))
