"""`attnctl calibrate`: choose which blocks of a model's attention to compute, and see what it costs in quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnctl.commands.common import Common, Result, UsageError, say, table
from attnctl.outputs import FileExists

__all__ = ["Calibrate"]


@dataclass(frozen=True, kw_only=True)
class Calibrate(Common):
    """Make a block plan for PARO from a few prompts, and compare dense and sparse pictures of another prompt."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
    """A prompt to calibrate on; give it once or twice."""

    check: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """Prompts that were not calibrated on, to compare dense and sparse on."""

    model: str = "shapes:mmdit"
    """`shapes:mmdit` (shipped), a hub id, or a local folder."""

    density: float = 0.5
    """Share of the blocks to compute, above 0, up to 1."""

    block: int = 64
    """Tokens in a block of keys, and of queries."""

    groups: int = 1
    """Parts of the run with blocks of their own."""

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
        from attnctl.commands.models import device_and_dtype, load
        from attnctl.errors import ConfigError
        from attnctl.pipelines import calibrate
        from attnctl.specs import parse_option

        if (self.out / "attnctl_blocks.json").exists() and not self.force:
            raise FileExists(f"{self.out} holds a plan already: give --force to replace it, or another --out.")
        try:
            call: dict[str, Any] = dict(parse_option(text) for text in self.option)
        except ConfigError as error:
            raise UsageError(str(error)) from None
        for key, value in (("num_inference_steps", self.steps), ("guidance_scale", self.guidance)):
            if value is not None:
                call[key] = value
        device, dtype = device_and_dtype(self.device, self.dtype)
        say(f"Loading {self.model} ({device}, {dtype})")
        loaded = load(self.model, revision=self.revision, device=device, dtype=dtype)
        loaded.pipe.set_progress_bar_config(disable=True)
        found = calibrate(
            loaded.pipe, self.prompt, density=self.density, block=self.block, groups=self.groups, metric=self.metric,
            seed=self.seed, call=call, out=self.out / "measured", model=loaded.name,
        )  # fmt: skip
        found.plan.save_pretrained(self.out)
        picture = _picture(found, self.out / "maps.png")
        checks = [
            _check(loaded.pipe, found.plan, text, self.seed + 1000 + i, call) for i, text in enumerate(self.check)
        ]
        data = {
            "plan": str(self.out), "model": loaded.name, "density": found.plan.density, "captured": found.captured,
            "bytes": found.plan.packed_bytes, "sites": [dict(r) for r in found.rows], "checks": checks,
            "picture": str(picture),
        }  # fmt: skip
        return Result(data, _text(data, self.check))


def _check(pipe: Any, plan: Any, prompt: str, seed: int, call: dict[str, Any]) -> dict[str, Any]:
    """Compare one picture or video with and without the plan, in decibels."""
    import numpy as np
    import torch

    import attnctl
    from attnctl.processors import PARO

    def show() -> Any:
        out = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **{**call, "output_type": "np"})
        return np.asarray(out[0], np.float64)

    dense = show()
    with attnctl.control(pipe, PARO(plan)):
        sparse = show()
    error = float(((dense - sparse) ** 2).mean())
    return {"prompt": prompt, "psnr_db": None if error == 0 else round(-10 * float(np.log10(error)), 2)}


def _picture(found: Any, path: Path) -> Path:
    """Draw where the mass lies at a few sites and heads: in the model's order, in the chosen one, and what is kept."""
    import numpy as np
    from PIL import Image

    from attnctl.imaging import grid
    from attnctl.plans.orders import order_name

    names = list(found.mass)
    tiles, labels = [], []
    for i in sorted({0, len(names) // 2, len(names) - 1}):
        maps, plan = found.mass[names[i]], found.plan.plans[names[i]]
        for h in range(min(plan.heads, 3)):
            labels.append(f"{names[i]}, head {h}: {order_name(plan.order[h])}")
            own, chosen, kept = maps[0, h], maps[1, h], plan.keep[0, h].float()
            for m in (own, chosen, kept):
                shade = np.sqrt(m.numpy() / max(float(m.max()), 1e-12))
                tiles.append(Image.fromarray(np.uint8(255 * shade)).convert("RGB"))
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ("the model's order", "the chosen order", "blocks that are kept")
    note = "Blocks of queries from top to bottom, of keys from left to right; brighter is more attention (square root)."
    grid(tiles, len(labels), 3, labels, columns, footer=note).save(path)
    return path


def _text(data: dict[str, Any], asked: tuple[str, ...]) -> str:
    rows = [
        (
            s["site"], s["heads"], " ".join(f"{n} {c}" for n, c in s["orders"].items()),
            round(100 * s["captured"], 1), round(100 * s["captured_model_order"], 1), round(s["density"], 3),
        )
        for s in data["sites"]
    ]  # fmt: skip
    lines = [table(("site", "heads", "orders", "captured %", "in model order %", "density"), rows)]
    lines.append(
        f"{data['plan']}: {len(rows)} sites, density {data['density']:.3f}, {100 * data['captured']:.1f} % of the "
        f"attention captured, {data['bytes']} bytes of masks; maps before and after: {data['picture']}"
    )
    for check in data["checks"]:
        told = "identical" if check["psnr_db"] is None else f"{check['psnr_db']} dB to dense"
        lines.append(f"checked on {check['prompt']!r}: {told}")
    if not asked:
        lines.append("Not checked: give --check PROMPT to compare dense and sparse pictures of another prompt.")
    return "\n".join(lines)
