"""One pipeline call, its images and its record; and the same call again, from the record."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from attnctl.data.pictures import film_strip
from attnctl.data.provenance import hardware, versions
from attnctl.data.quiet import without_bar
from attnctl.data.record import Record, RecordError, pixels_sha256
from attnctl.data.specs import control_from_dict, control_to_dict
from attnctl.errors import ConfigError, UnsupportedModelError, nearest
from attnctl.pipelines.bounds import MOST, check_pixels_asked, check_wholes
from attnctl.pipelines.models import Loaded

__all__ = ["Call", "Sampled", "differences", "makes_videos", "sample", "sample_again"]

_OURS = ("self", "generator", "output_type", "return_dict", "num_images_per_prompt", "callback_on_step_end")
_INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


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
    controls = tuple(control_to_dict(control) for control in acting)
    options, defaults = _options(pipe, call)
    if makes_videos(pipe):
        options["output_type"] = "pil"
    options["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in call.seeds]
    sites, report = _site_names(pipe, acting), ""
    maps: tuple[Any, ...] = ()
    with _progress(pipe, options, step):
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
    device = str(pipe.device)
    record = Record(
        prompts=call.prompts,
        seeds=call.seeds,
        sha256=tuple(pixels_sha256(image) for image in images),
        shows=tuple(range(len(images))),
        negative=call.negative,
        steps=defaults["num_inference_steps"],
        guidance=defaults.get("guidance_scale"),
        options=dict(call.options),
        width=size[0],
        height=size[1],
        controls=controls,
        sites=sites,
        backend=call.backend,
        model=loaded.name,
        revision=loaded.revision,
        pipeline=type(pipe).__name__,
        scheduler=_scheduler_config(pipe.scheduler),
        dtype=str(pipe.dtype).removeprefix("torch."),
        device=device,
        threads=torch.get_num_threads(),
        hardware=hardware(device),
        versions=versions(),
        command=call.command,
    )
    return Sampled(tuple(images), record, report, maps, videos)


def sample_again(loaded: Loaded, record: Record, step: Callable[[], object] = lambda: None) -> Sampled:
    """Make the images of a record again, with its scheduler and its number of threads.

    Raises:
        RecordError: the record was made with another pipeline class or an unknown scheduler.
    """
    import torch

    pipe = loaded.pipe
    check_wholes({"threads": max(1, record.threads)}, RecordError, "the record's ")
    if type(pipe).__name__ != record.pipeline:
        raise RecordError(f"The record was made with {record.pipeline}, but {loaded.name} is a {type(pipe).__name__}.")
    if _scheduler_config(pipe.scheduler) != record.scheduler:
        pipe.scheduler = _scheduler(record.scheduler)
    sized = {"width", "height"} <= set(inspect.signature(type(pipe).__call__).parameters)
    call = Call(
        prompts=record.prompts,
        seeds=record.seeds,
        steps=record.steps,
        guidance=record.guidance,
        negative=record.negative,
        width=record.width if sized else None,
        height=record.height if sized else None,
        options=record.options,
        controls=tuple(control_from_dict(control) for control in record.controls),
        backend=record.backend,
        command=record.command,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, record.threads))
    try:
        again = sample(loaded, call, step)
    finally:
        torch.set_num_threads(threads)
    return replace(again, record=replace(again.record, shows=record.shows))


def differences(before: Record, after: Record) -> dict[str, tuple[str, str]]:
    """Name what differs between two runs of one record and can change pixels."""
    changes: dict[str, tuple[str, str]] = {}
    for name in sorted({*before.versions, *after.versions}):
        changes[name] = before.versions.get(name, "not installed"), after.versions.get(name, "not installed")
    for name in ("revision", "device", "dtype", "threads", "hardware", "sites"):
        changes[name] = str(getattr(before, name)), str(getattr(after, name))
    return {name: (a, b) for name, (a, b) in changes.items() if a != b}


def _check_sizes(call: Call) -> None:
    """Raise ConfigError for a call that no machine should begin."""
    check_wholes({"steps": call.steps, "width": call.width, "height": call.height}, ConfigError)
    check_wholes({"num": len(call.prompts)}, ConfigError)
    check_pixels_asked(call.width, call.height, ConfigError)
    if call.guidance is not None and not math.isfinite(call.guidance):
        raise ConfigError(f"guidance={call.guidance!r} is no finite number.")


def _options(pipe: Any, call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the pipeline's keyword arguments, and what holds for the options left to the pipeline."""
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
    options = {name: value for name, value in given.items() if value is not None}
    for name in call.options:
        if name in given or name in _OURS:
            raise ConfigError(f"The option {name!r} is set by attnctl itself.")
    options |= call.options
    for name in options:
        if name not in signature:
            raise ConfigError(f"{type(pipe).__name__} takes no {name!r}." + nearest(name, signature))
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
        yield  # an older pipeline shows its own bar
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


def _scheduler_config(scheduler: Any) -> dict[str, Any]:
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
        return _INFINITE[value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _scheduler(config: Mapping[str, Any]) -> Any:
    import diffusers

    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise RecordError(f"The record's scheduler {name!r:.80} is not one of diffusers' schedulers.")
    for key, value in config.items():
        if isinstance(value, int) and abs(value) > MOST["num_train_timesteps"]:
            raise RecordError(
                f"The record's scheduler has {key}={value}; expected {MOST['num_train_timesteps']} at most."
            )
    infinite = {text: value for value, text in _INFINITE.items()}
    options = {
        key: infinite.get(value, value) if isinstance(value, str) else value
        for key, value in config.items()
        if not key.startswith("_")
    }
    try:
        return cls.from_config(options)  # type: ignore[attr-defined]
    except Exception as error:  # whatever comes of values that it never had
        reason = " ".join(str(error).split())[:200]
        raise RecordError(f"The record's scheduler {name} cannot be made ({reason}): the record is damaged.") from None
