"""What an experiment has shown: published figures beside the measured ones, and a sheet of pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnctl.data.pictures import film_strip, grid
from attnctl.data.proportions import wilson
from attnctl.data.provenance import hardware, versions
from attnctl.errors import AttnctlError, ConfigError
from attnctl.pipelines.reproduce.metrics import Metric, by_name
from attnctl.pipelines.reproduce.networks import Networks
from attnctl.pipelines.reproduce.prompts import Asked
from attnctl.pipelines.reproduce.recipes import Experiment, experiments, methods
from attnctl.pipelines.reproduce.store import Piece, Store
from attnctl.plans.reading import Expected, read_json
from attnctl.plans.writing import publish

__all__ = [
    "CATALOGUE",
    "COLUMNS",
    "NOT_GIVEN",
    "NOT_RUN",
    "catalogue_rows",
    "judged",
    "lines_of",
    "markdown",
    "read_results",
    "write_results",
]

NOT_GIVEN, NOT_RUN = "not given", "not run"
CATALOGUE = ("experiment", "model", "metric", "variants", "published", "measured")
COLUMNS = ("variant", "metric", "published", "measured", "95 %", "n", "against the first")
_RESULTS = Expected("the results of a reproduction", ConfigError, 16 << 20)
_SHOWN = 4  # prompts on a sheet
_Z = 1.959964


def judged(
    experiment: Experiment, store: Store, wanted: Sequence[Asked], networks: Networks, names: Sequence[str]
) -> dict[str, Any]:
    """Measure what is finished.

    Returns:
        `rows`, one per variant and metric, with the published figure, what is measured, its 95 % interval, the number
        of pictures and the mean difference to the first variant on the same noise; and `missing`, what could not be
        measured and why.
    """
    pieces = {v.name: list(store.pieces(v, wanted)) for v in experiment.variants}
    first = pieces[experiment.variants[0].name]
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for metric in by_name(names):
        before: list[float] | None = None
        for variant in experiment.variants:
            mine, value = pieces[variant.name], None
            compared = metric.pairs and variant is experiment.variants[0]
            if mine and not compared and metric.name not in missing:
                try:
                    value = metric.measure(mine, first, networks)
                except (AttnctlError, ImportError) as error:
                    missing[metric.name] = str(error)
            before = value if variant is experiment.variants[0] and isinstance(value, list) else before
            rows.append(
                {
                    "variant": variant.name,
                    "metric": metric.name,
                    "published": experiment.figure(variant.name, metric.name),
                }
                | _figures(value, len(mine), None if variant is experiment.variants[0] else before, metric.share)
            )
    return {"rows": rows, "missing": missing}


def _figures(value: list[float] | float | None, n: int, first: list[float] | None, share: bool) -> dict[str, Any]:
    """Return mean, interval, number and difference to the first variant as JSON values."""
    empty: dict[str, Any] = {"measured": None, "low": None, "high": None, "n": 0, "difference": None}
    if value is None or (isinstance(value, list) and not value):
        return empty
    if isinstance(value, float):
        return empty | {"measured": value, "n": n}
    mean, low, high = _interval(value, share)
    figures = empty | {"measured": mean, "low": low, "high": high, "n": len(value)}
    if first is not None and len(first) == len(value):
        figures["difference"] = list(_interval([a - b for a, b in zip(value, first, strict=True)], False))
    return figures


def _interval(values: Sequence[float], share: bool) -> tuple[float, float | None, float | None]:
    """Return a mean with its 95 % interval: Wilson's for a share of yes and no, the normal one otherwise."""
    n, mean = len(values), float(np.mean(values))
    if share:
        return (mean, *wilson(int(sum(values)), n))
    if n < 2:
        return mean, None, None
    half = _Z * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def write_results(
    experiment: Experiment, store: Store, wanted: Sequence[Asked], results: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write `results.json`, `results.md` and `sheet.png` into the experiment's folder; return what the JSON holds."""
    data = {
        "schema": 1, "kind": "reproduction", "experiment": experiment.label, "toy": experiment.toy,
        "paper": experiment.paper, "source": experiment.source, "note": experiment.note, **about,
        "hardware": hardware(str(about.get("device", "cpu"))), "versions": versions(), **results,
    }  # fmt: skip
    lines = [f"# {experiment.title}: {experiment.about}", "", *markdown(COLUMNS, lines_of(data)), ""]
    lines += [f"Not measured: {name}: {why}" for name, why in data["missing"].items()]
    publish(
        {
            store.folder / "results.json": (json.dumps(data, indent=1, allow_nan=False) + "\n").encode(),
            store.folder / "results.md": ("\n".join(lines).rstrip() + "\n").encode(),
        },
        force=True,
    )
    sheet = _sheet(experiment, store, wanted)
    if sheet is not None:
        sheet.save(store.folder / "sheet.png")
    return data


def lines_of(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lay results out as the cells of a table."""
    metrics = {m.name: m for m in by_name(sorted({row["metric"] for row in results["rows"]}))}
    none = "toy" if results.get("toy") else NOT_GIVEN
    return [_cells(row, metrics[row["metric"]], results["missing"], none) for row in results["rows"]]


def _cells(
    row: Mapping[str, Any], metric: Metric, missing: Mapping[str, str], ungiven: str = NOT_GIVEN
) -> tuple[str, ...]:
    def shown(value: float | None, otherwise: str = "", sign: str = "") -> str:
        return otherwise if value is None else f"{value:{sign}.{metric.digits}f}"

    none = "not measured" if metric.name in missing else "" if metric.pairs and row["n"] == 0 else NOT_RUN
    span = "" if row["low"] is None else f"{shown(row['low'])} to {shown(row['high'])}"
    apart = ""
    if row["difference"] is not None:
        mean, low, high = row["difference"]
        apart = shown(mean, sign="+") + ("" if low is None else f" [{shown(low, sign='+')}, {shown(high, sign='+')}]")
    n = str(row["n"] or "")
    return row["variant"], metric.about, shown(row["published"], ungiven), shown(row["measured"], none), span, n, apart


def _sheet(experiment: Experiment, store: Store, wanted: Sequence[Asked]) -> Image.Image | None:
    """Draw the first prompts, one row per variant; a video as three of its frames."""
    shown = list({one.prompt: one for one in reversed(wanted)}.values())[::-1][:_SHOWN]
    tiles: list[Image.Image | None] = []
    for variant in experiment.variants:
        pieces = {piece.asked.index: piece for piece in store.pieces(variant, shown)}
        tiles += [_tile(pieces[one.index]) if one.index in pieces else None for one in shown]
    if not any(tiles):
        return None
    names = [v.name for v in experiment.variants]
    title = f"{experiment.title}: {experiment.about}"
    return grid(tiles, len(names), len(shown), names, [one.prompt for one in shown], title=title)


def _tile(piece: Piece) -> Image.Image:
    images = piece.images()
    chosen = images if len(images) == 1 else [images[0], images[len(images) // 2], images[-1]]
    for image in chosen:
        image.thumbnail((384, 384))
    return film_strip(chosen)


def read_results(folder: Path, experiment: Experiment) -> dict[str, Any] | None:
    """Return the results that a run has left in a folder of reproductions; None where there are none.

    Raises:
        ConfigError: They are damaged.
    """
    path = Store.place(folder, experiment) / "results.json"
    if not path.is_file():
        return None
    data = read_json(path, _RESULTS, kind="reproduction", schema=1)
    if not isinstance(data.get("rows"), list) or not isinstance(data.get("missing"), dict):
        raise ConfigError(f"{path} is damaged: delete it, and run the reproduction again; its pictures are kept.")
    return dict(data)


def catalogue_rows(folder: Path | None) -> Iterator[tuple[str, ...]]:
    """Yield a row per experiment and metric, with the figures of all variants in their order.

    Args:
        folder: Folder of reproductions, for what has been measured; None for none.
    """
    for method in methods():
        for experiment in experiments(method):
            results = None if folder is None else read_results(folder, experiment)
            rows = {(r["variant"], r["metric"]): r for r in results["rows"]} if results else {}
            for metric in by_name(experiment.metrics):
                names = [v.name for v in experiment.variants[1 if metric.pairs else 0 :]]
                published = [experiment.figure(name, metric.name) for name in names]
                measurements = [rows.get((name, metric.name), {}).get("measured") for name in names]
                yield (
                    experiment.label, experiment.model, metric.about, " / ".join(names),
                    _joined(published, metric, NOT_GIVEN), _joined(measurements, metric, NOT_RUN),
                )  # fmt: skip


def _joined(values: Sequence[float | None], metric: Metric, none: str) -> str:
    """Write the figures of variants in their order, or one word where there is none at all."""
    if all(value is None for value in values):
        return none
    return " / ".join("-" if value is None else f"{value:.{metric.digits}f}" for value in values)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
