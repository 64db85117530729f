"""The shapes videodit: a real WanPipeline, small enough to train on two cores.

The autoencoder halves time once and every side of a picture twice: 17 frames of 64x64 become 9 latent frames of 16x16
with eight channels, the transformer sees 9 x 8 x 8 = 576 tokens. The text encoder is a UMT5 that knows the world's
words, trained together with the transformer (`train_videodit`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnctl.shapes.scenes import WORDS
from attnctl.shapes.tokenizer import MAX_LENGTH

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import T5TokenizerFast, UMT5EncoderModel

__all__ = [
    "DIT_FRAMES",
    "LATENT_FRAMES",
    "SHIFT",
    "assemble",
    "build_scheduler",
    "build_text_encoder",
    "build_tokenizer",
    "build_transformer",
    "build_vae",
    "encode_video",
    "write_t5_tokenizer",
]

DIT_FRAMES = 17
LATENT_FRAMES = 9
LAYERS, HEADS, HEAD_DIM = 8, 5, 32
SHIFT = 5.0  # motion is decided where a clip is nearly all noise
_CHANNELS = 8
_TEXT_WIDTH, _TEXT_LAYERS = 96, 2
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes the space before a word


def build_vae() -> AutoencoderKLWan:
    """Build the autoencoder, 17x64x64x3 to 9x16x16x8 and back; the latents' mean and spread are set after training."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * _CHANNELS,
        latents_std=[1.0] * _CHANNELS,
        patch_size=2,
        in_channels=12,  # 2x2 pixels of three colours
        out_channels=12,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def encode_video(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """Encode videos [batch, 3, frames, 64, 64] in -1..1 into latents of mean 0 and spread 1 [batch, 8, frames, 16, 16].

    Of 1 + 4 n frames, 1 + 2 n latent frames are made.
    """
    mean, std = (
        torch.tensor(values, device=x.device)[:, None, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (vae.encode(x).latent_dist.mean.float() - mean) / std


def write_t5_tokenizer(folder: str | Path) -> Path:
    """Write the tokenizer's files into `folder` and return it: every word of the world is one token.

    All printable characters are tokens too, so that other text is legal and simply takes more of them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = [w if w in (",", ".") else _SPACE + w for w in WORDS]
    letters = [chr(i) for i in range(33, 127) if chr(i) not in words]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (_SPACE, -4.0)]
    pieces += [(w, -1.0) for w in words] + [(c, -9.0) for c in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, "always", split=True)]
    )
    tokenizer.decoder = decoders.Metaspace(_SPACE, "always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {**facts, "tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": MAX_LENGTH}
    for name, data in (("tokenizer_config.json", config), ("special_tokens_map.json", facts)):
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return folder


def build_tokenizer(folder: str | Path) -> T5TokenizerFast:
    """Write the tokenizer into `folder` and load it from there."""
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(str(write_t5_tokenizer(folder)), local_files_only=True)


def build_text_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """Build the text encoder: two layers of four heads, width 96."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=_TEXT_WIDTH,
            d_kv=_TEXT_WIDTH // 4,
            d_ff=2 * _TEXT_WIDTH,
            num_layers=_TEXT_LAYERS,
            num_decoder_layers=0,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=MAX_LENGTH,
            dropout_rate=0.0,  # the same step must be the same after a kill
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> WanTransformer3DModel:
    """Build the denoiser: eight blocks of five heads on 576 tokens; every block starts as the identity."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_dim=_TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=4 * HEADS * HEAD_DIM,
        num_layers=LAYERS,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    # adaLN-zero (Peebles and Xie, arXiv 2212.09748), which diffusers leaves to whoever trains.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "proj_out" or name.endswith((".time_proj", ".attn2.to_out.0")):
                nn.init.zeros_(module.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(parameter)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler: rectified flow, Euler steps, most of them at the noisy end."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def assemble(
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: T5TokenizerFast,
    transformer: WanTransformer3DModel,
) -> WanPipeline:
    """Put the parts together as a WanPipeline."""
    from diffusers import WanPipeline
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    transformer.set_attn_processor(WanAttnProcessor())
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=build_scheduler(),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
