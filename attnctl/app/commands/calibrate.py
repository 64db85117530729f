"""`attnctl calibrate`: choose which blocks of a model's attention to compute, and see what it costs in quality."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, say, table
from attnctl.plans.writing import FileExists, check_writable

__all__ = ["Calibrate"]


@dataclass(frozen=True, kw_only=True)
class Calibrate(Common):
    """Make a block plan for PARO from a few prompts, and compare ways to compute a part of attention on others."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """A prompt to calibrate on; give it once or twice. Without one, --check compares what needs no plan."""

    check: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """Prompts that were not calibrated on, to compare dense attention, the plan and other selectors on."""

    model: str = "shapes:mmdit"
    """`shapes:mmdit` (shipped), a hub id, or a local folder."""

    density: float = 0.5
    """Share of the blocks to compute, above 0, up to 1."""

    block: int = 64
    """Tokens in a block of keys, and of queries."""

    groups: int = 1
    """Parts of the run with blocks of their own."""

    budget: str = "head"
    """Who has that share of blocks: head, site or model."""

    metric: str = "mass"
    """How a head's order is chosen: mass, paro or paro_literal."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the pipeline's)")] = None
    """Denoising steps."""

    guidance: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="(default: the pipeline's)")] = None
    """Classifier-free guidance scale."""

    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Another argument of the pipeline, such as height=512."""

    seed: int = 0
    """Seed of the first prompt's noise."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The commit or branch of a hub model."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: str = "auto"
    """auto, float32, float16, bfloat16."""

    out: Path = Path("plan")
    """Folder for the plan, its report and the pictures. An interrupted calibration goes on from what is there."""

    force: bool = False
    """Replace a plan that is already there."""

    def run(self, command: str) -> Result:
        """Calibrate, save, check."""
        if not self.prompt and not self.check:
            raise UsageError("Give --prompt TEXT to calibrate on, --check TEXT to compare on, or both.")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps is a whole number from 1 on, got {self.steps}.")
        if self.prompt and (self.out / "attnctl_blocks.json").exists() and not self.force:
            raise FileExists(f"{self.out} holds a plan already: give --force to replace it, or another --out.")
        check_writable(self.out)
        importing()
        from attnctl.data.specs import parse_option
        from attnctl.errors import ConfigError
        from attnctl.pipelines import calibrate, check_plan, write_report
        from attnctl.pipelines.calibration.calibrate import checked
        from attnctl.pipelines.calibration.measure import processes
        from attnctl.pipelines.models import device_and_dtype, load

        try:
            call: dict[str, Any] = dict(parse_option(text) for text in self.option)
            checked(self.density, self.block, None, self.groups, self.metric, budget=self.budget)  # before the model
        except ConfigError as error:
            raise UsageError(str(error)) from None
        for key, value in (("num_inference_steps", self.steps), ("guidance_scale", self.guidance)):
            if value is not None:
                call[key] = value
        device, dtype = device_and_dtype(self.device, self.dtype)
        say(f"Loading {self.model} ({device}, {dtype})")
        loaded = load(self.model, revision=self.revision, device=device, dtype=dtype)
        loaded.pipe.set_progress_bar_config(disable=True)
        call = dict(loaded.call) | call
        if not self.prompt:
            rows = self._compared(loaded.pipe, None, call)
            return Result({"model": loaded.name, "compared": rows}, _compared_text(rows))
        result = calibrate(
            loaded.pipe, self.prompt, density=self.density, block=self.block, groups=self.groups, metric=self.metric,
            budget=self.budget, seed=self.seed, call=call, out=self.out / "measured", model=loaded.name,
        )  # fmt: skip
        if processes()[0]:
            return Result({"plan": str(self.out)}, "")  # the first process concludes for all of them
        result.plan.save_pretrained(self.out)
        checks = (
            check_plan(loaded.pipe, result.plan, self.check, seed=self.seed + 1000, call=call) if self.check else []
        )
        report = write_report(result, self.out, checks)
        data = {
            "plan": str(self.out), "model": loaded.name, "density": result.plan.density, "captured": result.captured,
            "bytes": result.plan.packed_bytes, "sites": report["sites"], "checks": report["checks"],
            "report": str(self.out / "report.md"), "picture": str(self.out / "maps.png"),
            "compared": self._compared(loaded.pipe, result.plan, call) if self.check else [],
        }  # fmt: skip
        return Result(data, _text(data, self.check))

    def _compared(self, pipe: Any, plan: Any, call: dict[str, Any]) -> list[dict[str, Any]]:
        """Compare a plan, if there is one, with selectors that compute as much."""
        from attnctl.pipelines.calibration.compare import candidates, compare, grid_and_steps
        from attnctl.processors import SparseAttention

        say("Comparing ways to compute as much of attention; first one run, for the size of its maps")
        grid, steps = grid_and_steps(pipe, self.check[0], call)
        controls = {} if plan is None else {"plan": SparseAttention(plan)}
        controls |= candidates(self.density, self.block, grid, steps)
        watched = sys.stderr.isatty()  # whose bar names what runs

        def announce(name: str) -> None:
            if not watched:
                say(f"  {name}")

        return compare(pipe, controls, self.check, seed=self.seed + 1000, call=call, announce=announce)


def _text(data: dict[str, Any], prompts: tuple[str, ...]) -> str:
    rows = [
        (
            s["site"], s["heads"], " ".join(f"{n} {c}" for n, c in s["orders"].items()),
            round(100 * s["captured"], 1), round(100 * s["captured_model_order"], 1), round(s["predicted_error"], 3),
            "" if s["measured_error"] is None else round(s["measured_error"], 3), round(s["density"], 3),
        )
        for s in data["sites"]
    ]  # fmt: skip
    header = ("site", "heads", "orders", "captured %", "in model order %", "error bound", "measured", "density")
    lines = [table(header, rows)]
    lines.append(
        f"{data['plan']}: {len(rows)} sites, density {data['density']:.3f}, {100 * data['captured']:.1f} % of the "
        f"attention captured, {data['bytes']} bytes of masks; report: {data['report']}, maps before and after: "
        f"{data['picture']}"
    )
    for check in data["checks"]:
        quality = "identical" if check["psnr_db"] is None else f"{check['psnr_db']} dB to dense"
        lines.append(f"checked on {check['prompt']!r}: {quality}")
    if data["compared"]:
        lines.append(_compared_text(data["compared"]))
    if not prompts:
        lines.append("Not checked: give --check PROMPT to compare dense and sparse pictures of another prompt.")
    return "\n".join(lines)


def _compared_text(rows: list[dict[str, Any]]) -> str:
    """Lay a comparison out as a table, and name the control to use."""
    from attnctl.pipelines.calibration.compare import best_of

    def shown(value: float | None, digits: int, factor: float = 1.0) -> Any:
        return "" if value is None else round(factor * value, digits)

    cells = [
        (
            r["name"], shown(r["executed"], 1, 100), shown(r["captured"], 1, 100), shown(r["layer_error"], 3),
            "identical" if r["psnr_db"] is None else r["psnr_db"], r["seconds"], r["dense_seconds"],
        )
        for r in rows
    ]  # fmt: skip
    header = ("selector", "computed %", "captured %", "layer error", "dB to dense", "seconds", "dense seconds")
    return "\n".join([table(header, cells), f"nearest to dense: {best_of(rows)['control']}"])
