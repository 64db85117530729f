"""Say how good a block plan is: what every layer drops, how far from dense other prompts come out, pictures of maps."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnctl.core.attach import attach
from attnctl.core.call import AttnCall, Proceed, Wrapper
from attnctl.core.sites import Site
from attnctl.data.pictures import grid
from attnctl.errors import ConfigError, shown
from attnctl.pipelines.calibration.calibrate import Calibration
from attnctl.pipelines.refusals import check_arguments, check_pipeline, check_prompts
from attnctl.pipelines.stepping import showing_steps
from attnctl.plans import BlockPlan, ModelPlan
from attnctl.plans.orders import order_name
from attnctl.plans.writing import publish
from attnctl.processors.paro import PARO

__all__ = ["check_plan", "draw_maps", "write_report"]

_SITES, _HEADS = 3, 3
_COLUMNS = (
    ("site", "site"), ("orders", "orders"), ("captured", "captured %"), ("captured_model_order", "in model order %"),
    ("predicted_error", "error bound"), ("measured_error", "error measured"), ("density_image", "density"),
    ("density", "with text"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Compare(PARO):
    """Compute every attention both ways, hand the dense result on, and add up how far the sparse one is from it."""

    sums: dict[str, list[float]] = field(default_factory=dict)

    def wrapper(self, sites: tuple[Site, ...]) -> Wrapper:
        sparsely = super().wrapper(sites)

        def compare(call: AttnCall, proceed: Proceed) -> Tensor:
            dense = proceed(call)
            image = call.image or slice(0, call.q.shape[2])
            want = dense[:, :, image].double()
            error = (sparsely(call, proceed)[:, :, image].double() - want).square().sum()
            errors = self.sums.setdefault(call.site.name, [0.0, 0.0])
            errors[0] += float(error)
            errors[1] += float(want.square().sum())
            return dense

        return compare


def check_plan(
    pipe: Any,
    plan: ModelPlan | BlockPlan | str | os.PathLike[str],
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    seed: int = 1000,
    call: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Compare dense and sparse runs on prompts that the plan was not made from.

    Args:
        pipe: A diffusers pipeline.
        plan: What `PARO` takes.
        prompts: Texts, or arguments of the call in their place.
        seed: Of the first prompt's noise; prompt i has seed + i.
        call: Other arguments of the pipeline call.
        quiet: Show no progress.
        options: Other fields of `PARO`, such as `dense_steps`.

    Returns:
        For every prompt its text, the decibels between both results (None where they are identical; latents, if the
        call asks for them, against their own range) and, by site, the relative L2 error of each attention's image rows
        when its inputs are the dense run's.

    Raises:
        ConfigError: There is no prompt.
    """
    check_pipeline(pipe, "check_plan")
    check_prompts(prompts)
    check_arguments(pipe, call or ())
    rows = []
    with showing_steps(pipe, call, 2 * len(prompts), "check the plan", quiet=quiet):
        for i, prompt in enumerate(prompts):
            inputs = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
            settings = {"output_type": "np", **dict(call or {}), **inputs}

            def run(settings: dict[str, Any] = settings, i: int = i) -> np.ndarray:
                out = pipe(**settings, generator=torch.Generator().manual_seed(seed + i))[0]
                return out.double().cpu().numpy() if isinstance(out, Tensor) else np.asarray(out, np.float64)

            compare = _Compare(plan, **options)
            with attach(pipe, compare):
                dense = run()
            with attach(pipe, PARO(plan, **options)):
                sparse = run()
            error = float(((dense - sparse) ** 2).mean())
            peak = float(dense.max() - dense.min()) if settings["output_type"] == "latent" else 1.0
            rows.append({
                "prompt": prompt if isinstance(prompt, str) else f"({', '.join(prompt)})",
                "psnr_db": None if error == 0 else round(float(10 * np.log10(peak**2 / error)), 2),
                "sites": {name: (e / max(n, 1e-300)) ** 0.5 for name, (e, n) in compare.sums.items()},
            })  # fmt: skip
    return rows


