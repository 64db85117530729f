"""`attnctl sites`: where a model attends, and what to write into a selector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, importing, say, table

__all__ = ["Sites"]


@dataclass(frozen=True, kw_only=True)
class Sites(Common):
    """List the attention sites of a model, from its configuration alone (weights are read with --probe only)."""

    model: tyro.conf.Positional[str] = "shapes:text2image"
    """`shapes:text2image`, `shapes:mmdit`, `shapes:video`, `shapes:videodit` (shipped), a hub id, or a local folder."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="COMMIT")] = None
    """The commit or branch of a hub model."""

    probe: bool = False
    """Load the weights, run two steps, and show what each attention sees, and the row that would list the model."""

    def run(self, command: str) -> Result:
        """Build the denoiser and list its sites."""
        if self.probe:
            return self._probed()
        importing()
        import attnctl
        from attnctl.pipelines.models import load_denoiser

        sites = attnctl.find_sites(load_denoiser(self.model, revision=self.revision))
        data = [
            {
                "depth": site.depth,
                "name": site.name,
                "kind": site.kind,
                "heads": site.heads,
                "head_dim": site.head_dim,
                "grid": None if site.grid is None else list(site.grid),
            }
            for site in sites
        ]
        rows = [(s["depth"], s["name"], s["kind"], s["heads"], s["head_dim"], _grid(s["grid"])) for s in data]
        if not self.json:
            say(f"{len(sites)} sites of {self.model}; select by name, glob, stage, depth or kind.")
        text = table(("depth", "name", "kind", "heads", "head dim", "grid"), rows)
        return Result({"model": self.model, "sites": data}, text)

    def _probed(self) -> Result:
        """Run the model, and show what its attention sees; layers that see alike share a line."""
        say(f"Loading {self.model}, and running two steps of it a few times")

        from attnctl.pipelines.models import load
        from attnctl.pipelines.probing import probe_pipeline, suggested_row

        denoiser, arguments, seen = probe_pipeline(load(self.model, revision=self.revision).pipe)
        lines: dict[tuple[Any, ...], int] = {}
        for s in seen:
            name = ".".join("*" if part.isdigit() else part for part in s.site.name.split("."))
            line = (name, s.site.kind, s.counted or "-", s.queries, s.keys, _span(s.image), _span(s.text))
            lines[line] = lines.get(line, 0) + 1
        names = ("name", "kind", "by counts", "queries", "keys", "image keys", "text keys")
        rows = [(*line, count) for line, count in lines.items()]
        row = suggested_row(denoiser, arguments, seen)
        data = [dict(zip((*names, "layers"), r, strict=True)) for r in rows]
        text = table((*names, "layers"), rows) + f"\n\nA row of attnctl/core/hosts/families/ for it:\n\n{row}"
        return Result({"model": self.model, "seen": data, "row": row}, text)


def _span(tokens: tuple[int, ...]) -> str:
    """Write tokens as a range, with their number where they leave gaps."""
    if not tokens:
        return "-"
    whole = len(tokens) == tokens[-1] - tokens[0] + 1
    return f"{tokens[0]}-{tokens[-1]}" + ("" if whole else f" ({len(tokens)})")


def _grid(grid: Any) -> str:
    """Write a grid as rows x columns, with frames before them where there are several."""
    if grid is None:
        return "-"
    return "x".join(str(n) for n in (grid if grid[0] != 1 else grid[1:]))
