"""One pipeline call, its images and its record."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from attnctl.core.hosts.sizes import cell, largest, usual_size
from attnctl.data.pictures import film_strip
from attnctl.data.provenance import hardware, versions
from attnctl.data.quiet import counting_steps, without_bar
from attnctl.data.record import Record, pixels_sha256
from attnctl.data.specs import control_to_dict
from attnctl.errors import ConfigError, UnsupportedModelError
from attnctl.pipelines.bounds import check_pixels_asked, check_wholes
from attnctl.pipelines.models import Loaded
from attnctl.pipelines.refusals import check_arguments, explained

__all__ = ["INFINITE", "Call", "Sampled", "fitted", "makes_videos", "sample", "scheduler_config", "settings_of"]

_OURS = ("self", "generator", "output_type", "return_dict", "num_images_per_prompt", "callback_on_step_end")
INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


@dataclass(frozen=True, kw_only=True)
class Call:
    """Describe a pipeline call: one prompt and one seed per image; None leaves an option to the pipeline."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    controls: tuple[Any, ...] = ()
    backend: str = "auto"
    command: str = ""


@dataclass(frozen=True)
class Sampled:
    """Hold the images of a call, their record, and what the controls say about themselves and have recorded.

    The image of a video is its film strip: all frames, eight in a row.
    """

    images: tuple[Image.Image, ...]
    record: Record
    report: str = ""
    maps: tuple[Any, ...] = ()
    """The `WordMaps` of each Capture among the controls."""
    videos: tuple[tuple[Image.Image, ...], ...] = ()
    """The frames of each video, where the pipeline makes videos."""


def makes_videos(pipe: Any) -> bool:
    """Tell whether the pipeline makes videos."""
    return not {"num_frames", "video_length"}.isdisjoint(inspect.signature(type(pipe).__call__).parameters)


