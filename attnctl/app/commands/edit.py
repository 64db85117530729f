"""`attnctl edit`: change a video, a folder of frames or an image with a text prompt."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, say, table
from attnctl.data.files import below, slug
from attnctl.plans.writing import check_free

__all__ = ["Edit"]

_FAMILY = "(default: the model family's)"
_METHODS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("strength", "source_guidance"), ("flowedit",)),
    **dict.fromkeys(("inject", "parts"), ("inject",)),
    **dict.fromkeys(("sites", "solver", "noise", "check"), ("fatezero", "inject")),
    **dict.fromkeys(
        (
            "mode", "cross_replace", "self_replace", "blend", "blend_target", "blend_threshold", "blend_latents",
            "weight", "keys", "store", "offload", "mask",
        ),
        ("fatezero",),
    ),
}  # fmt: skip
"""The methods that each option is for; those that are missing are for all."""


@dataclass(frozen=True, kw_only=True)
class Edit(Common):
    """Edit a video (or frames, or an image) with a text prompt: by FateZero, injection or FlowEdit."""

    input: Annotated[Path, tyro.conf.Positional]
    """A video file, a folder of frames, or an image."""

    source: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What the video shows."""

    target: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What it shall show."""

    model: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "shapes:text2image"
    """`shapes:text2image`, `shapes:mmdit`, `shapes:videodit` (shipped), a hub id, or a folder: UNet or transformer."""

    method: Literal["fatezero", "flowedit", "inject"] = "fatezero"
    """How: by the inverted source's attention, without inverting (transformers), or by its values at chosen blocks."""

    solver: Literal["fireflow", "rf_solver", "euler", "uniinv", "rf_inversion"] = "fireflow"
    """What inverts the source along a transformer's flow."""

    noise: Annotated[
        Literal["own", "drawn"] | None, tyro.conf.arg(metavar="{own,drawn}", help_behavior_hint=_FAMILY)
    ] = None
    """Where the inverted source's noise begins: what the model sees in it; or drawn, for flat sources (drawings)."""

    mask: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """A picture of the frames' size: outside what is white, the source's latents are kept."""

    check: bool = False
    """Measure how well the inversion alone gives the source back (transformers)."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The commit or branch of a hub model."""

    mode: Literal["refine", "replace"] = "refine"
    """Align the prompts (refine), or put words in the places of others (replace; equally many words)."""

    cross_replace: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint=_FAMILY)] = None
    """Share of the steps in which cross-attention follows the source."""

    self_replace: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint=_FAMILY)] = None
    """Share of the steps in which self-attention follows the source."""

    strength: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint=_FAMILY)] = None
    """Share of the steps that edit, for --method flowedit."""

    source_guidance: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint=_FAMILY)] = None
    """Guidance of the source's prompt, for --method flowedit."""

    inject: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="(default: 0.2)")] = None
    """Share of the steps in which the source is injected, for --method inject."""

    parts: Annotated[str, tyro.conf.arg(metavar="LETTERS")] = "v"
    """What --method inject takes: some of q, k and v."""

    sites: Annotated[str | None, tyro.conf.arg(metavar="SELECTOR", help_behavior_hint=_FAMILY)] = None
    """The layers that are edited."""

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

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_FAMILY)] = None
    """Steps of the inversion and of the edit."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint=_FAMILY)] = None
    """Guidance scale of the edit."""

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

    window: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 8, or all)")] = None
    """Frames that go through the model at once: 8 on UNets, all on transformers, whose windows are edited apart."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: str = "auto"
    """auto, float32, float16, bfloat16."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: out/NAME.mp4)")] = None
    """An .mp4 (the source's sound goes with it), a .gif, a .png (one frame), or a folder for PNGs."""

    force: bool = False
    """Overwrite files that are already there."""

    def run(self, command: str) -> Result:
        """Edit and write."""
        self._check()
        importing()

        from attnctl.data.clips import FileClip
        from attnctl.pipelines import edit_video
        from attnctl.pipelines.models import device_and_dtype, load

        fields = self._fields()
        clip = FileClip(self.input)  # read before the model: a missing file is said at once
        device, dtype = device_and_dtype(self.device, self.dtype)
        single = clip.count == 1 or self.frames == 1
        name = f"{slug(self.input.stem)}-{slug(self.target)}.{'png' if single else 'mp4'}"
        out = self.out or below(Path("out"), name)
        check_free([out, out.with_suffix(".json"), out.with_name(f"{out.stem}-strip.png")], force=self.force)
        say(f"Loading {self.model} ({device}, {dtype})")
        loaded = load(self.model, revision=self.revision, device=device, dtype=dtype)
        started = time.perf_counter()
        done = edit_video(
            loaded.pipe,
            clip,
            method=self.method,
            solver=self.solver,
            noise=self.noise,
            mask=self.mask,
            check=self.check,
            announce=say,
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
            **fields,
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
        for name in ("source", "target"):
            if not getattr(self, name).strip():
                what = "the video shows" if name == "source" else "it shall show"
                raise UsageError(f"--{name} is empty: say what {what}.")
        from attnctl.pipelines.bounds import check_wholes

        names = ("steps", "every", "window", "frames", "size", "start")
        check_wholes({name: getattr(self, name) for name in names}, UsageError, "--")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"--guidance is a finite number, got {self.guidance}.")
        for field in dataclasses.fields(self):
            methods = _METHODS_OF.get(field.name, (self.method,))
            if self.method not in methods and getattr(self, field.name) != field.default:
                raise UsageError(
                    f"--{field.name.replace('_', '-')} is for --method {' or '.join(methods)}, and the method is "
                    f"{self.method}: leave it out, or choose another method."
                )

    def _fields(self) -> dict[str, Any]:
        """Return the fields of the control that the options say, and refuse those that cannot be."""
        from attnctl.errors import ConfigError
        from attnctl.processors import FateZero, FlowEdit, Inject

        fields: dict[str, Any] = {"source": self.source, "target": self.target}
        given: dict[str, Any]
        if self.method == "flowedit":
            cls: Any = FlowEdit
            given = {"strength": self.strength, "source_scale": self.source_guidance}
        elif self.method == "inject":
            cls, given = Inject, {"stop": self.inject, "parts": tuple(self.parts), "sites": self.sites}
        else:
            cls = FateZero
            blend: Any = (self.blend, self.blend_target) if self.blend_target else self.blend
            given = {"cross_replace": self.cross_replace, "self_replace": self.self_replace, "sites": self.sites}
            fields |= {
                "mode": self.mode,
                "blend_words": blend or None,
                "blend_threshold": self.blend_threshold,
                "blend_latents": self.blend_latents,
                "equalizer": dict(map(_weight, self.weight)) or None,
                "keys": tuple(map(_key, self.keys)),
                "store": self.store,
            }
        fields |= {name: value for name, value in given.items() if value is not None}
        try:
            cls(**fields)
        except ConfigError as error:
            raise UsageError(str(error)) from None
        return fields


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
