"""The networks that metrics look through: published ones from this machine or the Hub, tiny ones at toy size.

All weights are safetensors, but for FID's Inception network, which is a file of tensors that is read as nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import nn

from attnctl.data.picture_files import read_picture
from attnctl.errors import ConfigError

__all__ = ["Networks", "ToyNetworks", "check_torchmetrics"]

_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
_ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION}"
_PICKSCORE = "yuvalkirstain/PickScore_v1"
_BLIP = "Salesforce/blip-image-captioning-base"
_SIZES = {
    "openai/clip-vit-base-patch32": 0.6, "openai/clip-vit-base-patch16": 0.6, "openai/clip-vit-large-patch14": 1.7,
    _PICKSCORE: 3.9, _BLIP: 1.0, _INCEPTION: 0.1,
}  # fmt: skip
"""Gigabytes to fetch, about."""


def check_torchmetrics(needs_fidelity: bool = False) -> None:
    """Raise ConfigError where torchmetrics, or what its FID needs, is not installed."""
    import importlib.util

    for package in ("torchmetrics", *(("torch_fidelity",) if needs_fidelity else ())):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"This is measured with {package.replace('_', '-')}, which is not installed: "
                'pip install "attnctl[reproduce]", or choose other metrics with --metric.'
            )


class Networks:
    """Load each network when it is first needed.

    Args:
        clip: Hub id or folder of the CLIP model.
        device: Where to compute.
        reference: Real pictures that FID compares with, each cut to the square in its middle.
        inception: File of FID's Inception network; None to look where torch keeps files, or to fetch it.

    Raises:
        ConfigError: When a network is first needed: it is not here and cannot be fetched; its id and size are said.
    """

    def __init__(
        self,
        clip: str,
        device: str = "cpu",
        reference: Sequence[Path] = (),
        inception: Path | None = None,
    ) -> None:
        self.clip_id, self.device, self.reference, self._inception = clip, device, reference, inception

    def fetch(self, names: Iterable[str]) -> None:
        """Load some of "clip", "inception", "blip", "pickscore", so that what is missing is said before the work."""
        parts = {"clip": "_clip", "blip": "_captioner", "pickscore": "_pick", "inception": "_fid"}
        for name in names:
            getattr(self, parts[name])

    # CLIP, through torchmetrics

    def clip_scores(self, images: Sequence[Any], text: str) -> list[float]:
        """Return 100 times the cosine of each picture and a text, at least 0."""
        return [self._score(_pixels(image), text) for image in images]

    def image_scores(self, first: Sequence[Any], second: Sequence[Any]) -> list[float]:
        """Return 100 times the cosine of pictures, pair by pair, at least 0."""
        return [self._score(_pixels(a), _pixels(b)) for a, b in zip(first, second, strict=True)]

    def text_scores(self, first: str, second: str) -> float:
        """Return 100 times the cosine of two texts, at least 0."""
        return self._score(first, second)

    def _score(self, first: Any, second: Any) -> float:
        from torchmetrics.functional.multimodal import clip_score

        tower = self._clip
        moved = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in (first, second)]
        with torch.no_grad():
            return float(clip_score(moved[0], moved[1], lambda: tower))

    @cached_property
    def _clip(self) -> tuple[Any, Any]:
        check_torchmetrics()
        from transformers import AutoProcessor, CLIPModel

        model = self._had(self.clip_id, lambda n: CLIPModel.from_pretrained(n, use_safetensors=True))
        processor = self._had(self.clip_id, AutoProcessor.from_pretrained)
        return _Towers(model).to(self.device).eval(), processor

    # FID

    def fid(self, batches: Iterable[Sequence[Any]]) -> float:
        """Return the Fréchet distance of batches of pictures to the real ones."""
        metric = self._fid
        for batch in batches:
            metric.update(torch.stack([_pixels(image) for image in batch]).to(self.device), real=False)
        value = float(metric.compute())
        metric.reset()  # keeps what it has seen of the real ones
        return value

    @cached_property
    def _fid(self) -> Any:
        metric = self._inception_metric().to(self.device)
        for path in self.reference:
            image = ImageOps.fit(picture := read_picture(path, ConfigError), (min(picture.size),) * 2)
            metric.update(_pixels(image)[None].to(self.device), real=True)
        return metric

    def _inception_metric(self) -> Any:
        check_torchmetrics(needs_fidelity=True)
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(
            feature=2048, reset_real_features=False, feature_extractor_weights_path=str(self._inception_file())
        )

    def _inception_file(self) -> Path:
        """Find the weights of FID's Inception network, or fetch them."""
        cache_path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION
        path = self._inception or cache_path
        if path.is_file():
            return path
        cure = (
            f"Fetch it from {_ADDRESS} and give --inception FILE, or choose other metrics with --metric. Finished "
            "pictures are kept."
        )
        if self._inception is not None:
            raise ConfigError(f"There is no file {path} of FID's Inception network ({_INCEPTION}, 0.1 GB). {cure}")
        try:
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
                raise OSError("HF_HUB_OFFLINE forbids it")
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(_ADDRESS, str(cache_path), hash_prefix="6726825d", progress=False)
        except (OSError, RuntimeError) as error:  # no network, or another file under that name
            raise ConfigError(
                f"FID's Inception network ({_INCEPTION}, 0.1 GB) cannot be fetched ({error}). {cure}"
            ) from None
        return cache_path

    # Captions and preferences

    def caption(self, image: Any) -> str:
        """Describe a picture."""
        processor, model = self._captioner
        inputs = processor(images=image, return_tensors="pt").to(self.device)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False, num_beams=1)
        return str(processor.decode(tokens[0], skip_special_tokens=True)).strip()

    @cached_property
    def _captioner(self) -> tuple[Any, Any]:
        from transformers import AutoProcessor, BlipForConditionalGeneration

        model = self._had(_BLIP, lambda n: BlipForConditionalGeneration.from_pretrained(n, use_safetensors=True))
        return self._had(_BLIP, AutoProcessor.from_pretrained), model.to(self.device).eval()

    def pick(self, image: Any, prompt: str) -> float:
        """Return the PickScore of a picture."""
        return float(self._pick([image], [prompt])[0])

    @cached_property
    def _pick(self) -> Callable[..., Any]:
        from attnctl.pipelines.hunting.scorers import pick_score

        return self._had(_PICKSCORE, lambda name: pick_score(self.device))

    def _had(self, name: str, load: Callable[[str], Any]) -> Any:
        """Load a part of a network, from this machine or the Hub."""
        try:
            return load(name)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split()).partition(". ")[0][:160].rstrip(".(, ")
            raise ConfigError(
                f"The network {name!r} that measures (about {_SIZES.get(name, 1):g} GB) is not on this machine and "
                f"cannot be fetched ({reason}). Fetch it first: `hf download {name}`, or choose other metrics with "
                "--metric. Finished pictures are kept."
            ) from None


