"""Files that have been tampered with, from a seed: every reader reads them or refuses them with an error of its own."""

from __future__ import annotations

import resource
import warnings
from pathlib import Path

import pytest
from reader_fuzz import Found, Reader, attempt, readers

TIMES = 150


@pytest.fixture(scope="module")
def every() -> dict[str, Reader]:
    return readers()


NAMES = (
    "record", "maps", "plan", "head set", "hunt log", "calibration store", "mp4", "png", "gif", "webp", "jpeg", "tiff",
    "bmp",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tampered_files(name: str, every: dict[str, Reader], tmp_path: Path) -> None:
    found, before = Found(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(TIMES):
            attempt(every[name], f"{name} {i}", found, tmp_path)
    assert found.foreign == []
    assert found.read + found.refused == TIMES
    assert found.refused > TIMES // 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 512 * 1024  # KiB


def test_untouched_files_are_read(every: dict[str, Reader], tmp_path: Path) -> None:
    assert set(every) == set(NAMES)
    for name, reader in every.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        for file, content in reader.files.items():
            (folder / file).write_bytes(content)
        reader.act(folder)
