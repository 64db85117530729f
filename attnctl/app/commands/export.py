"""`attnctl export`: write a trained run as ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from attnctl.app.commands.common import Common, Result, say

__all__ = ["Export"]


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Write the model of a run of `attnctl classify` or `segment` as ONNX, for any number of pictures."""

    folder: tyro.conf.Positional[Path]
    """The folder of the run."""

    to: Path | None = None
    """The file to write, model.onnx in the run's folder if not given."""

    force: bool = False
    """Overwrite files that are already there."""

    def run(self, command: str) -> Result:
        """Export, and tell the file."""
        to = self.to or self.folder / "model.onnx"
        say(f"Writing {to}")

        from attnctl.pipelines.vision.predicting import export_onnx

        path = export_onnx(self.folder, to, force=self.force)
        return Result({"file": str(path)}, str(path))