class ToyNetworks(Networks):
    """Tiny networks with fixed random weights: every metric runs without a download, and its figures mean nothing."""

    @cached_property
    def _clip(self) -> tuple[Any, Any]:
        check_torchmetrics()
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

        from attnctl.shapes.load import WEIGHTS

        tokenizer = CLIPTokenizer.from_pretrained(str(WEIGHTS / "text2image" / "tokenizer"), local_files_only=True)
        tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config={
                **tower, "vocab_size": len(tokenizer), "max_position_embeddings": 77,
                "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = CLIPModel(config)
        size = {"height": 32, "width": 32}
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        return _Towers(model).to(self.device).eval(), CLIPProcessor(images, tokenizer)

    def _inception_metric(self) -> Any:
        check_torchmetrics()
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=_Tiles(), reset_real_features=False)

    @cached_property
    def _fid(self) -> Any:
        if self.reference:
            return super()._fid
        import numpy as np

        from attnctl.shapes import render, sample

        metric = self._inception_metric()
        rng = np.random.default_rng(0)
        real = np.stack([render(sample(rng, 2)) for _ in range(8)])
        metric.update(torch.from_numpy(real).permute(0, 3, 1, 2), real=True)
        return metric

    def caption(self, image: Any) -> str:
        from attnctl.shapes import judge

        seen = judge(image)
        things = " and ".join(f"a {t.color} {t.shape or 'shape'}" for t in seen.things[:2]) or "a picture"
        return f"{things} on {seen.background}"

    @cached_property
    def _captioner(self) -> tuple[Any, Any]:
        return None, None

    @cached_property
    def _pick(self) -> Callable[..., Any]:
        return lambda images, prompts: [self.clip_scores(images[:1], prompts[0])[0]]


class _Towers(nn.Module):
    """A CLIP model whose two towers give vectors, as torchmetrics reads them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the vectors of pictures [n, d]."""
        return _vectors(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the vectors of texts [n, d]."""
        return _vectors(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


def _vectors(output: Any) -> torch.Tensor:
    """Return the vectors: transformers 4 gives them alone, transformers 5 among the outputs of the tower."""
    vectors: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return vectors.float()


class _Tiles(nn.Module):
    """Features of a picture at toy size: mean colours of four tiles."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the means of [n, 3, height, width] in uint8 as [n, 12]."""
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def _pixels(image: Any) -> torch.Tensor:
    """Return a picture as uint8 [3, height, width]."""
    import numpy as np

    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
