"""Write the tables of `benchmarks/hunt.py` in Markdown: `python benchmarks/hunt_table.py FILE.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["markdown"]

_NAMES = {
    "plain": "plain guidance",
    "layer": "best single layer",
    "full": "heads of the full search",
    "halved": "heads of the halved search",
    "affordable": "heads of the search by groups",
}


def markdown(data: dict[str, Any]) -> str:
    """Lay out what was searched, tuned, reported and saved."""
    parts = [_search(data)] if "search" in data else []
    parts += [_tune(data["tune"])] if "tune" in data else []
    parts += [_report(data["report"])] if "report" in data else []
    parts += [_savings(data["savings"])] if "savings" in data else []
    return "\n\n".join(parts)


def _search(data: dict[str, Any]) -> str:
    lines = [
        "| search | images | generated in the last run | s CPU an image there | heads, best first |",
        "|---|---|---|---|---|",
    ]
    for name, found in data["search"].items():
        chosen = ", ".join(f"L{site.split('.')[1]}H{h}" for site, h in found["rounds"][0]["chosen"])
        spent = found["cpu_seconds_per_image"] if found["generated"] else ""
        lines.append(f"| {name} | {found['images']} | {found['generated']} | {spent} | {chosen} |")
    return "\n".join(lines)


def _tune(tune: dict[str, Any]) -> str:
    lines = [f"| setting | right of {tune['pictures']} tuning pictures |", "|---|---|"]
    best = set(tune["best"].values())
    for row in tune["table"]:
        mark = "**" if row["label"] in best else ""
        lines.append(f"| {_NAMES[row['kind']]}: {row['label']} | {mark}{row['right']} %{mark} |")
    return "\n".join(lines)


def _report(report: dict[str, Any]) -> str:
    lines = [
        f"| run ({report['pictures']} pictures) | right | over plain, points | over the layer, points |",
        "|---|---|---|---|",
    ]
    for kind, share in report["right_percent"].items():
        gains = [report[name].get(kind) for name in ("gain_over_plain_points", "over_layer_points")]
        told = ["" if g is None else f"{g[0]:+.1f} [{g[1]:+.1f}, {g[2]:+.1f}]" for g in gains]
        lines.append(f"| {_NAMES[kind]}: {report['settings'][kind]} | {share} % | {told[0]} | {told[1]} |")
    told = ", ".join(f"{name}: {share}" for name, share in report["keeps"].items())
    lines.append(f"\nShare of the full set's gain that is kept: {told}.")
    return "\n".join(lines)


def _savings(savings: dict[str, Any]) -> str:
    lines = ["| saving alone | images | of the same heads | share of the gain in marks |", "|---|---|---|---|"]
    for row in savings["choice"]:
        lines.append(f"| {row['saving']} | {row['images']} | {row['same_heads']} | {row['gain_kept']} |")
    lines += [
        "",
        "| call | GFLOP a picture and step | s CPU a step, one by one | s CPU a step, 16 together |",
        "|---|---|---|---|",
    ]
    for name, call in savings["calls"].items():
        alone, together = call["cpu_seconds_per_step"].values()
        lines.append(f"| {name} | {call['gflop_per_step']} | {alone} | {together} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
