"""A text2image pipeline of the shapes kind with random weights and a few channels, on which training is tested.

What is tested is the machinery: which parts are trained, saved, resumed and exported. None of it depends on the width.
"""

from __future__ import annotations

from pathlib import Path

import torch

from attnctl.shapes.tokenizer import write_tokenizer
from attnctl.shapes.training import models

CHANNELS = (16, 32)


def write_base(folder: Path) -> Path:
    """Write the pipeline into a folder, so that nothing depends on shipped weights; return the folder."""
    torch.manual_seed(0)
    tokenizer = models.build_tokenizer(folder / "words")
    vae, text = models.build_vae(), models.build_text_encoder(tokenizer)
    vae.quant_conv.weight.data.mul_(3)
    wide = models.build_unet()
    unet = wide.from_config(dict(wide.config) | {"block_out_channels": CHANNELS})
    models.assemble(vae, text, tokenizer, unet).save_pretrained(folder)
    write_tokenizer(folder / "tokenizer")
    return folder
