"""What is measured on finished pictures: FID and CLIP scores by torchmetrics, captions, motion, the judge of shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from attnctl.errors import ConfigError
from attnctl.pipelines.reproduce.networks import Networks
from attnctl.pipelines.reproduce.store import Piece

__all__ = ["METRICS", "Measure", "Metric", "by_name"]

Measure: TypeAlias = Callable[[Sequence[Piece], Sequence[Piece], Networks], "list[float] | float"]
"""Called with a variant's pieces, those of the first variant and the networks; a number per piece, or one for all."""

_MOST_FRAMES = 8  # of a video that CLIP looks at
_BATCH = 32


@dataclass(frozen=True)
class Metric:
    """One thing to measure.

    Attributes:
        name: What the command line calls it.
        about: What it is, with its unit.
        better: "higher", "lower", or "" where neither is.
        measure: How it is measured.
        pairs: Whether it compares with the first variant, which then has none.
        networks: What it loads: some of "clip", "inception", "blip", "pickscore".
        torchmetrics: Whether it needs torchmetrics.
        share: Whether its numbers are yes or no, 1 or 0.
        digits: Digits behind the point in tables.
    """

    name: str
    about: str
    better: str
    measure: Measure
    pairs: bool = False
    networks: tuple[str, ...] = ()
    torchmetrics: bool = False
    share: bool = False
    digits: int = 3


def _fid(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> float:
    if len(pieces) < 2:
        raise ConfigError(f"FID needs two pictures or more; there are {len(pieces)}.")
    return networks.fid(_batches(image for piece in pieces for image in piece.images()))


def _batches(images: Iterator[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for image in images:
        if batch and (len(batch) == _BATCH or image.size != batch[0].size):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def _clip(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    return [_mean(networks.clip_scores(_some(p), p.asked.prompt)) for p in pieces]


def _clip_negative(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    return [_mean(networks.clip_scores(_some(p), p.asked.extra)) for p in pieces]


def _clip_min(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    return [min(_mean(networks.clip_scores(_some(p), part)) for part in p.asked.prompt.split(" and ")) for p in pieces]


def _caption(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    return [networks.text_scores(networks.caption(_some(p)[0]), p.asked.prompt) / 100 for p in pieces]


def _pickscore(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    return [networks.pick(_some(p)[0], p.asked.prompt) for p in pieces]


def _right(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    from attnctl.shapes import judge, judge_clip

    return [
        float((judge(p.images()[0]) if p.frames == 1 else judge_clip(p.images())).matches(p.asked.prompt).right)
        for p in pieces
    ]


def _psnr(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def decibels(a: Any, b: Any) -> float:
        return min(100.0, float(peak_signal_noise_ratio(a, b, data_range=1.0)))

    return [decibels(_tensor(p), _tensor(q)) for p, q in _paired(pieces, first)]


def _ssim(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    from torchmetrics.functional.image import structural_similarity_index_measure

    return [
        float(structural_similarity_index_measure(_tensor(p), _tensor(q), data_range=1.0))  # type: ignore[arg-type]
        for p, q in _paired(pieces, first)
    ]


def _seconds(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    return [p.seconds for p in pieces if p.seconds is not None]


def _gigabytes(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    return [p.gigabytes for p in pieces if p.gigabytes is not None]


def _motion(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    from attnctl.data.motion import flow

    return [flow(p.video()).motion_mean for p in pieces]


def _dynamic(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    from attnctl.data.motion import dynamic

    return [float(dynamic(p.video())) for p in pieces]


def _warp(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    from attnctl.data.motion import warp_error

    return [x for x in (warp_error(p.video())[0] for p in pieces) if np.isfinite(x)]


def _flicker(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    from attnctl.data.motion import temporal_flicker

    return [temporal_flicker(p.video()) for p in pieces]


def _temporal(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    return [_mean(networks.image_scores(frames[:-1], frames[1:])) / 100 for frames in (p.images() for p in pieces)]


def _accuracy(pieces: Sequence[Piece], first: Sequence[Piece], networks: Networks) -> list[float]:
    def share(piece: Piece) -> float:
        frames = piece.images()
        target = networks.clip_scores(frames, piece.asked.prompt)
        source = networks.clip_scores(frames, piece.asked.extra)
        return _mean([float(a >= b) for a, b in zip(target, source, strict=True)])

    return [share(p) for p in pieces]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _some(piece: Piece) -> list[Any]:
    """Return a picture, or frames of a video that are spread over it."""
    images = piece.images()
    step = max(1, len(images) // _MOST_FRAMES)
    return images[::step][:_MOST_FRAMES]


def _tensor(piece: Piece) -> Any:
    """Return frames as floats in 0..1 [frames, 3, height, width]."""
    import torch

    return torch.from_numpy(piece.video().copy()).permute(0, 3, 1, 2).float() / 255


def _paired(pieces: Sequence[Piece], first: Sequence[Piece]) -> Iterator[tuple[Piece, Piece]]:
    others = {q.asked.index: q for q in first}
    return ((p, others[p.asked.index]) for p in pieces if p.asked.index in others)


_ALL = (
    Metric("fid", "FID to real pictures", "lower", _fid, networks=("inception",), torchmetrics=True, digits=2),
    Metric("clip", "CLIP score", "higher", _clip, networks=("clip",), torchmetrics=True, digits=2),
    Metric("clip_min", "CLIP score of the object that is shown worst", "higher", _clip_min, networks=("clip",),
           torchmetrics=True, digits=2),
    Metric("clip_negative", "CLIP score of the negative prompt", "lower", _clip_negative, networks=("clip",),
           torchmetrics=True, digits=2),
    Metric("caption", "similarity of a BLIP caption and the prompt", "higher", _caption, networks=("clip", "blip"),
           torchmetrics=True),
    Metric("pickscore", "PickScore", "higher", _pickscore, networks=("pickscore",), digits=2),
    Metric("right", "share that the judge of shapes finds right", "higher", _right, share=True),
    Metric("psnr", "PSNR to the first variant, dB", "higher", _psnr, pairs=True, torchmetrics=True, digits=2),
    Metric("ssim", "SSIM to the first variant", "higher", _ssim, pairs=True, torchmetrics=True),
    Metric("seconds", "seconds per picture", "lower", _seconds, digits=2),
    Metric("gigabytes", "most GPU memory in use, GB per picture", "lower", _gigabytes, digits=2),
    Metric("motion", "flow, pixels per frame", "", _motion, digits=2),
    Metric("dynamic", "share of dynamic videos (DIS flow)", "", _dynamic, share=True),
    Metric("warp", "warp error", "lower", _warp, digits=5),
    Metric("flicker", "temporal flickering of VBench", "higher", _flicker, digits=4),
    Metric("temporal", "similarity of consecutive frames in CLIP", "higher", _temporal, networks=("clip",),
           torchmetrics=True),
    Metric("accuracy", "share of frames nearer to the target's text in CLIP", "higher", _accuracy, networks=("clip",),
           torchmetrics=True),
)  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def by_name(names: Sequence[str]) -> tuple[Metric, ...]:
    """Return metrics by their names.

    Raises:
        ConfigError: One is unknown.
    """
    from attnctl.errors import choice

    return tuple(METRICS[choice(name, "metric", list(METRICS))] for name in names)
