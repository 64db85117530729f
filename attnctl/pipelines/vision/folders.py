"""Folders of a user's pictures: a folder per class, or pictures beside masks; found, checked and split."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from attnctl.data.files import natural
from attnctl.data.picture_files import check_pixels
from attnctl.data.progress import tracked
from attnctl.errors import AttnctlError, ConfigError, nearest
from attnctl.plans.reading import Expected, check_regular, read_bytes

__all__ = ["IGNORED", "Masks", "Pictures", "Split", "check_pictures", "find_classes", "find_masks", "listed"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
IGNORED = 255
"""Value of a mask that counts for nothing, neither in training nor in scores."""
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")  # of no other does a decoder see the file
_PICTURE = Expected("a picture", ConfigError)
_NAMES = Expected("a list of classes", ConfigError, 1 << 20)
_HELD_OUT = ("val", "valid", "validation", "test")
Task = Literal["classify", "segment"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Pictures to train on and to evaluate on.

    Attributes:
        task: "classify" or "segment".
        classes: Names, in the order of their numbers.
        train, test: Pairs of a picture and its class number, or its mask.
        left_out: Visible files beside the pictures that are none by their names.
    """

    task: Task
    classes: tuple[str, ...]
    train: tuple[tuple[Path, Any], ...]
    test: tuple[tuple[Path, Any], ...]
    left_out: tuple[Path, ...] = ()

    def describe(self) -> str:
        """Say how many pictures there are, and of which classes."""
        names = ", ".join(self.classes[:12]) + (", ..." if len(self.classes) > 12 else "")
        rest = f"; {len(self.left_out)} other files are left out, such as {self.left_out[0]}" if self.left_out else ""
        return (
            f"{len(self.train)} pictures to train on, {len(self.test)} to test on; {len(self.classes)} classes: {names}"
            f"{rest}"
        )


def find_classes(data: Path, *, held_out: float = 0.2, seed: int = 0) -> Split:
    """Find pictures in DATA/train/CLASS and DATA/val/CLASS, or in DATA/CLASS, of which a share is held out per class.

    Raises: ConfigError for a missing or empty folder, one class, and classes that differ between train and test; it
    names the folder.
    """
    root = _folder(data)
    for part in (root, root / "train"):
        if part.is_dir() and {p.name for p in _visible(part) if p.is_dir()} == {"images", "masks"}:
            raise ConfigError(
                f"{part} holds images and masks, and no folder per class: train on them with `attnctl segment`."
            )
    first = root / "train"
    if first.is_dir():
        second = _other(root)
        train, test = _by_class(first), _by_class(second)
        if set(train) != set(test):
            only = sorted(set(train) ^ set(test))[0]
            here, there = (first, second) if only in train else (second, first)
            raise ConfigError(
                f"{here / only} is a class that {there} lacks.{nearest(only, list(test if only in train else train))} "
                "Both need a folder of each class."
            )
    else:
        train, test = _by_class(root), {}
        generator = torch.Generator().manual_seed(seed)
        for name, files in train.items():
            if len(files) < 2:
                raise ConfigError(f"{root / name} has one picture; a class needs two, one to train on and one to test.")
            order = torch.randperm(len(files), generator=generator).tolist()
            count = min(len(files) - 1, max(1, round(held_out * len(files))))
            test[name] = [files[i] for i in sorted(order[:count])]
            train[name] = [files[i] for i in sorted(order[count:])]
    classes = tuple(train)
    pairs = [tuple((f, n) for n, c in enumerate(classes) for f in part[c]) for part in (train, test)]
    folders = {f.parent for pair in pairs for f, _ in pair}
    return Split(
        task="classify", classes=classes, train=pairs[0], test=pairs[1],
        left_out=_others({root, *(f.parent for f in folders), *folders}),
    )  # fmt: skip


