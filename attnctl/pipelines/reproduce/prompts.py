"""What is asked of a model: shipped lists, a user's file, COCO's captions, clips with what they shall become."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnctl.data.files import natural
from attnctl.data.picture_files import SUFFIXES
from attnctl.errors import ConfigError, nearest
from attnctl.pipelines.reproduce.recipes import Experiment, Variant
from attnctl.plans.reading import Expected, read_bytes, read_json

__all__ = ["Asked", "asked", "check_extras", "controls_of", "pictures_in", "read_prompts"]

FOLDER = Path(__file__).parent / "prompts"
_LIST = Expected("a list of prompts, one per line", ConfigError, 64 << 20)
_CAPTIONS = Expected("COCO's captions", ConfigError, 512 << 20)
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
_MOST = 1_000_000


@dataclass(frozen=True)
class Asked:
    """One picture, video or edit that is asked for.

    Attributes:
        index: Number of it in the experiment.
        prompt: What it shall show.
        seed: Seed of its noise.
        extra: What stands beside the prompt: its words, a negative prompt, or what a clip shows now.
        clip: The clip to edit: a path, or frames [n, height, width, 3]; None where nothing is edited.
    """

    index: int
    prompt: str
    seed: int
    extra: str = ""
    clip: Any = None


def asked(
    experiment: Experiment,
    pictures: int | None = None,
    seed: int = 0,
    prompts: Path | None = None,
    coco: Path | None = None,
    clips: Path | None = None,
    plan: bool = False,
) -> tuple[Asked, ...]:
    """List what an experiment asks for.

    Args:
        experiment: The experiment.
        pictures: Pictures of each variant; None for the experiment's.
        seed: Of the first picture; picture i has seed + i.
        prompts: A text file of prompts, one per line, or a folder of them, in place of the experiment's list.
        coco: COCO's folder: its captions take the place of the list.
        clips: A folder of clips, for an experiment that edits them.
        plan: Whether only the cost is wanted, for which a clip need not be there.

    Raises:
        ConfigError: There is no prompt or clip, or a prompt lacks what its controls need.
    """
    if experiment.edits:
        absent = plan and clips is None
        lines = _toy_edits(pictures or 2) if experiment.toy else [("", "", None)] if absent else _edits(clips)
    else:
        rows = _lines_of(experiment, prompts, coco)
        lines = [(f"{experiment.prefix}{prompt}", extra, None) for prompt, extra in rows]
    count = pictures or experiment.pictures or len(lines)
    if experiment.edits:
        count = min(count, len(lines))
    if not 1 <= count <= _MOST:
        raise ConfigError(f"{count} pictures were asked for; expected 1 to {_MOST}.")
    picked = [lines[i // experiment.seeds % len(lines)] for i in range(count)]
    return tuple(Asked(i, prompt, seed + i, extra, clip) for i, (prompt, extra, clip) in enumerate(picked))


def controls_of(experiment: Experiment, variant: Variant, one: Asked, plan: str = "", heads: Any = None) -> list[str]:
    """Return a variant's controls for one prompt, as the command line takes them."""
    words = tuple(word.strip() for word in one.extra.split(",") if word.strip())
    put = {"words": repr(words), "extra": repr(one.extra), "prompt": repr(one.prompt), "plan": repr(plan)}
    if "{heads}" in str(variant.controls):
        put["heads"] = repr(_pairs(experiment.heads) if heads is None else heads)
    return [re.sub(r"\{(\w+)\}", lambda match: put[match[1]], text) for text in variant.controls]


