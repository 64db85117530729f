"""`attnctl edit`: change a video, a folder of frames or an image with a text prompt."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, say, table
from attnctl.data.files import below, slug

__all__ = ["Edit"]


@dataclass(frozen=True, kw_only=True)
class Edit(Common):
    """Edit a video (or frames, or an image) with a text prompt, by FateZero."""

    input: Annotated[Path, tyro.conf.Positional]
    """A video file, a folder of frames, or an image."""

    source: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What the video shows."""

    target: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What it shall show."""

    model: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "shapes:text2image"
    """`shapes:text2image` (shipped), a hub id, or a local folder: SD 1, SD 2 or SDXL."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The commit or branch of a hub model."""

    mode: Literal["refine", "replace"] = "refine"
    """Align the prompts (refine), or put words in the places of others (replace; equally many words)."""

    cross_replace: float = 0.8
    """Share of the steps in which cross-attention follows the source."""

    self_replace: float = 0.8
    """Share of the steps in which self-attention follows the source."""

    blend: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="WORD")] = ()
    """Word of the source outside which the source is kept; several may be given."""

    blend_target: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="WORD")] = ()
    """Word of the target that marks what may change, for --blend-latents."""

    blend_threshold: float = 0.3
    """Attention to the blend words above this share of its maximum counts as inside."""

    blend_latents: bool = False
    """Keep the source's own latents outside the blend words."""

    weight: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="WORD=X")] = ()
    """Weight of a word of the target, such as watercolor=10."""

    keys: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FRAME")] = ("mid",)
    """Frames that every frame looks at: mid, first, last, previous, self, -1, ...; several may be given."""

    store: Literal["recompute", "qk", "maps"] = "recompute"
    """How the source's attention is had: run again (little memory), or kept."""

    offload: Literal["none", "cpu", "disk"] = "none"
    """Where kept attention goes."""

    steps: int = 50
    """Steps of the inversion and of the edit."""

    guidance: float = 7.5
    """Classifier-free guidance scale of the edit."""

    negative: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """What not to show."""

    start: int = 0
    """First frame."""

    frames: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """Most frames."""

    every: int = 1
    """Take every m-th frame."""

    size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as it is)")] = None
    """Pixels that the shorter side is brought to."""

    window: int = 8
    """Frames that go through the model at once."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: str = "auto"
    """auto, float32, float16, bfloat16."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: out/NAME.mp4)")] = None
    """An .mp4, a .png (one frame), or a folder for PNGs."""

    force: bool = False
    """Overwrite files that are already there."""

    def run(self, command: str) -> Result:
        """Edit and write."""
        self._check()

        from attnctl.data.clips import FileClip
        from attnctl.pipelines import edit_video
        from attnctl.pipelines.models import device_and_dtype, load

        control = self._control()
        clip = FileClip(self.input)  # read before the model: a missing file is said at once
        device, dtype = device_and_dtype(self.device, self.dtype)
        say(f"Loading {self.model} ({device}, {dtype})")
        loaded = load(self.model, revision=self.revision, device=device, dtype=dtype)
        single = clip.count == 1 or self.frames == 1
        name = f"{slug(self.input.stem)}-{slug(self.target)}.{'png' if single else 'mp4'}"
        out = self.out or below(Path("out"), name)
        started = time.perf_counter()
        done = edit_video(
            loaded.pipe,
            clip,
            control,
            steps=self.steps,
            guidance_scale=self.guidance,
            negative_prompt=self.negative,
            start=self.start,
            count=self.frames,
            every=self.every,
            size=self.size,
            window=self.window,
            offload=self.offload,
            out=out,
            force=self.force,
            keep=False,
            model=loaded.name,
            command=command,
        )
        if done.report:
            say(done.report)
        count = done.record["frames"][1]
        say(f"{count} frame(s) in {time.perf_counter() - started:.1f} s")
        strip = out.with_name(f"{out.stem}-strip.png")
        rows = [[str(out), count, f"{done.record['width']}x{done.record['height']}", str(strip)]]
        data = {"path": str(out), "strip": str(strip), "record": done.record}
        return Result(data, table(("path", "frames", "size", "strip"), rows))

    def _check(self) -> None:
        from attnctl.pipelines.bounds import check_wholes

        names = ("steps", "every", "window", "frames", "size", "start")
        check_wholes({name: getattr(self, name) for name in names}, UsageError, "--")
        if not math.isfinite(self.guidance):
            raise UsageError(f"--guidance is a finite number, got {self.guidance}.")

    def _control(self) -> Any:
        """Make the control of the options."""
        from attnctl.errors import ConfigError
        from attnctl.processors import FateZero

        blend: Any = (self.blend, self.blend_target) if self.blend_target else self.blend
        try:
            return FateZero(
                source=self.source,
                target=self.target,
                mode=self.mode,
                cross_replace=self.cross_replace,
                self_replace=self.self_replace,
                blend_words=blend or None,
                blend_threshold=self.blend_threshold,
                blend_latents=self.blend_latents,
                equalizer=dict(map(_weight, self.weight)) or None,
                keys=tuple(map(_key, self.keys)),
                store=self.store,
            )
        except ConfigError as error:
            raise UsageError(str(error)) from None


def _weight(text: str) -> tuple[str, float]:
    word, equals, value = text.rpartition("=")
    try:
        if not equals or not word:
            raise ValueError
        return word, float(value)
    except ValueError:
        raise UsageError(f"--weight is a word and a number, such as watercolor=10; got {text!r}.") from None


def _key(text: str) -> str | int:
    try:
        return int(text)
    except ValueError:
        return text