def find_masks(data: Path, *, held_out: float = 0.2, seed: int = 0) -> Split:
    """Find pictures in `images` and masks of the same name in `masks`, below DATA or DATA/train and DATA/val.

    A mask is a picture of one channel, or of a palette, whose values are class numbers; 255 counts for nothing. Names
    come from DATA/classes.txt, one a line; without it classes are called by their numbers.

    Raises: ConfigError for missing or empty folders, pictures without a mask, masks of another size, and values that
    are no class; it names the file.
    """
    root = _folder(data)
    if (root / "train").is_dir():
        parts = [_with_masks(root / "train"), _with_masks(_other(root))]
    else:
        every = _with_masks(root)
        if len(every) < 2:
            raise ConfigError(f"{root / 'images'} has one picture; two are needed, one to train on and one to test.")
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
        count = min(len(every) - 1, max(1, round(held_out * len(every))))
        parts = [[every[i] for i in sorted(chosen)] for chosen in (order[count:], order[:count])]
    names = root / "classes.txt"
    values = [_in_threads(_mask_values, part, "masks") for part in parts]
    if names.is_file():
        classes = _class_names(names)
    else:
        classes = [str(n) for n in range(max((max(v, default=0) for v in values[0]), default=0) + 1)]
    if len(classes) < 2:
        if names.is_file():
            raise ConfigError(f"{names} names {len(classes)} class; expected at least two, one per line.")
        raise ConfigError(
            f"The masks to train on below {root} hold the class 0 and no other ({IGNORED} counts for nothing); "
            f"expected at least two classes, numbered 0, 1 and so on. In black and white masks, write 1 for {IGNORED}."
        )
    for part, part_values in zip(parts, values, strict=True):
        for (_, mask), seen in zip(part, part_values, strict=True):
            strange = sorted(v for v in seen if v >= len(classes))
            if strange:
                raise ConfigError(
                    f"{mask} has the value {strange[0]}, but there are {len(classes)} classes, 0 to {len(classes) - 1}"
                    f"{' in ' + names.name if names.is_file() else ' in the masks to train on'}; {IGNORED} counts for "
                    "nothing. List every class in classes.txt, or mend the mask."
                )
    folders = {f.parent for part in parts for pair in part for f in pair}
    left_out = tuple(p for p in _others({root, *(f.parent for f in folders), *folders}) if p != names)
    return Split(task="segment", classes=tuple(classes), train=tuple(parts[0]), test=tuple(parts[1]), left_out=left_out)


def check_pictures(files: Sequence[Path]) -> None:
    """Read every picture once. Raises: ConfigError for one that cannot be read or is no plain picture; it names it."""
    _in_threads(open_picture, files, "pictures")