def write_report(
    found: Calibration, folder: str | os.PathLike[str], checks: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Write `report.json`, `report.md` and `maps.png` into a folder and return what the JSON holds.

    Args:
        found: A calibration.
        folder: Made where it is missing.
        checks: What `check_plan` returned.
    """
    if not isinstance(found, Calibration):
        raise ConfigError(f"found={shown(found)} was given; expected what calibrate(...) returns.")
    path = Path(folder)
    rows = []
    for row in found.rows:
        measured = [c["sites"][row["site"]] for c in checks if row["site"] in c["sites"]]
        rows.append({**row, "measured_error": float(np.mean(measured)) if measured else None})
    data = {
        "model": found.plan.model, **found.plan.about, "density_with_text": found.plan.density,
        "density_image": float(np.mean([r["density_image"] for r in rows])), "captured": found.captured,
        "mask_bytes": found.plan.packed_bytes, "sites": rows,
        "checks": [{k: c[k] for k in ("prompt", "psnr_db")} for c in checks],
    }  # fmt: skip
    picture = io.BytesIO()
    draw_maps(found).save(picture, "png")
    files = {"report.json": (json.dumps(data, indent=1) + "\n").encode(), "report.md": _markdown(data).encode()}
    files["maps.png"] = picture.getvalue()
    publish({path / name: content for name, content in files.items()}, force=True)
    return data


def _markdown(data: Mapping[str, Any]) -> str:
    lines = [
        f"# Block plan of {data['model'] or 'a model'}", "",
        f"Density {data['density_image']:.3f} of the image's blocks, {data['density_with_text']:.3f} with the text; "
        f"{100 * data['captured']:.1f} % of the image's attention captured; {data['mask_bytes']} bytes of masks. "
        f"Orders by \"{data['metric']}\", one budget for each {data['budget']}.", "",
        "Calibrated on: " + "; ".join(data["prompts"]) + ".", "",
        "| " + " | ".join(title for _, title in _COLUMNS) + " |", "|" + "---|" * len(_COLUMNS),
        *("| " + " | ".join(_cell(row, key) for key, _ in _COLUMNS) + " |" for row in data["sites"]), "",
        "Error bound: twice the dropped share of a row's attention, as a share of the largest value. Error measured: "
        "relative L2 error of an attention's image rows on the checked prompts, its inputs being the dense run's.", "",
    ]  # fmt: skip
    for check in data["checks"]:
        quality = "identical" if check["psnr_db"] is None else f"{check['psnr_db']} dB to dense"
        lines.append(f'- checked on "{check["prompt"]}": {quality}')
    if not data["checks"]:
        lines.append("Not checked on another prompt.")
    return "\n".join([*lines, "", "![maps before and after](maps.png)", ""])


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if value is None:
        return ""
    if isinstance(value, dict):
        return " ".join(f"{name} {count}" for name, count in value.items())
    if key.startswith("captured"):
        return f"{100 * value:.1f}"
    return value if isinstance(value, str) else f"{value:.3f}"


def draw_maps(found: Calibration) -> Image.Image:
    """Draw where the mass lies at a few sites and heads: in the model's order, in the chosen one, and what is kept."""
    names = list(found.mass)
    tiles, labels = [], []
    for i in sorted({0, len(names) // 2, len(names) - 1})[:_SITES]:
        maps, plan = found.mass[names[i]], found.plan.plans[names[i]]
        # Heads that were reordered first: there is something to see.
        shown = sorted(range(plan.heads), key=lambda h: (plan.order[h] == 0, h))[:_HEADS]
        for h in sorted(shown):
            labels.append(f"{names[i]}, head {h}: {order_name(plan.order[h])}")
            for m in (maps[0, h], maps[1, h], plan.keep[0, h].float()):
                shade = np.sqrt(m.numpy() / max(float(m.max()), 1e-12))
                tiles.append(Image.fromarray((255 * shade).astype(np.uint8)).convert("RGB"))
    columns = ("the model's order", "the chosen order", "blocks that are kept")
    note = "Blocks of queries from top to bottom, of keys from left to right; brighter is more attention (square root)."
    return grid(tiles, len(labels), 3, labels, columns, footer=note)
