"""`attnctl generate --from`: a recorded picture again, and whether it is the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnctl.app.commands.common import Result, UsageError, importing, say
from attnctl.app.commands.pictures import picture_row, pictures_table, write_video
from attnctl.data.files import below
from attnctl.plans.writing import check_free

__all__ = ["again"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RECORDED = (
    "prompt", "prompts", "compare", "control", "seed", "num", "steps", "guidance", "negative", "height", "width",
    "batch", "option", "backend", "revision",
)  # fmt: skip


def again(options: Any, source: Path) -> Result:
    """Make the pictures of a record again, with the options of `attnctl generate`, and compare them with it.

    Raises:
        UsageError: Options were given that a record has.
        RecordError: The record cannot be read or run.
    """
    for name in _RECORDED:
        if getattr(options, name) not in (None, ()):
            raise UsageError(f"--from repeats a record as it is: drop --{name}, or drop --from.")

    importing()
    from attnctl.data.record import read, save_image, sidecar
    from attnctl.pipelines.doubts import doubts
    from attnctl.pipelines.repeat import differences

    records = read(source)
    names = [
        f"{source.stem[:120]}-again{'' if len(records) == len(r.shows) == 1 else f'-{n}-{i}'}.png"
        for n, r in enumerate(records)
        for i in r.shows
    ]
    paths = [below(options.out, name) for name in names]
    check_free([*paths, *map(sidecar, paths)], force=options.force)
    rows: list[dict[str, Any]] = []
    changed: dict[str, tuple[str, str]] = {}
    for record in records:
        these = paths[len(rows) : len(rows) + len(record.shows)]
        done = _sampled(options, record, these)
        changed |= differences(record, done.record)
        for n, i in enumerate(record.shows):
            save_image(done.images[i], these[n], replace(done.record, shows=(i,)), force=options.force)
            if done.videos:
                write_video(done.videos[i], these[n], options.fps, options.force)
            same = done.record.sha256[i] == record.sha256[i]
            rows.append({**picture_row(these[n], done.record, i), "identical": same})
    same = all(row["identical"] for row in rows)
    denied = [] if same else doubts(source, records)
    data = {
        "identical": same,
        "denied": denied,
        "differences": {name: {"recorded": a, "here": b} for name, (a, b) in changed.items()},
        "images": rows,
    }
    say(_verdict(same, changed, denied))
    return Result(data, pictures_table(rows), 0 if same else 1)


def _sampled(options: Any, record: Any, paths: Sequence[Path]) -> Any:
    """Load the model of a record and run its call again."""
    from attnctl.pipelines.generate import makes_videos
    from attnctl.pipelines.models import device_and_dtype, load
    from attnctl.pipelines.repeat import sample_again
    from attnctl.pipelines.stepping import step_bar

    device, dtype = device_and_dtype(
        record.device if options.device == "auto" else options.device,
        record.dtype if options.dtype == "auto" else options.dtype,
    )
    model, recorded = _model_of(options, record), options.model is None
    say(f"Loading {model} ({device}, {dtype})")
    loaded = load(model, revision=_commit(record), device=device, dtype=dtype, recorded=recorded)
    if makes_videos(loaded.pipe):
        check_free([path.with_suffix(".mp4") for path in paths], force=options.force)
    with step_bar(loaded.pipe, record.steps, 1, "generate") as bar:
        return sample_again(loaded, record, bar.update)


def _model_of(options: Any, record: Any) -> str:
    if options.model is not None:
        return options.model
    local = (record.revision or "").startswith("sha256:") and not record.model.startswith("shapes:")
    if local or not (record.model.startswith("shapes:") or _HUB_ID.fullmatch(record.model)):
        raise UsageError(f"The record was made with the local model {record.model!r}: say where it is with --model.")
    return str(record.model)


def _commit(record: Any) -> str | None:
    """Return the hub commit of a record, which a local folder has not.

    Raises:
        UsageError: The record names something else, such as a branch, which would be another model tomorrow.
    """
    revision = record.revision or ""
    if not revision or revision.startswith("sha256:"):
        return None
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise UsageError(
            f"The record names the revision {revision!r:.80}; expected a commit of 40 hexadecimal digits. Say with "
            "--model where the model is."
        )
    return str(revision)


def _verdict(same: bool, changed: dict[str, tuple[str, str]], denied: Sequence[str]) -> str:
    """Say whether a picture is the recorded one, and why it may not be."""
    changes = "; ".join(f"{name}: recorded {a}, here {b}" for name, (a, b) in changed.items())
    if same:
        return "Identical to the record, pixel for pixel." + (f" (Although {changes}.)" if changes else "")
    if denied:
        also = f" Here, too, {changes}." if changes else ""
        return f"Not identical to the record, which was changed: the picture cannot have {'; '.join(denied)}.{also}"
    why = changes or "nothing that the record knows of; accelerators may need deterministic algorithms"
    return f"Not identical to the record. What differs: {why}."