def open_picture(path: Path) -> Image.Image:
    """Open a picture as RGB, turned upright as its EXIF orientation says.

    Raises: ConfigError where it cannot be read, moves, has 16 bits a channel, or is made for print (CMYK).
    """
    with _opened(path) as image:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a phone's JPEG holds previews
        if frames > 1:
            raise ConfigError(f"{path} is animated ({frames} frames). Save the frame that you mean.")
        if image.mode.startswith(("I", "F")):
            raise ConfigError(f"{path} has more than 8 bits a channel ({image.mode}). Convert it to 8 bits.")
        if image.mode in ("CMYK", "LAB"):
            raise ConfigError(f"{path} has {image.mode} colours, whose look depends on a profile. Convert it to RGB.")
        return ImageOps.exif_transpose(image).convert("RGB")


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures with class numbers; `transform` is timm's, set by its loader."""

    transform: Callable[[Image.Image], Tensor] | None = None

    def __init__(self, pairs: Sequence[tuple[Path, int]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.pairs[index]
        image = open_picture(path)
        return (image if self.transform is None else self.transform(image)), label  # type: ignore[return-value]


class Masks(Dataset[tuple[Tensor, Tensor]]):
    """Pictures [3, size, size], normalised, with masks [size, size]; flipped and cropped while training.

    size: (height, width). mean, std: of timm's configuration of the model.
    """

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], size: tuple[int, int], mean: Any, std: Any, training: bool
    ) -> None:
        from torchvision.transforms import v2

        self.pairs, self.training = pairs, training
        augmented = [v2.RandomResizedCrop(size, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
        self._together = v2.Compose(augmented if training else [v2.Resize(size)])
        self._mean, self._std = (torch.tensor(x).reshape(3, 1, 1) for x in (mean, std))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors
        from torchvision.transforms.v2.functional import pil_to_tensor

        path, mask = self.pairs[index]
        picture = tv_tensors.Image(pil_to_tensor(open_picture(path)))
        image, target = self._together(picture, tv_tensors.Mask(torch.from_numpy(read_mask(mask))))
        return (image.float() / 255 - self._mean) / self._std, target.long()


def read_mask(path: Path) -> np.ndarray[Any, Any]:
    """Read class numbers [y, x]. Raises: ConfigError for a mask of several channels or of more than 8 bits."""
    with _opened(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ConfigError(f"{path} is animated ({image.n_frames} frames). Save the frame that you mean.")  # type: ignore[attr-defined]
        if image.mode not in ("L", "P", "1"):
            raise ConfigError(
                f"{path} has mode {image.mode}; expected one channel of class numbers (8-bit grey, or a palette)."
            )
        return np.array(image, np.uint8)


def listed(paths: Sequence[Path]) -> list[Path]:
    """List pictures: files as given, and those in folders in their natural order.

    Raises: ConfigError for a path that does not exist and a folder without pictures.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = _pictures(path)
            if not inside:
                raise ConfigError(f"{path} has no pictures ({', '.join(SUFFIXES)}).")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path} does not exist.")
    return files


def _class_names(path: Path) -> list[str]:
    try:
        lines = read_bytes(path, _NAMES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8: save it as UTF-8, with one class per line.") from None
    return [line.strip() for line in lines if line.strip()]


def _mask_values(pair: tuple[Path, Path]) -> set[int]:
    """Return the values of a mask; check that it is as large as its picture."""
    values = read_mask(pair[1])
    with _opened(pair[0]) as image:
        lies = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # stored sideways: see open_picture
        size = image.size[::-1] if lies else image.size
    if size != values.shape[::-1]:
        raise ConfigError(
            f"{pair[1]} is {values.shape[1]} x {values.shape[0]}, its picture {pair[0].name} {size[0]} x {size[1]}."
        )
    return set(np.unique(values).tolist()) - {IGNORED}


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise ConfigError that names the file, whatever its decoder raises: that depends on the damaged bytes."""
    try:
        yield
    except AttnctlError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ConfigError(
            f"{path} cannot be read: it is no picture, or damaged ({reason}). Mend it, or take it out of the folder."
        ) from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture whose format is one of those that are read, whatever its name says, and whose size is bounded."""
    check_regular(path, _PICTURE)
    with _explained(path), Image.open(path, formats=_FORMATS) as image:
        check_pixels(image.width, image.height, path.name, ConfigError)
        yield image


def _in_threads(work: Callable[[Any], Any], items: Sequence[Any], noun: str) -> list[Any]:
    with ThreadPoolExecutor(4) as pool:
        return list(tracked(pool.map(work, items), "file", f"check {noun}", total=len(items)))


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(
            f"{path} is no folder. Give one with a folder of pictures for every class, or images and masks."
        )
    return path


def _other(root: Path) -> Path:
    folders = [root / name for name in _HELD_OUT if (root / name).is_dir()]
    if not folders:
        raise ConfigError(f"{root} has train, but none of {', '.join(_HELD_OUT)} beside it.")
    return folders[0]


def _visible(folder: Path) -> list[Path]:
    """List what lies in a folder but for hidden files, such as those that macOS puts beside pictures."""
    return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=natural)


def _others(folders: set[Path]) -> tuple[Path, ...]:
    """List the visible files of folders that are no pictures by their names, and pictures beside folders of classes."""
    files = (p for folder in sorted(folders) for p in _visible(folder) if not p.is_dir())
    parents = {p.parent for p in folders}
    return tuple(p for p in files if p.suffix.lower() not in SUFFIXES or p.parent in parents)


def _pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder, no pipes or devices, and no link back to a folder above.

    Raises:
        ConfigError: A link to nothing, or pictures in a folder below.
    """
    pictures = []
    for path in _visible(folder):
        if path.is_dir():
            if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
                continue
            if inside := next((p for p in _visible(path) if p.suffix.lower() in SUFFIXES), None):
                raise ConfigError(
                    f"{inside} lies in a folder below {folder}: pictures are looked for in {folder} alone."
                )
        elif path.suffix.lower() in SUFFIXES:
            if not path.exists():
                raise ConfigError(f"{path} is a link to a file that does not exist. Mend it, or take it out.")
            if path.is_file():
                pictures.append(path)
    return pictures


def _name(text: str) -> str:
    """Return one spelling of a name whose accents may be written in two ways, as systems do."""
    return unicodedata.normalize("NFC", text)


def _by_class(root: Path) -> dict[str, list[Path]]:
    folders = [p for p in _visible(root) if p.is_dir()]
    if len(folders) < 2:
        raise ConfigError(f"{root} has {len(folders)} class folders; expected at least two, each with pictures.")
    classes = {_name(p.name): _pictures(p) for p in folders}
    if len(classes) < len(folders):
        raise ConfigError(f"{root} has two folders of the same name, with accents in two spellings. Merge them.")
    for name, files in classes.items():
        if not files:
            raise ConfigError(f"{root / name} has no pictures ({', '.join(SUFFIXES)}).")
    return classes


def _with_masks(root: Path) -> list[tuple[Path, Path]]:
    for name in ("images", "masks"):
        if not (root / name).is_dir():
            raise ConfigError(f"{root} has no folder {name}; expected images and masks with files of the same names.")
    images = _pictures(root / "images")
    masks: dict[str, Path] = {}
    for files, paths in ((_pictures(root / "masks"), masks), (images, {})):
        for path in files:
            if (name := _name(path.stem)) in paths:
                raise ConfigError(f"{path} and {paths[name].name} have one name: which mask belongs to which picture?")
            paths[name] = path
    if not images:
        raise ConfigError(f"{root / 'images'} has no pictures ({', '.join(SUFFIXES)}).")
    for image in images:
        if _name(image.stem) not in masks:
            raise ConfigError(
                f"{image} has no mask {root / 'masks' / image.stem}.png.{nearest(image.stem, list(masks))}"
            )
    return [(image, masks[_name(image.stem)]) for image in images]
