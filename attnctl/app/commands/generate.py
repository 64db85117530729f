"""`attnctl generate`: images and videos from any diffusers pipeline under control, with records; and again from one."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, say
from attnctl.app.commands.pictures import check_controls, pictures_table, write_pictures
from attnctl.data.controls import homes
from attnctl.data.files import below, slug
from attnctl.plans.writing import check_free

__all__ = ["Generate"]

_DEFAULT_MODEL = "shapes:text2image"


_ELSEWHERE = {"Capture", "FateZero", "FlowEdit", "IdentityBank", "Inject", "LatentGuidance"}  # other commands', parts
CONTROLS = ", ".join(sorted(homes().keys() - _ELSEWHERE, key=str.lower))  # --help imports none of them
_CONTROL_HELP = (
    "A method with options, such as 'PAG(scale=3.0, sites=\"mid\")'; several act together. `attnctl controls` says "
    f"what each does, `attnctl controls PAG` what one takes: {CONTROLS}."
)


@dataclass(frozen=True, kw_only=True)
class Generate(Common):
    """Generate images or videos under control, or make a recorded one again with --from."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """What to show; give it several times for several images."""

    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """A list of prompts instead: .txt with one per line, or .jsonl or .csv, whose lines may have a seed, num, steps,
    guidance, negative, width, height and control of their own. Every prompt gets the same seeds, a table lists all
    pictures, and what is there with an equal record is not made again. `accelerate launch` shares the list."""

    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN [COLUMN ...]", help_behavior_hint="")] = ()
    """Make every prompt several times, with the same seeds: "plain", 'PAG(scale=3)', 'PAG + SEG'; one sheet each."""

    model: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: shapes:text2image)")] = (
        None
    )
    """`shapes:text2image`, `shapes:mmdit`, `shapes:video`, `shapes:videodit` (shipped), a hub id, or a local folder."""

    control: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="CONTROL", help=_CONTROL_HELP)
    ] = ()

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
        if self.from_ is not None:
            from attnctl.app.commands.again import again

            return again(self, self.from_)
        if self.prompts is None and not self.compare:
            return self._new(command)

        from attnctl.app.commands.batch import make_many

        return make_many(self, command, self.model or _DEFAULT_MODEL)

    def _new(self, command: str) -> Result:
        call, batch = self.described(command), self.whole("batch", 1)

        from attnctl.data.record import sidecar
        from attnctl.pipelines.generate import fitted, makes_videos
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
        call = fitted(loaded.pipe, call, say)
        started = time.perf_counter()
        rows, last = self._write(loaded, call, batch, paths)
        if last.report:
            say(last.report)
        say(f"{len(rows)} image(s) in {time.perf_counter() - started:.1f} s")
        record = last.record.to_dict()
        settings = {key: record[key] for key in ("model", "steps", "guidance", "controls", "sites")}
        return Result({**settings, "images": rows}, pictures_table(rows))

    def described(self, command: str, listed: tuple[str, ...] = ()) -> Any:
        """Check the options, and describe one pipeline call of all images; of none, where a file lists the prompts."""
        if not listed and not (self.prompt and all(text.strip() for text in self.prompt)):
            raise UsageError("Give at least one --prompt that is not empty, --prompts FILE, or --from FILE.")
        from attnctl.pipelines.bounds import check_pixels_asked

        num, seed = self.whole("num", 1), self.whole("seed", 0)
        prompts = listed or tuple(prompt for prompt in self.prompt for _ in range(num))
        for name in ("batch", "steps", "height", "width"):
            self.whole(name, 1)
        check_pixels_asked(self.width, self.height, UsageError)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"--guidance is a finite number, got {self.guidance}.")

        importing()
        from attnctl.data.specs import parse_control, parse_option
        from attnctl.errors import ConfigError
        from attnctl.pipelines.generate import Call

        try:
            controls = tuple(parse_control(text) for text in self.control)
            options = dict(parse_option(text) for text in self.option)
        except ConfigError as error:
            raise UsageError(str(error)) from None
        if not listed and not self.compare:
            check_controls(controls, min(len(prompts), self.whole("batch", 1)))
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
        from attnctl.pipelines.generate import sample
        from attnctl.pipelines.stepping import step_bar

        rows: list[dict[str, Any]] = []
        done: Any = None
        with step_bar(loaded.pipe, self.steps, -(-len(paths) // batch), "generate") as bar:
            for first in range(0, len(paths), batch):
                part = slice(first, first + batch)
                bar.describe(f"picture {first + 1} of {len(paths)}")
                done = sample(loaded, replace(call, prompts=call.prompts[part], seeds=call.seeds[part]), bar.update)
                rows += write_pictures(done, paths[part], self.fps, self.force)
        return rows, done

    def whole(self, name: str, default: int) -> int:
        """Return the whole number of an option, in its bounds, or what holds where it is not given."""
        from attnctl.pipelines.bounds import check_whole

        value = getattr(self, name)
        return default if value is None else check_whole(name, value, UsageError, f"--{name}")
