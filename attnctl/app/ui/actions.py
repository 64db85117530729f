"""What the page does, without a page: a picture plain and controlled, its word maps, its heads."""

from __future__ import annotations

import math
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnctl.app.commands.common import UsageError
from attnctl.app.ui.models import Models
from attnctl.data.files import slug
from attnctl.data.provenance import command_line
from attnctl.data.record import png_bytes, save_image
from attnctl.errors import JudgeError
from attnctl.pipelines.bounds import check_whole
from attnctl.pipelines.generate import Call, Sampled, sample
from attnctl.plans.writing import publish

__all__ = ["Ask", "Compared", "Step", "compare", "heads", "image_marks", "keep", "keep_bytes", "words"]

Step = Callable[[], object]
_YES = {True: "yes", False: "no"}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Say what to make: a prompt, a seed, and how; None leaves a setting to the pipeline.

    Raises:
        UsageError: a value is out of range.
    """

    model: str
    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UsageError("The prompt is empty: say what to show.")
        check_whole("seed", self.seed, UsageError, "Seed")
        if self.steps is not None:
            check_whole("steps", self.steps, UsageError, "Steps")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"Guidance is a finite number, got {self.guidance}.")

    def command(self, controls: Sequence[Any] = (), verb: str = "generate") -> list[str]:
        """Write the command that makes the same."""
        words = ["attnctl", verb, "--model", self.model, "--prompt", self.prompt, "--seed", str(self.seed)]
        for flag, value in (("--steps", self.steps), ("--guidance", self.guidance), ("--negative", self.negative)):
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)] if value not in (None, "") else []
        for name, value in self._options() if verb == "generate" else ():
            words += ["--option", f"{name}={value}"]
        for control in controls:
            said = control.describe()
            words += ["--control", said if '"' in said else said.replace("'", '"')]  # no quotes for a shell to double
        return words

    def call(self, controls: Sequence[Any] = (), recorded: Sequence[str] = ()) -> Call:
        """Describe the pipeline call."""
        return Call(
            prompts=(self.prompt,),
            seeds=(self.seed,),
            steps=self.steps,
            guidance=self.guidance,
            negative=self.negative or None,
            options=dict(self._options()),
            controls=tuple(controls),
            command=command_line(list(recorded)),
        )

    def _options(self) -> tuple[tuple[str, Any], ...]:
        """Return what the demo too hands to this model: a shipped model without padding takes half the time."""
        from attnctl.app.demo import SHEETS

        return next((sheet.options for sheet in SHEETS if sheet.model == self.model), ())


@dataclass(frozen=True)
class Compared:
    """Hold a picture or video made twice.

    Attributes:
        plain: Without control.
        controlled: Under control; None where no control was chosen.
        seconds: What each took.
        report: What the handle says.
        commands: The commands that make the same.
    """

    plain: Sampled
    controlled: Sampled | None
    seconds: tuple[float, ...]
    report: str
    commands: str

    @property
    def runs(self) -> tuple[tuple[str, Sampled, float], ...]:
        """List what was made: name, run, seconds."""
        made = zip(("plain", "controlled"), (self.plain, self.controlled), self.seconds, strict=False)
        return tuple((name, run, seconds) for name, run, seconds in made if run is not None)


def compare(models: Models, ask: Ask, controls: Sequence[Any], step: Step = lambda: None) -> Compared:
    """Make a picture or video plain and under control, with the same noise.

    Args:
        step: Called after every denoising step of both.

    Raises:
        AttnctlError: the model does not take the controls, or the controls the prompt.
    """
    loaded = models.get(ask.model)
    runs, seconds, commands = [], [], []
    for acting in ((), tuple(controls)) if controls else ((),):
        command = ask.command(acting)
        started = time.perf_counter()
        runs.append(sample(loaded, ask.call(acting, command), step))
        seconds.append(time.perf_counter() - started)
        commands.append(shlex.join(command))
    controlled = runs[1] if controls else None
    report = controlled.report if controlled else "No method is chosen: this is the model as it is."
    return Compared(runs[0], controlled, tuple(seconds), report, "\n".join(commands))


def image_marks(done: Compared, prompt: str) -> tuple[list[str], list[list[str]]]:
    """Tabulate what the judge finds: a header, and a row for each picture.

    Pictures of another world than the shapes get their times alone.
    """
    from attnctl.shapes import judge

    header = ["", "colours there", "objects bound", "all right", "the judge sees", "seconds"]
    rows = []
    for name, run, seconds in done.runs:
        try:
            verdict = judge(run.images[0])
            match = verdict.matches(prompt)
        except JudgeError:
            return ["", "seconds"], [[n, f"{s:.1f}"] for n, _, s in done.runs]
        seen = ", ".join(f"{f.color} {f.shape or 'something'}" for f in verdict.things) or "nothing"
        marks = [f"{sum(flags)} of {len(flags)}" for flags in (match.present, match.bound)]
        rows.append([name, *marks, _YES[match.right], f"{seen} on {verdict.background}", f"{seconds:.1f}"])
    return header, rows


def words(models: Models, ask: Ask, chosen: Sequence[str], step: Step = lambda: None) -> dict[str, bytes]:
    """Show where a picture attends to words of its prompt: PNGs by name, "words" and, step by step, "steps".

    Args:
        chosen: Words of the prompt; none for all of them.

    Raises:
        AttnctlError: a word is not in the prompt, or the model attends to no text.
    """
    from attnctl.data.map_pictures import steps_sheet, words_sheet
    from attnctl.processors import Capture

    done = _recorded(models, ask, Capture(words=tuple(chosen) or None, keep=("steps",)), step)
    sheets = {"words": words_sheet(done.images[0], done.maps[0]), "steps": steps_sheet(done.images[0], done.maps[0])}
    return {name: png_bytes(sheet, done.record) for name, sheet in sheets.items()}


def heads(models: Models, ask: Ask, word: str, sites: Any = None, step: Step = lambda: None) -> dict[str, bytes]:
    """Show where every head of every layer looks for a word: a PNG by name, "heads".

    Args:
        word: A word of the prompt.
        sites: Selector of the layers; None for all that read text.

    Raises:
        AttnctlError: the word is not in the prompt, or there are more tiles than a picture should have.
    """
    from attnctl.data.map_pictures import layers_sheet
    from attnctl.processors import Capture

    if not word:
        raise UsageError("Choose a word of the prompt.")
    control = Capture(words=(word,), sites=sites, keep=("heads",))
    _check_size(models, ask, control)
    done = _recorded(models, ask, control, step)
    return {"heads": png_bytes(layers_sheet(done.images[0], done.maps[0], word), done.record)}


def keep(folder: Path, stem: str, done: Sampled) -> str:
    """Write a picture with its record into a new folder of its own, and return its path."""
    path = Path(tempfile.mkdtemp(dir=folder)) / f"{slug(stem)}.png"
    save_image(done.images[0], path, done.record)
    return str(path)


def keep_bytes(folder: Path, name: str, content: bytes) -> str:
    """Write a file into a new folder of its own, and return its path."""
    path = Path(tempfile.mkdtemp(dir=folder)) / name
    publish({path: content})
    return str(path)


_MOST_TILES = 400


def _check_size(models: Models, ask: Ask, control: Any) -> None:
    from attnctl.core.hosts.families import family_of
    from attnctl.core.hosts.listing import denoisers_of, find_sites

    model = next(iter(denoisers_of(models.get(ask.model).pipe).values()))
    sites = control.resolve(find_sites(model), family_of(model))
    across = max(site.heads for site in sites)
    if len(sites) * across > _MOST_TILES:
        raise UsageError(
            f"{len(sites)} layers of up to {across} heads are {len(sites) * across} tiles; at most {_MOST_TILES} are "
            "shown. Name fewer layers, such as mid or up.1."
        )


def _recorded(models: Models, ask: Ask, control: Any, step: Step) -> Sampled:
    return sample(models.get(ask.model), ask.call((control,), ask.command(verb="maps")), step)
