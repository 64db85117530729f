"""`attnctl sites`: where a model attends, and what to write into a selector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, say, table

__all__ = ["Sites"]


@dataclass(frozen=True, kw_only=True)
class Sites(Common):
    """List the attention sites of a model, from its configuration alone (no weights are read)."""

    model: tyro.conf.Positional[str] = "shapes:text2image"
    """`shapes:text2image`, a hub id, or a local folder."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="COMMIT")] = None
    """The commit or branch of a hub model."""

    def run(self, command: str) -> Result:
        """Build the denoiser and list its sites."""
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


def _grid(grid: Any) -> str:
    """Write a grid as rows x columns, with frames before them where there are several."""
    if grid is None:
        return "-"
    return "x".join(str(n) for n in (grid if grid[0] != 1 else grid[1:]))
