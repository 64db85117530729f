"""`attnctl generate`: images and videos from any diffusers pipeline under control, with records; and again from one."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, say, table
from attnctl.data.files import below, slug
from attnctl.plans.writing import check_free

__all__ = ["Generate"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DEFAULT_MODEL = "shapes:text2image"


@dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Generate images or videos under control, or make a recorded one again with --from."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """What to show; give it several times for several images."""

    model: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: shapes:text2image)")] = (
        None
    )
    """`shapes:text2image`, `shapes:mmdit` or `shapes:video` (shipped), a hub id, or a local folder."""

    control: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="CONTROL")] = ()
    """A method of `attnctl controls`, with options such as 'PAG(scale=3.0, sites="mid")'; several act together."""

    seed: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 0)")] = None
    """Seed of the first image; image i has seed + i."""

    num: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 1)")] = None
    """Images per prompt."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the pipeline's)")] = None
    """Denoising steps."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="(default: the pipeline's)")] = None
    """Classifier-free guidance scale."""

    negative: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """What not to show."""

    height: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the pipeline's)")] = None
    """Height in pixels."""

    width: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the pipeline's)")] = None
    """Width in pixels."""

    batch: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 1)")] = None
    """Images per pipeline call. A record can only be made again with its whole batch."""

    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Another argument of the pipeline, such as true_cfg_scale=4.0."""

    backend: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: auto)")] = None
    """Attention kernel: auto, or a name from `attnctl env`."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The commit or branch of a hub model."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="FILE", help_behavior_hint="")] = None
    """A PNG (or its JSON) made by attnctl: make the same image again and compare."""

    fetch: bool = False
    """Let models and plans that a record or a control names be fetched from the Hub, if they are not here."""

    fps: float = 8.0
    """Frames per second of a video's MP4, which is written beside its film strip."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: str = "auto"
    """auto, float32, float16, bfloat16."""

    out: Path = Path("out")
    """Folder for the images."""

    force: bool = False
    """Overwrite files that are already there."""

    def run(self, command: str) -> Result:
        """Generate anew or from a record."""
        return self._new(command) if self.from_ is None else self._again(self.from_)

    def _new(self, command: str) -> Result:
        call, batch = self._call(command), self._whole("batch", 1)

        from attnctl.data.record import sidecar
        from attnctl.pipelines.generate import makes_videos
        from attnctl.pipelines.models import device_and_dtype, load

        suffix = "".join(f"-{type(control).__name__.lower()}" for control in call.controls)
        named = zip(call.prompts, call.seeds, strict=True)
        paths = [below(self.out, f"{slug(prompt)}{suffix}-{seed}.png") for prompt, seed in named]
        check_free([*paths, *map(sidecar, paths)], force=self.force)
        device, dtype = device_and_dtype(self.device, self.dtype)
        model = self.model or _DEFAULT_MODEL
        say(f"Loading {model} ({device}, {dtype})")
        loaded = load(model, revision=self.revision, device=device, dtype=dtype)
        if makes_videos(loaded.pipe):
            check_free([path.with_suffix(".mp4") for path in paths], force=self.force)
        started = time.perf_counter()
        rows, last = self._write(loaded, call, batch, paths)
        if last.report:
            say(last.report)
        say(f"{len(rows)} image(s) in {time.perf_counter() - started:.1f} s")
        record = last.record.to_dict()
        settings = {key: record[key] for key in ("model", "steps", "guidance", "controls", "sites")}
        return Result({**settings, "images": rows}, _table(rows))

    def _call(self, command: str) -> Any:
        """Check the options, and describe one pipeline call of all images."""
        if not self.prompt or not all(text.strip() for text in self.prompt):
            raise UsageError("Give at least one --prompt that is not empty, or --from FILE.")
        from attnctl.pipelines.bounds import check_pixels_asked

        num, seed = self._whole("num", 1), self._whole("seed", 0)
        prompts = tuple(prompt for prompt in self.prompt for _ in range(num))
        for name in ("batch", "steps", "height", "width"):
            self._whole(name, 1)
        check_pixels_asked(self.width, self.height, UsageError)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"--guidance is a finite number, got {self.guidance}.")

        from attnctl.data.specs import parse_control, parse_option
        from attnctl.errors import ConfigError
        from attnctl.pipelines.generate import Call

        try:
            controls = tuple(parse_control(text) for text in self.control)
            options = dict(parse_option(text) for text in self.option)
        except ConfigError as error:
            raise UsageError(str(error)) from None
        _check_controls(controls, min(len(prompts), self._whole("batch", 1)))
        if not 0 < self.fps <= 240:
            raise UsageError(f"--fps is above 0 and at most 240, got {self.fps}.")
        return Call(
            prompts=prompts,
            seeds=tuple(range(seed, seed + len(prompts))),
            steps=self.steps,
            guidance=self.guidance,
            negative=self.negative,
            width=self.width,
            height=self.height,
            options=options,
            controls=controls,
            backend=self.backend or "auto",
            command=command,
        )

    def _write(self, loaded: Any, call: Any, batch: int, paths: list[Path]) -> tuple[list[dict[str, Any]], Any]:
        """Run batch after batch and write each image; return a row for each, and the last run."""
        from attnctl.data.record import save_image
        from attnctl.pipelines.generate import sample

        rows: list[dict[str, Any]] = []
        done: Any = None
        with _bar(loaded.pipe, self.steps, -(-len(paths) // batch)) as bar:
            for first in range(0, len(paths), batch):
                part = slice(first, first + batch)
                done = sample(loaded, replace(call, prompts=call.prompts[part], seeds=call.seeds[part]), bar.update)
                for i, (image, path) in enumerate(zip(done.images, paths[part], strict=True)):
                    save_image(image, path, replace(done.record, shows=(i,)), force=self.force)
                    rows.append(_row(path, done.record, i))
                    if done.videos:
                        rows[-1] |= _video(done.videos[i], path, self.fps, self.force)
        return rows, done

    def _again(self, source: Path) -> Result:
        fixed = ("prompt", "control", "seed", "num", "steps", "guidance", "negative", "height", "width")
        for name in (*fixed, "batch", "option", "backend", "revision"):
            if getattr(self, name) not in (None, ()):
                raise UsageError(f"--from repeats a record as it is: drop --{name}, or drop --from.")

        from attnctl.data.record import read, save_image, sidecar
        from attnctl.pipelines.generate import differences, makes_videos, sample_again
        from attnctl.pipelines.models import load

        records = read(source)
        names = [
            f"{source.stem[:120]}-again{'' if len(records) == len(r.shows) == 1 else f'-{n}-{i}'}.png"
            for n, r in enumerate(records)
            for i in r.shows
        ]
        paths = [below(self.out, name) for name in names]
        check_free([*paths, *map(sidecar, paths)], force=self.force)
        rows: list[dict[str, Any]] = []
        changed: dict[str, tuple[str, str]] = {}
        for record in records:
            device = record.device if self.device == "auto" else self.device
            dtype = record.dtype if self.dtype == "auto" else self.dtype
            model, recorded = self._model_of(record), self.model is None
            loaded = load(model, revision=_commit(record), device=device, dtype=dtype, recorded=recorded)
            if makes_videos(loaded.pipe):
                these = paths[len(rows) : len(rows) + len(record.shows)]
                check_free([path.with_suffix(".mp4") for path in these], force=self.force)
            with _bar(loaded.pipe, record.steps, 1) as bar:
                done = sample_again(loaded, record, bar.update)
            changed |= differences(record, done.record)
            for i in record.shows:
                path = paths[len(rows)]
                save_image(done.images[i], path, replace(done.record, shows=(i,)), force=self.force)
                if done.videos:
                    _video(done.videos[i], path, self.fps, self.force)
                same = done.record.sha256[i] == record.sha256[i]
                rows.append({**_row(path, done.record, i), "identical": same})
        same = all(row["identical"] for row in rows)
        data = {
            "identical": same,
            "differences": {name: {"recorded": a, "here": b} for name, (a, b) in changed.items()},
            "images": rows,
        }
        say(_verdict(same, changed))
        return Result(data, _table(rows), 0 if same else 1)

    def _whole(self, name: str, default: int) -> int:
        from attnctl.pipelines.bounds import check_whole

        value = getattr(self, name)
        return default if value is None else check_whole(name, value, UsageError, f"--{name}")

    def _model_of(self, record: Any) -> str:
        if self.model is not None:
            return self.model
        local = (record.revision or "").startswith("sha256:") and not record.model.startswith("shapes:")
        if local or not (record.model.startswith("shapes:") or _HUB_ID.fullmatch(record.model)):
            raise UsageError(
                f"The record was made with the local model {record.model!r}: say where it is with --model."
            )
        return str(record.model)


def _check_controls(controls: tuple[Any, ...], pictures: int) -> None:
    """Refuse controls that can do nothing here.

    Raises:
        UsageError: They record maps, edit a picture that exists, or act between pictures where a call makes one.
    """
    from attnctl.processors import Capture, FateZero, FlowEdit, Inject, ShareAttention

    for control in controls:
        name = type(control).__name__
        if isinstance(control, Capture):
            raise UsageError("Capture changes no image, and this command writes no maps: use `attnctl maps`.")
        if isinstance(control, (FateZero, FlowEdit, Inject)):
            raise UsageError(f"{name} edits a picture that exists: use `attnctl edit --method {name.lower()}`.")
        if isinstance(control, ShareAttention) and pictures < 2:
            raise UsageError(
                f"{name} acts between the pictures of one batch, and each call makes one here: give several prompts or "
                "--num 2, and --batch 2, or more."
            )


def _commit(record: Any) -> str | None:
    """Return the hub commit of a record, which a local folder has not.

    Raises:
        UsageError: The record names something else, such as a branch, which would be another model tomorrow.
    """
    revision = record.revision or ""
    if not revision or revision.startswith("sha256:"):
        return None
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise UsageError(
            f"The record names the revision {revision!r:.80}; expected a commit of 40 hexadecimal digits. Say with "
            "--model where the model is."
        )
    return str(revision)


def _verdict(same: bool, changed: dict[str, tuple[str, str]]) -> str:
    changes = "; ".join(f"{name}: recorded {a}, here {b}" for name, (a, b) in changed.items())
    if same:
        return "Identical to the record, pixel for pixel." + (f" (Although {changes}.)" if changes else "")
    why = changes or "nothing that the record knows of; accelerators may need deterministic algorithms"
    return f"Not identical to the record. What differs: {why}."


def _row(path: Path, record: Any, i: int) -> dict[str, Any]:
    return {
        "path": str(path),
        "prompt": record.prompts[i],
        "seed": record.seeds[i],
        "sha256": record.sha256[i],
    }


def _video(frames: tuple[Any, ...], strip: Path, fps: float, force: bool) -> dict[str, str]:
    """Write a video beside its film strip, whose record is that of both."""
    import importlib.util

    import numpy as np

    from attnctl.data.clips import mp4_bytes
    from attnctl.plans.writing import publish

    if importlib.util.find_spec("av") is None:
        say('The film strip is written; an MP4 beside it needs PyAV: pip install "attnctl[video]".')
        return {}
    path = strip.with_suffix(".mp4")
    publish({path: mp4_bytes((np.asarray(frame.convert("RGB")) for frame in frames), fps)}, force=force)
    return {"video": str(path)}


def _table(images: list[dict[str, Any]]) -> str:
    names = [name for name in ("path", "seed", "identical", "prompt") if name in images[0]]
    words = {True: "yes", False: "no"}
    rows = [[words[row[n]] if isinstance(row[n], bool) else row[n] for n in names] for row in images]
    return table(names, rows)


def _bar(pipe: Any, steps: int | None, calls: int) -> Any:
    """Make a progress bar over all steps, on stderr, silent where stderr is no terminal."""
    import inspect

    from tqdm import tqdm

    if steps is None:
        steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return tqdm(total=calls * steps if isinstance(steps, int) else None, unit="step", disable=None, leave=False)
