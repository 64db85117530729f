"""`attnctl predict`: ask a trained run about new pictures, and show what spoke for each answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, say, table

__all__ = ["Predict"]


@dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """Ask a run of `attnctl classify` or `segment` about pictures, and write a sheet with a map for each."""

    folder: tyro.conf.Positional[Path]
    """The folder of the run."""

    pictures: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, or folders of them."""

    out: Path = Path("predictions")
    """Folder for predictions.json and the sheets."""

    no_maps: bool = False
    """Leave the maps out."""

    force: bool = False
    """Overwrite files that are already there."""

    def run(self, command: str) -> Result:
        """Predict and tell the answers."""
        if not self.pictures:
            raise UsageError("Give at least one picture, or a folder of them.")
        say(f"Asking {self.folder}")

        from attnctl.pipelines.vision.predicting import predict

        answers = predict(self.folder, self.pictures, self.out, maps=not self.no_maps, force=self.force)
        rows = []
        for a in answers:
            best = a.answer or max(a.shares, key=lambda name: a.shares[name])
            rows.append((Path(a.file).name, best, f"{a.shares[best]:.3f}", a.map))
        text = table(("picture", "answer", "share", "map"), rows) + f"\n{self.out}"
        return Result({"out": str(self.out), "answers": [asdict(a) for a in answers]}, text)