def sample(loaded: Loaded, call: Call, step: Callable[[], object] = lambda: None) -> Sampled:
    """Run the call, one CPU generator per image, and describe it.

    Args:
        step: Called after every denoising step, for a progress bar.

    Raises:
        ConfigError: the pipeline does not take one of the options.
        UnsupportedModelError: the pipeline returns neither an image nor a video per prompt.
    """
    import torch

    import attnctl
    from attnctl.processors import Capture

    _check_sizes(call)
    pipe = loaded.pipe
    acting = tuple(c for c in call.controls if not isinstance(c, Capture))  # a record holds what made the image
    settings = settings_of(loaded, call)
    options, _ = _options(loaded, call)
    if makes_videos(pipe):
        options["output_type"] = "pil"
    options["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in call.seeds]
    sites, report = _site_names(pipe, acting), ""
    maps: tuple[Any, ...] = ()
    with explained(pipe, call.options), _progress(pipe, options, step):
        if call.controls:
            with attnctl.control(pipe, *call.controls, backend=call.backend) as handle:
                output = pipe(**options)
                report = handle.report()
                maps = tuple(handle.result(c) for c in call.controls if isinstance(c, Capture))
        else:
            output = pipe(**options)
    videos = tuple(map(tuple, getattr(output, "frames", ())))
    images = [film_strip(video) for video in videos] if videos else getattr(output, "images", None)
    if not isinstance(images, list) or len(images) != len(call.prompts):
        raise UnsupportedModelError(f"{type(pipe).__name__} does not return one image or video per prompt.")
    size = videos[0][0].size if videos else images[0].size
    record = Record(
        **settings,
        sha256=tuple(pixels_sha256(image) for image in images),
        shows=tuple(range(len(images))),
        width=size[0],
        height=size[1],
        sites=sites,
        threads=torch.get_num_threads(),
        hardware=hardware(settings["device"]),
        versions=versions(),
        command=call.command,
    )
    return Sampled(tuple(images), record, report, maps, videos)


def fitted(pipe: Any, call: Call, announce: Callable[[str], object] = lambda text: None) -> Call:
    """Return the call with a size that the pipeline takes: a side that is missing is its usual one, both are multiples.

    Args:
        pipe: The pipeline.
        call: The call.
        announce: Called with what becomes of the size, where it changes.

    Raises:
        ConfigError: the size is larger than the model has places for, or one side is missing that nobody knows.
    """
    if call.width is None and call.height is None:
        return call
    name, usual, multiple, most = type(pipe).__name__, usual_size(pipe), cell(pipe) or 1, largest(pipe)
    if usual is None and None in (call.width, call.height):
        raise ConfigError(f"{name} does not say its usual size: give both width and height.")
    given = [side if side is not None else (usual or (0, 0))[i] for i, side in enumerate((call.height, call.width))]
    height, width = (max(multiple, round(side / multiple) * multiple) for side in given)
    if most is not None and most < max(height, width):
        raise ConfigError(f"{name}'s model has places for {most}x{most} pixels; {width}x{height} were asked for.")
    if [height, width] != given:
        announce(
            f"{given[1]}x{given[0]} becomes {width}x{height}: the sides are multiples of {multiple} pixels in {name}."
        )
    return replace(call, width=width, height=height)


def settings_of(loaded: Loaded, call: Call) -> dict[str, Any]:
    """Return what a record of the call will hold that is settled before it runs.

    Raises:
        ConfigError: the pipeline does not take one of the options, or a control cannot be kept in a record.
    """
    from attnctl.processors import Capture

    pipe, (_, defaults) = loaded.pipe, _options(loaded, call)
    return {
        "prompts": call.prompts,
        "seeds": call.seeds,
        "negative": call.negative,
        "steps": defaults["num_inference_steps"],
        "guidance": defaults.get("guidance_scale"),
        "options": {k: v for k, v in loaded.call.items() if k not in ("width", "height")} | dict(call.options),
        "controls": tuple(control_to_dict(c) for c in call.controls if not isinstance(c, Capture)),
        "backend": call.backend,
        "model": loaded.name,
        "revision": loaded.revision,
        "pipeline": type(pipe).__name__,
        "scheduler": scheduler_config(pipe.scheduler),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
    }


def _check_sizes(call: Call) -> None:
    """Raise ConfigError for a call that no machine should begin."""
    check_wholes({"steps": call.steps, "width": call.width, "height": call.height}, ConfigError)
    check_wholes({"num": len(call.prompts)}, ConfigError)
    check_pixels_asked(call.width, call.height, ConfigError)
    if call.guidance is not None and not math.isfinite(call.guidance):
        raise ConfigError(f"guidance={call.guidance!r} is no finite number.")


def _options(loaded: Loaded, call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the pipeline's keyword arguments, and what holds for the options left to the pipeline."""
    pipe = loaded.pipe
    signature = inspect.signature(type(pipe).__call__).parameters
    n = len(call.prompts)
    given = {
        "prompt": list(call.prompts),
        "num_inference_steps": call.steps,
        "guidance_scale": call.guidance,
        "negative_prompt": None if call.negative is None else [call.negative] * n,
        "width": call.width,
        "height": call.height,
    }
    options = dict(loaded.call) | {name: value for name, value in given.items() if value is not None}
    for name in call.options:
        if name in given or name in _OURS:
            raise ConfigError(f"The option {name!r} is set by attnctl itself.")
    options |= call.options
    check_arguments(pipe, options)
    if "generator" not in signature:
        raise UnsupportedModelError(f"{type(pipe).__name__} takes no generator, so no run of it can be repeated.")
    settings = {
        name: options.get(name, signature[name].default)
        for name in ("num_inference_steps", "guidance_scale")
        if name in signature
    }
    if not isinstance(settings.get("num_inference_steps"), int):
        raise ConfigError(f"{type(pipe).__name__} has no default number of steps; give one.")
    return options, settings


@contextlib.contextmanager
def _progress(pipe: Any, options: dict[str, Any], step: Callable[[], object]) -> Iterator[None]:
    """Report every step to `step` instead of the pipeline's own bar; leave the pipeline as it was."""
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        with counting_steps(pipe, step):  # an older pipeline calls nobody, but counts for its own bar
            yield
        return

    def report(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step()
        return tensors

    options["callback_on_step_end"] = report
    with without_bar(pipe):
        yield


def _site_names(pipe: Any, controls: tuple[Any, ...]) -> tuple[tuple[str, ...], ...]:
    """Name the sites of each control, over all denoisers of the pipeline."""
    from attnctl.core.hosts.families import family_of
    from attnctl.core.hosts.listing import denoisers_of, find_sites

    models = denoisers_of(pipe).values() if controls else ()
    hosts = [(find_sites(model), family_of(model)) for model in models]
    return tuple(
        tuple(dict.fromkeys(site.name for sites, family in hosts for site in control.resolve(sites, family)))
        for control in controls
    )


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return what a record keeps of a scheduler: its class and its configuration, as JSON values."""
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    return {
        "_class_name": type(scheduler).__name__,
        **{key: _to_json(value) for key, value in config.items()},
    }


def _to_json(value: Any) -> Any:
    if hasattr(value, "tolist"):  # arrays and tensors of trained betas
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return INFINITE[value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
