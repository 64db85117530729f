"""Classification and segmentation jobs: their data, one short run each, refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnctl
from attnctl.errors import ConfigError
from attnctl.pipelines.vision.fitting import fit
from attnctl.pipelines.vision.segmentation import CLASSES, scene_masks, segment


def test_scene_masks_fit_their_images() -> None:
    images, masks = scene_masks(16, seed=3)
    again, _ = scene_masks(16, seed=3)
    assert torch.equal(images, again)
    assert set(masks.unique().tolist()) <= set(range(len(CLASSES)))
    for image, mask in zip(images, masks, strict=True):
        background = image[:, mask == 0].median(dim=1).values
        inside = (image[:, mask > 0] - background[:, None]).abs().sum(0)
        assert (inside > 0.1).double().mean() > 0.95


def test_fit_learns_and_repeats() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    curves = []
    for _ in range(2):
        model = nn.Linear(4, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        curves.append(fit(model, x, y, F.cross_entropy, epochs=5, batch=16, lr=0.1, quiet=True))
        assert not model.training
    assert curves[0] == curves[1]
    assert curves[0][-1] < 0.5 * curves[0][0]
    with pytest.raises(ConfigError, match="epochs=0"):
        fit(nn.Linear(4, 2), x, y, F.cross_entropy, epochs=0)
    with pytest.raises(ConfigError, match="one target an image"):
        fit(nn.Linear(4, 2), x, y[:3], F.cross_entropy)


def test_classify(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from attnctl.pipelines.vision.classification import classify

    done = classify("biformer_micro", epochs=2, out=tmp_path, quiet=True)
    assert done.accuracy > 0.5
    assert all(f.stat().st_size > 0 for f in done.files)


@pytest.mark.parametrize("missing", ["sklearn.datasets", "matplotlib.figure"])
def test_a_missing_package_is_said_before_the_training(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnctl.pipelines.vision.classification import classify

    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("attnctl.pipelines.vision.classification.fit", None)  # it is not reached
    with pytest.raises(ConfigError, match=r"pip install 'attnctl\[(vision|plot)\]'"):
        classify("biformer_micro", out=tmp_path)


def test_segment(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("torchmetrics")
    done = segment("biformer_micro", n_train=64, n_test=8, epochs=1, out=tmp_path, quiet=True)
    assert 0 < done.mean_iou <= 1
    assert all(f.stat().st_size > 0 for f in done.files)
    with pytest.raises(ConfigError, match="'unet'"):
        segment("biformer_micro", "unett")


@pytest.mark.parametrize(
    ("encoder", "kind", "options"), [("pvt_v2_b0", "agent", {"num_agents": 4}), ("pvt_v2_b0", "inline", {})]
)
def test_segment_on_a_swapped_encoder(encoder: str, kind: str, options: dict[str, int]) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("torchmetrics")
    sizes = {"n_train": 32, "n_test": 4, "epochs": 1}
    done = segment(encoder, "fpn", swap=kind, swap_options=options, quiet=True, **sizes)
    report = attnctl.swap_report(done.model.encoder.model)
    assert (report.kind, len(report.sites)) == (kind, 8)
    assert 0 < done.mean_iou <= 1
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        swapped = done.model(x)
        attnctl.unswap(done.model.encoder.model)
        assert not torch.equal(done.model(x), swapped)
