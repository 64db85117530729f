"""What `import attnctl` costs and says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeGuard

import processes

# The yardstick makes classes, as an import does, so that a slow machine is slow at both.
TIMED = """
import dataclasses, sys, time, torch, diffusers
before = set(sys.modules)
begin = time.process_time()
for i in range(100):
    dataclasses.make_dataclass(f"Made{i}", [(f"field{j}", float, 1.0) for j in range(8)], frozen=True, kw_only=True)
middle = time.process_time()
import attnctl, attnctl.core.handle
print(time.process_time() - middle, middle - begin)
print(*(set(sys.modules) - before))
"""


MOST = 2.5  # times the yardstick: about 0.3 s where that takes 0.12 s


def run(code: str) -> str:
    """Run code where torch and diffusers are imported, and return what it printed."""
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_silent() -> None:
    code = "import attnctl, attnctl.kernels; attnctl.kernels.backends(); from attnctl.processors import PAG; PAG()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_import_is_quick() -> None:
    """Beyond torch and diffusers: few modules, all its own, in the time of 250 dataclasses."""
    times: list[float] = []
    while len(times) < 5 and min(times, default=9.0) >= MOST:
        first, modules = run(TIMED).splitlines()
        seconds, yardstick = map(float, first.split())
        times.append(seconds / yardstick)
        assert {name.partition(".")[0] for name in modules.split()} == {"attnctl"}
        assert len(modules.split()) <= 90
    assert min(times) < MOST, times


HEAVY = ("timm", "cv2", "matplotlib", "gradio", "tyro", "xformers.ops")
LOADED = """
import sys, torch, diffusers
before = set(sys.modules)
import attnctl, attnctl.core.handle
print(sorted(name for name in {heavy} if name in sys.modules and name not in before))
"""


def test_import_leaves_alone_what_it_does_not_need() -> None:
    assert run(LOADED.format(heavy=HEAVY)).strip() == "[]"


def test_public_names_are_importable() -> None:
    import attnctl
    import attnctl.processors

    for module in (attnctl, attnctl.processors):
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_lazy_names_are_not_modules() -> None:
    # Importing a module makes it an attribute of its package, where it would hide the object of the same name.
    import pkgutil

    import attnctl
    import attnctl.pipelines
    import attnctl.processors

    for package in (attnctl, attnctl.pipelines, attnctl.processors):
        assert not {m.name for m in pkgutil.iter_modules(package.__path__)} & set(package.__all__), package.__name__


def test_every_control_stands_in_the_table_of_names() -> None:
    import attnctl.processors
    from attnctl.core.registry import HOMES
    from attnctl.data.controls import controls

    folder = Path(attnctl.processors.__file__).parent
    declared = {
        node.name: ".".join(("attnctl.processors", *path.relative_to(folder).with_suffix("").parts))
        for path in folder.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and "about" in {n.target.id for n in node.body if _is_annotated(n)}
    }
    assert set(declared) == set(controls("attnctl"))
    assert declared.items() <= HOMES.items()
    assert set(attnctl.processors.__all__) <= set(dir(attnctl.processors))
    for name, module in HOMES.items():
        assert getattr(attnctl.processors, name).__module__ == module


def _is_annotated(node: ast.AST) -> TypeGuard[Any]:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def test_one_method_does_not_import_all_others() -> None:
    code = """
import sys, torch, diffusers
import attnctl.processors
assert not {"attnctl.core.control", "attnctl.processors.pag"} & set(sys.modules)
from attnctl.processors import PAG
assert "attnctl.processors.pag" in sys.modules and "attnctl.processors.nag" not in sys.modules
from attnctl.data.specs import control_to_dict, methods, parse_control
control_to_dict(parse_control("SEG(sites='mid')"))
assert "attnctl.processors.seg" in sys.modules and "attnctl.processors.nag" not in sys.modules
assert "NAG" in methods()
"""
    run(code)
