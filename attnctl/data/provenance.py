"""Where a picture comes from: versions, hardware, model fingerprint, command line; never a machine path."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

__all__ = ["command_line", "fingerprint", "hardware", "versions"]

RECORDED = ("attnctl", "torch", "diffusers", "transformers")  # what can change the pixels of a CPU run
OPTIONAL = ("xformers",)


def versions(names: Sequence[str] = RECORDED, optional: Sequence[str] = OPTIONAL) -> dict[str, str]:
    """Name the versions of Python and of installed packages, without importing any of them."""
    by_name = {"python": platform.python_version()}
    for name in (*names, *optional):
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in names:
                by_name[name] = "not installed"
    return by_name


def hardware(device: str = "cpu") -> str:
    """Name what computes: the accelerator, or the instruction set that torch uses on this CPU."""
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def fingerprint(folder: str | Path) -> str:
    """Identify a local model folder by the names, sizes and samples of its files' contents."""
    digest = hashlib.sha256()
    window = 1 << 20
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}:".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - window // 2), max(0, size - window)}):
                file.seek(start)
                digest.update(file.read(window))
    return f"sha256:{digest.hexdigest()[:32]}"


_ROOTED = re.compile(r"""(?<=["'=])(?:~?/|\.{1,2}/|[A-Za-z]:\\)[^"']*""")


def command_line(argv: Sequence[str]) -> str:
    """Join a command line with every machine path cut down to its last part."""

    def last(text: str) -> str:
        return PureWindowsPath(text).name or text  # splits at both kinds of slashes

    def clean(arg: str) -> str:
        rooted = arg.startswith(("/", "~/", "./", "../")) or PureWindowsPath(arg).drive
        if rooted or (os.sep in arg and len(arg) < 4096 and os.path.exists(arg)):
            return last(arg)
        return _ROOTED.sub(lambda match: last(match[0]), arg)

    return shlex.join([last(argv[0]), *map(clean, argv[1:])]) if argv else ""
