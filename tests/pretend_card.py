"""A Triton driver without a card: kernels are compiled for an architecture through ptxas, and never launched.

What a compiler knows about a kernel is read off its code: registers, spills, shared memory, instructions of its loops.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 89, 90, 100)
_REGISTERS = 65536  # of a multiprocessor
# Shared memory that one program may take, shared memory and warps of a multiprocessor.
_LIMITS = {80: (166912, 167936, 64), 89: (101376, 102400, 48), 90: (232448, 233472, 64), 100: (232448, 233472, 64)}
_PRODUCTS = re.compile(r"HGMMA|HMMA|IGMMA|IMMA|QGMMA|UTC.*MMA")


def missing() -> str:
    """Return why kernels cannot be compiled and read here, or ""."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "Triton interprets its programs in this process"
    absent = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (_binaries() / name).exists()]
    return f"Triton ships no {', '.join(absent)} here" if absent else ""


def _binaries() -> Path:
    import triton.backends.nvidia as nvidia

    return Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel.

    Attributes:
        registers: Of each thread.
        spilled: Bytes of local memory of each thread.
        shared: Bytes of shared memory of a program.
        programs: Programs that fit on a multiprocessor at once.
        narrow_loads: Loads of two bytes from global memory.
        warps: Of a program.
        stages: Tiles that are loaded ahead.
        binary: The kernel itself.
    """

    registers: int
    spilled: int
    shared: int
    programs: int
    narrow_loads: int
    warps: int
    stages: int
    binary: bytes = field(repr=False)

    @functools.cached_property
    def loops(self) -> tuple[int, ...]:
        """Instructions of every innermost loop that multiplies on tensor cores, the shortest first.

        Taking a kernel apart lasts as long as a good part of its compilation, and few ask.
        """
        return tuple(_loops(self.binary))


class _Utils:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _LIMITS[self.arch][0], "multiprocessor_count": 132, "warpSize": 32,
                "max_num_regs": _REGISTERS, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}  # fmt: skip

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        registers, stack = _resources(kernel)
        return 1, 1, registers, stack // 4, 1024

    def unload_module(self, module: int) -> None:
        pass


class _Launcher:
    launched = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> None:
        _Launcher.launched += 1


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, _Utils(arch)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextlib.contextmanager
def card(arch: int) -> Iterator[None]:
    """Let Triton compile for an architecture, 80 to 100, whatever this machine has."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = before


def read(kernel: Any, arch: int) -> Code:
    """Read what the compiler made of a kernel that was launched on a pretend card."""
    registers, stack = _resources(kernel.kernel)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    by_registers = _REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    _, memory, most_warps = _LIMITS[arch]
    programs = min(by_registers, memory // (shared + 1024), most_warps // warps)
    narrow = len(re.findall(r"ld\.global\S*\.[bu]16 ", kernel.asm["ptx"]))
    return Code(registers, stack, shared, programs, narrow, warps, kernel.metadata.num_stages, kernel.kernel)


def _dump(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_binaries() / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _resources(cubin: bytes) -> tuple[int, int]:
    told = _dump("cuobjdump", cubin, "--dump-resource-usage")
    registers, stack, local = (re.search(rf"{name}:(\d+)", told) for name in ("REG", "STACK", "LOCAL"))
    assert registers is not None
    assert stack is not None
    assert local is not None
    return int(registers[1]), int(stack[1]) + int(local[1])


def _loops(cubin: bytes) -> list[int]:
    """Count the instructions of loops with products: from the target of a jump backwards to the jump."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = collections.OrderedDict()
    for line in _dump("nvdisasm", cubin, "-c").splitlines():
        if (label := re.match(r"\s*(\.L_x_\d+|\.L_\d+|\S+):\s*$", line)) and "/*" not in line:
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);", line):
            instructions.append((code[1], code[2]))
    found = []
    for i, (name, rest) in enumerate(instructions):
        target = re.search(r"`\((\.L[^)]*)\)", rest) if name.startswith("BRA") else None
        start = labels.get(target[1], i) if target else i
        if start < i and any(_PRODUCTS.match(n) for n, _ in instructions[start : i + 1]):
            found.append(i + 1 - start)
    return sorted(found)


def block_sparse_code(
    arch: int, width: int, *, block_q: int = 64, block_k: int = 64, dtype: torch.dtype = torch.bfloat16,
    ordered: bool = True, int8: bool = False,
) -> Code:  # fmt: skip
    """Compile the block-sparse kernel as one call with text would, laid out as hosts lay their heads out."""
    from attnctl.kernels.sparse import triton
    from attnctl.kernels.sparse.triton_forward import forward
    from attnctl.plans import BlockPlan

    n, text, heads = 1000, 77, 2
    keep = torch.ones(heads, -(-n // block_q), -(-n // block_k), dtype=torch.bool)
    order, grid = (["FWH", "HFW"], (4, 10, 25)) if ordered else (None, None)
    plan = BlockPlan.from_mask(keep, block_k, order, text, block_q=block_q, grid=grid, n_image=n)
    q, k, v = (torch.zeros(2, n + text, heads, width, dtype=dtype).transpose(1, 2) for _ in range(3))
    with card(arch):
        triton.run(q, k, v, plan, 0, slice(text, n + text), None, int8=int8)
        # A kernel that outlived the pretend card would ask for a real one to unload it.
        return read(list(forward.device_caches.pop(arch)[0].values())[-1], arch)
