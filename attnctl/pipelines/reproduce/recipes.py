"""Recipes: the settings of a paper's headline experiment, read from one TOML file per method.

Keys at the top of a file hold for every experiment in it. `[toy]` holds what changes at toy size, where a shipped or
random model takes the place of the paper's; `[experiments.NAME]` and `[experiments.NAME.toy]` override both.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from attnctl.errors import ConfigError, nearest

__all__ = ["Experiment", "Variant", "experiments", "methods"]

FOLDER = Path(__file__).parent / "experiments"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way in which an experiment makes its pictures.

    Attributes:
        name: What tables call it.
        controls: Controls as the command line takes them; `{words}` stands for a prompt's words, `{extra}` for the text
            beside it, `{plan}` for the folder of the calibrated plan, `{heads}` for the heads to perturb.
        guidance: Classifier-free guidance scale, where it is not the experiment's.
        rows: Rows that the denoiser computes per picture and step.
        density: Share of the blocks that a plan keeps, where one is calibrated first.
    """

    name: str
    controls: tuple[str, ...] = ()
    guidance: float | None = None
    rows: float = 1.0
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment of a paper.

    Attributes:
        method: Name of the recipe's file.
        name: Name of the experiment in it.
        title: The method, as its paper calls it.
        paper: arXiv id.
        about: What is run.
        model: Hub id, or a shipped or random model at toy size.
        adapter: Hub id of a motion adapter, or "".
        dtype: Precision on a GPU.
        gpu: Whether the experiment needs a GPU to end within a day or so.
        weights_gb: Size of the download in gigabytes, about.
        memory_gb: Memory of the accelerator that it takes in gigabytes, about.
        row_tflop: Work of the denoiser per row and step in TFLOP; 0 where it is timed.
        prompts: Name of a shipped list, "none" for the empty prompt, "clips" for a user's clips.
        prefix: Text before every prompt.
        pictures: Pictures (videos, clips) of each variant; 0 for one per clip.
        seeds: Pictures of each prompt.
        batch: Pictures in one pipeline call.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; None leaves it to the pipeline.
        height: Height in pixels; None leaves it to the pipeline.
        width: Width in pixels; None leaves it to the pipeline.
        negative: Negative prompt.
        options: Other arguments of the pipeline's call.
        heads: Labels of the heads that `{heads}` stands for.
        block: Tokens in a block of a calibrated plan.
        clip: Hub id of the CLIP model that measures.
        metrics: What is measured; names of `attnctl.pipelines.reproduce.metrics.METRICS`.
        variants: The first is what the others are compared with.
        figures: Published figures by variant and metric; a figure that is missing is not given.
        source: Where the figures are from.
        note: How the recipe differs from the paper, as far as that is known.
        toy: Whether this is the experiment at toy size.
    """

    method: str
    name: str
    title: str
    paper: str
    about: str
    model: str
    metrics: tuple[str, ...]
    variants: tuple[Variant, ...]
    steps: int
    pictures: int
    adapter: str = ""
    dtype: str = "float16"
    gpu: bool = True
    weights_gb: float = 0.0
    memory_gb: float = 0.0
    row_tflop: float = 0.0
    prompts: str = "scenes"
    prefix: str = ""
    seeds: int = 1
    batch: int = 1
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    negative: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: str = ""
    block: int = 64
    clip: str = "openai/clip-vit-large-patch14"
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""
    note: str = ""
    toy: bool = False

    @property
    def label(self) -> str:
        """Return the name that tables and folders use: method and experiment."""
        return f"{self.method}/{self.name}"

    @property
    def edits(self) -> bool:
        """Tell whether the experiment edits a user's clips."""
        return self.prompts.endswith("clips")

    def figure(self, variant: str, metric: str) -> float | None:
        """Return the published figure, or None where it is not given."""
        return self.figures.get(variant, {}).get(metric)


def methods() -> tuple[str, ...]:
    """Name the methods that have a recipe."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def experiments(method: str, only: str | None = None, *, toy: bool = False) -> tuple[Experiment, ...]:
    """Return the experiments of a method, as the paper ran them or at toy size.

    Args:
        method: Name of a recipe; upper case and dashes do not matter.
        only: Name of one experiment of it; None for all.
        toy: Whether to return them at toy size.

    Raises:
        ConfigError: There is no such method or experiment.
    """
    name = method.lower().replace("-", "_")
    if name not in methods():
        raise ConfigError(
            f"There is no recipe for {method!r}; recipes are {', '.join(methods())}.{nearest(name, methods())}"
        )
    recipe = _read(name, toy)
    if only is None:
        return recipe
    names = [e.name for e in recipe]
    if only not in names:
        raise ConfigError(f"{name} has no experiment {only!r}; it has {', '.join(names)}.{nearest(only, names)}")
    return tuple(e for e in recipe if e.name == only)


@cache
def _read(method: str, toy: bool) -> tuple[Experiment, ...]:
    data = tomllib.loads((FOLDER / f"{method}.toml").read_text(encoding="utf-8"))
    entries = data.pop("experiments")
    small = data.pop("toy")
    made = []
    for name, entry in entries.items():
        mine = entry.pop("toy", {})
        fields = {"method": method, "name": name, **data, **entry}
        if toy:
            fields |= {**_SMALL, **small, **mine}
        made.append(_experiment(fields))
    return tuple(made)


_SMALL: dict[str, Any] = {
    "toy": True, "gpu": False, "adapter": "", "weights_gb": 0.0, "memory_gb": 0.0, "row_tflop": 0.0, "pictures": 2,
    "seeds": 1, "batch": 2, "steps": 2, "options": {}, "prefix": "", "block": 16,
}  # fmt: skip
_NOT_SMALL = ("height", "width")


def _experiment(fields: dict[str, Any]) -> Experiment:
    """Build an experiment; at toy size variants take the controls that `controls` names for them."""
    controls = fields.pop("controls", {})
    variants = [Variant(**{**v, "controls": tuple(v.get("controls", ()))}) for v in fields.pop("variants")]
    if fields.get("toy"):
        small = fields.pop("size", None)
        fields = {k: v for k, v in fields.items() if k not in _NOT_SMALL}
        fields |= {"height": small, "width": small, "figures": {}}
        variants = [dataclasses.replace(v, controls=tuple(controls.get(v.name, v.controls))) for v in variants]
    return Experiment(**{**fields, "metrics": tuple(fields["metrics"]), "variants": tuple(variants)})
