"""Whole pipelines of transformers with random weights, from words and pixels to pixels, for tests of editing.

Each has a tokenizer that keeps words whole, a tiny text encoder, an autoencoder of its own kind and a denoiser of the
zoo, of the widths that these want.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
import zoo
import zoo_pipelines as pipes
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

SOURCE, TARGET = "a black bear in the water", "a red bear in the water"
WORDS = ["a black bear in the water", " a red bear in the water", " a watercolor of two dogs", " user assistant system"]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
WIDTH = 16

_FLOW = {"shift": 3.0}
_WAN_VAE: dict[str, Any] = {
    "base_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "z_dim": 4,
    "latents_mean": [0.1, 0.0, -0.1, 0.2],
    "latents_std": [1.1, 0.9, 1.0, 1.2],
}


def tokenizer(length: int = 512, end: bool = True, texts: tuple[str, ...] = ()) -> Any:
    """Train a byte-level tokenizer in which every word of the prompts is one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [*WORDS, *texts] * 20,
        trainers.BpeTrainer(
            vocab_size=1000 if texts else 420,
            special_tokens=[*SPECIAL, *LLAMA] if texts else SPECIAL,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if end:
        made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=length
    )


def _llama_tokenizer() -> Any:
    """Make a tokenizer that reads HunyuanVideo's template as its own does: in 95 tokens, which the pipeline crops."""
    template = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    made = tokenizer(2048, end=False, texts=(template,))
    short = int(DEFAULT_PROMPT_TEMPLATE["crop_start"]) - len(made(template)["input_ids"])
    assert short >= 0
    backend = made.backend_tokenizer
    marked = " ".join([*["<bos>"] * short, "$A"])
    backend.post_processor = processors.TemplateProcessing(single=marked, special_tokens=[("<bos>", 1)])
    return made


def _finish(model: nn.Module, seed: int = 0) -> Any:
    zoo.randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _t5(width: int = WIDTH) -> Any:
    config = T5Config(vocab_size=1024, d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def _clip(cls: Any = CLIPTextModel, width: int = WIDTH) -> Any:
    config = CLIPTextConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return cls(config).eval()


def _decoder(cls: Any, config: Any) -> Any:
    shape = {"vocab_size": 1024, "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 4, "pad_token_id": 0}
    return cls(config(**shape)).eval()


def _kl(channels: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            shift_factor=0.1,
        )
    return _finish(vae)


def _flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**_FLOW | more)


def sd3() -> Any:
    model = zoo.build("sd3", 1, joint_attention_dim=2 * WIDTH, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=64)[
        0
    ]
    return diffusers.StableDiffusion3Pipeline(
        transformer=model,
        scheduler=_flow(),
        vae=_kl(4),
        text_encoder=_clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(77),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(77),
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer_3=tokenizer(),
    )


def flux() -> Any:
    return diffusers.FluxPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=_kl(4),
        text_encoder=_clip(),
        tokenizer=tokenizer(77),
        text_encoder_2=_t5(),
        tokenizer_2=tokenizer(),
        transformer=zoo.build("flux", 1, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH)[0],
    )


def qwen() -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLQwenImage(
            **_WAN_VAE | {"dim_mult": [1, 1, 1], "temperal_downsample": [False, True]}
        )
    pipe = diffusers.QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=_finish(vae),
        text_encoder=None,
        tokenizer=None,
        transformer=zoo.build("qwen", 1)[0],
    )
    # Registered, so that a saved pipeline has them.
    pipe.register_modules(tokenizer=tokenizer(2048, end=False), text_encoder=_decoder(Qwen3Model, Qwen3Config))
    return pipe


def pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5(),
        vae=_kl(4),
        transformer=zoo.build("pixart", 1, caption_channels=WIDTH)[0],
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def wan() -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLWan(**_WAN_VAE, temperal_downsample=[False, True, True])
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5(),
        vae=_finish(vae),
        scheduler=diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        transformer=zoo.build("wan", 1, text_dim=WIDTH)[0],
    )


def cogvideox() -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=_t5(),
        vae=_finish(vae),
        transformer=zoo.build("cogvideox_rope", 1, text_embed_dim=WIDTH, max_text_seq_length=226)[0],
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )


def ltx() -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
        )
    return diffusers.LTXPipeline(
        scheduler=_flow(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=_finish(vae),
        text_encoder=_t5(),
        tokenizer=tokenizer(),
        transformer=zoo.build("ltx", 1, caption_channels=WIDTH)[0],
    )


def hunyuanvideo() -> Any:
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        )
    return diffusers.HunyuanVideoPipeline(
        transformer=zoo.build("hunyuanvideo", 1, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH)[0],
        vae=_finish(vae),
        scheduler=_flow(shift=7.0),
        text_encoder=_decoder(LlamaModel, LlamaConfig),
        tokenizer=_llama_tokenizer(),
        text_encoder_2=_clip(),
        tokenizer_2=tokenizer(77),
    )


HOSTS = {f.__name__: f for f in (sd3, flux, qwen, pixart, wan, cogvideox, ltx, hunyuanvideo)}
VIDEO = frozenset({"wan", "cogvideox", "ltx", "hunyuanvideo"})


def build(name: str) -> Any:
    """Build one of HOSTS, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pipes.quiet(HOSTS[name]())


def clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """Draw a random clip, uint8 [frames, height, width, 3]."""
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