def check_extras(experiment: Experiment, wanted: Sequence[Asked]) -> None:
    """Raise ConfigError for a prompt without the words that a control or a metric needs."""
    controls = str([v.controls for v in experiment.variants])
    what = "words" if "{words}" in controls else "a negative prompt" if "{extra}" in controls else ""
    lacking = next((one for one in wanted if what and not one.extra.strip(" ,")), None)
    if lacking is not None:
        raise ConfigError(
            f"The prompt {lacking.prompt!r:.120} has no {what.removeprefix('a ')} beside it, which {experiment.label} "
            f"needs: write {what} behind a bar, as in 'a cat and a frog | cat, frog'."
        )


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Read prompts, and what stands behind their bars, from a text file or from all text files of a folder.

    Raises:
        ConfigError: There is none, or a file is no text.
    """
    if not path.exists():
        raise ConfigError(
            f"There is no file or folder of prompts {path}. Expected text files with one prompt per line."
        )
    files = sorted(path.glob("*.txt"), key=natural) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"The folder of prompts {path} is empty: expected text files (.txt), one prompt per line.")
    rows = [row for file in files for row in _rows(file)]
    if not rows:
        raise ConfigError(f"There is no prompt in {path}: expected one per line.")
    return rows


def pictures_in(folder: Path, what: str = "pictures") -> list[Path]:
    """List the pictures of a folder and of the folders in it.

    Raises:
        ConfigError: It is missing, no folder, or holds none.
    """
    if not folder.is_dir():
        raise ConfigError(f"There is no folder of {what} {folder}. Expected pictures ({', '.join(SUFFIXES)}).")
    pictures = sorted((p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()), key=str)
    if not pictures:
        raise ConfigError(f"The folder of {what} {folder} is empty: expected pictures ({', '.join(SUFFIXES)}).")
    return pictures


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    try:
        text = read_bytes(file, _LIST).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file.name} is no text in UTF-8: expected one prompt per line.") from None
    for line in text.splitlines():
        prompt, _, extra = line.partition("|")
        if prompt.strip():
            yield prompt.strip(), extra.strip()


def _lines_of(experiment: Experiment, prompts: Path | None, coco: Path | None) -> list[tuple[str, str]]:
    if experiment.prompts == "none":
        return [("", "")]
    if prompts is not None:
        return read_prompts(prompts)
    if coco is not None:
        return [(caption, "") for caption in _captions(coco)]
    if experiment.toy:
        return list(_toy_lines(experiment.prompts))
    return read_prompts(FOLDER / f"{experiment.prompts}.txt")


def _captions(folder: Path) -> list[str]:
    """Read one caption per picture of COCO, or of pictures with text files beside them."""
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}. Expected COCO's, with captions_val2014.json and its pictures.")
    files = sorted(folder.rglob("captions_*.json"))
    if not files:
        beside = [p.with_suffix(".txt") for p in pictures_in(folder) if p.with_suffix(".txt").is_file()]
        lines = [next(_rows(p), ("", ""))[0] for p in beside]
        if not any(lines):
            raise ConfigError(
                f"{folder} has no captions: expected captions_val2014.json or the like in it, or a text file beside "
                "each picture."
            )
        return [line for line in lines if line]
    data = read_json(files[0], _CAPTIONS)
    notes = data.get("annotations") if isinstance(data, dict) else None
    first: dict[Any, str] = {}
    for note in notes if isinstance(notes, list) else ():
        if isinstance(note, dict) and isinstance(note.get("caption"), str) and note["caption"].strip():
            first.setdefault(str(note.get("image_id")), " ".join(note["caption"].split()))
    if not first:
        raise ConfigError(f"{files[0].name} holds no captions: expected COCO's `annotations`, each with a caption.")
    return list(first.values())


def _edits(folder: Path | None) -> list[tuple[str, str, Any]]:
    """Read a user's clips; the text file beside each says what it shows and what it shall show."""
    form = "videos, each with a text file of its name: what it shows, and in a second line what it shall show"
    if folder is None:
        raise ConfigError(f"This experiment edits clips of yours: give --clips DIR, a folder of {form}.")
    if not folder.is_dir():
        raise ConfigError(f"There is no folder of clips {folder}. Expected {form}.")
    clips = [p for p in folder.iterdir() if p.is_dir() or p.suffix.lower() in _VIDEOS]
    rows: list[tuple[str, str, Any]] = []
    for clip in sorted(clips, key=natural):
        note = folder / f"{clip.stem}.txt"
        lines = [" ".join(row[0].split()) for row in _rows(note)] if note.is_file() else []
        if len(lines) != 2:
            raise ConfigError(f"{note.name} has {len(lines)} lines for {clip.name}, expected two: give {form}.")
        rows.append((lines[1], lines[0], clip))
    if not rows:
        raise ConfigError(f"The folder of clips {folder} is empty. Expected {form}.")
    return rows


def _toy_lines(name: str) -> Iterator[tuple[str, str]]:
    """Yield prompts of the shapes world."""
    from attnctl.shapes import clip_prompts, pair_prompts, parse

    if name == "toy motions":
        yield from ((prompt, "") for prompt in clip_prompts(0, 8))
        return
    if name not in ("toy pairs", "toy negatives"):
        raise ConfigError(f"There are no prompts {name!r}.{nearest(name, ('toy pairs', 'toy negatives'))}")
    for prompt in pair_prompts(0, 8):
        first, second = parse(prompt).things[:2]
        words = f"{first.shape}, {second.shape}"
        yield prompt, words if name == "toy pairs" else f"a {second.color} {second.shape}"


def _toy_edits(count: int) -> list[tuple[str, str, Any]]:
    """Draw clips of the shapes world, and ask for another colour."""
    import numpy as np

    from attnctl.shapes import COLORS, clip_caption, render_clip, sample_clip

    rows: list[tuple[str, str, Any]] = []
    for i in range(count):
        clip = sample_clip(np.random.default_rng(i), frames=4)
        (thing,) = clip.scene.things
        color = next(c for c in COLORS if c != thing.color)
        source = clip_caption(clip, motion=False)
        rows.append((source.replace(thing.color, color, 1), source, render_clip(clip, 4)))
    return rows


def _pairs(labels: str) -> tuple[tuple[Any, int], ...]:
    from attnctl.plans import HeadSet

    return HeadSet.from_labels(labels).pairs
