"""Ask a trained run about new pictures, with a map of what spoke for each answer, and export it to ONNX."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from attnctl.data.files import slug
from attnctl.data.pictures import grid, overlay
from attnctl.data.progress import tracked
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.pipelines.vision.folders import check_pictures, listed, open_picture
from attnctl.pipelines.vision.runs import Run, load_run
from attnctl.plans.writing import check_free, publish

__all__ = ["Answer", "export_onnx", "predict"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a run says of one picture.

    Attributes:
        file: The picture. answer: The class, or None for masks. probability: Of it, 0 to 1.
        shares: Probability of every class, or the share of pixels that it has.
        map: How the map was made, or why there is none.
    """

    file: str
    answer: str | None
    probability: float | None
    shares: dict[str, float]
    map: str


def predict(
    run_folder: Path, pictures: Sequence[Path], out: Path, *, maps: bool = True, force: bool = False
) -> list[Answer]:
    """Write predictions.json, and for every picture a sheet with the answer and a map of what spoke for it.

    A map is Chefer's relevance where the model's tokens allow it, else the last attention times its gradient; for masks
    it is what all places attend to together. Masks are also written as pictures of class numbers.

    Raises: ConfigError for pictures and runs that cannot be read, naming them; FileExists for results that are there.
    """
    run, model = load_run(run_folder)
    files = listed(list(pictures))
    stems = [f"{n:03d}-{slug(path.stem)}" for n, path in enumerate(files)]
    masks = [f"{stem}-mask" for stem in stems] if run.task == "segment" else []
    check_free([out / "predictions.json", *(out / f"{name}.png" for name in (*stems, *masks))], force=force)
    check_pictures(files)
    content: dict[Path, bytes] = {}
    answers = []
    for path, stem in zip(tracked(files, "picture", "predict"), stems, strict=True):
        picture = open_picture(path)
        x = _prepared(run, picture)
        with torch.inference_mode():
            probability = model(x).softmax(1)[0]
        heat, how = _map(run, model, x) if maps else (None, "not asked for")
        if run.task == "segment":
            mask = probability.argmax(0)
            shares = torch.bincount(mask.flatten(), minlength=len(run.classes)).double() / mask.numel()
            numbers = Image.fromarray(mask.byte().numpy()).resize(picture.size, Image.Resampling.NEAREST)
            content[out / f"{stem}-mask.png"] = _png(numbers)
            answer = Answer(file=str(path), answer=None, probability=None, shares=_named(run, shares), map=how)
            tiles, labels = [picture, _colored(mask, picture)], [path.name, "classes"]
        else:
            best = int(probability.argmax())
            answer = Answer(
                file=str(path), answer=run.classes[best], probability=float(probability[best]),
                shares=_named(run, probability), map=how,
            )  # fmt: skip
            tiles, labels = [picture], [f"{answer.answer} {answer.probability:.0%}"]
        if heat is not None:
            tiles.append(overlay(picture, heat, tile=224))
            labels.append(how)
        content[out / f"{stem}.png"] = _png(grid(tiles, 1, len(tiles), column_labels=labels, tile=224))
        answers.append(answer)
    content[out / "predictions.json"] = (json.dumps([asdict(a) for a in answers], indent=2) + "\n").encode()
    publish(content, force=force)
    return answers


def export_onnx(run_folder: Path, path: Path, *, force: bool = False) -> Path:
    """Write a run's model as ONNX with any number of images, input "images" [B, 3, h, w] and output "logits".

    Raises: ConfigError without the packages of attnctl[export]; FileExists where the file is there.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'attnctl[export]'.") from error
    check_free([path], force=force)
    run, model = load_run(run_folder)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(
        model, (torch.zeros(2, 3, *run.size),), dynamo=True, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        program.save(str(Path(folder) / "model.onnx"))
        publish({path: (Path(folder) / "model.onnx").read_bytes()}, force=force)
    return path


def _prepared(run: Run, picture: Image.Image) -> Tensor:
    """Resize and normalise a picture as in testing: [1, 3, h, w]."""
    if run.task == "segment":
        from torchvision.transforms.v2.functional import pil_to_tensor, resize

        image = resize(pil_to_tensor(picture), list(run.size)).float() / 255
        mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (run.mean, run.std))
        return ((image - mean) / std)[None]
    from timm.data import create_transform

    transform: Any = create_transform(
        (3, *run.size), interpolation=run.interpolation, mean=run.mean, std=run.std, crop_pct=run.crop
    )
    return transform(picture)[None]


def _map(run: Run, model: nn.Module, x: Tensor) -> tuple[Tensor | None, str]:
    """Compute a map of what spoke for the answer, and name it; None with the reason where none can be had."""
    from attnctl.backbones.look.attribution import gradient_attention, relevance
    from attnctl.backbones.look.capture import BackboneHandle
    from attnctl.processors import Capture

    try:
        if run.task == "segment":
            with torch.no_grad(), BackboneHandle(model, (Capture(words=("mean",)),)).attach() as handle:
                model(x)
                return handle.maps["mean"][0], "attention, all places"
        try:
            return relevance(model, x)[0], "relevance"
        except UnsupportedModelError:
            return gradient_attention(model, x)[0], "gradient x attention"
    except UnsupportedModelError as error:
        return None, str(error)


def _colored(mask: Tensor, picture: Image.Image) -> Image.Image:
    """Draw class numbers in colours, half transparent over the picture."""
    from matplotlib import colormaps

    colors = torch.tensor(colormaps["tab10"].colors)[mask % 10]  # type: ignore[attr-defined]
    layer = Image.fromarray((colors * 255).byte().numpy()).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture, layer, 0.5)


def _named(run: Run, values: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in zip(run.classes, values, strict=True)}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
