"""The shape of the package: its root, the direction of imports, and the length of its files and functions.

Local and typing-only imports count like any others.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import attnctl

PACKAGE = Path(attnctl.__file__).parent
CLONE = PACKAGE.parent
LAYERS = (
    ("errors",),
    ("plans",),
    ("kernels",),
    ("core",),
    ("data",),
    ("processors",),
    ("backbones", "shapes"),
    ("pipelines",),
    ("app",),
)
FRONT = {"__init__", "__main__"}  # the face of the package may name everything, and nothing names it
CORE_LINES = 2199  # no more than now, which can be read in an hour
FILE_LINES = 400
FUNCTION_LINES = 60


def _modules() -> dict[str, Path]:
    paths = PACKAGE.rglob("*.py")
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def _imports() -> dict[str, set[str]]:
    modules = _modules()
    imports: dict[str, set[str]] = {}
    for name, path in modules.items():
        imports[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "attnctl":
                base = (node.module or "").removeprefix("attnctl").strip(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".strip(".")
                    imports[name].add(full if full in modules else base)
            elif isinstance(node, ast.Import):
                imports[name] |= {a.name.removeprefix("attnctl.") for a in node.names if a.name.startswith("attnctl.")}
        imports[name].discard(name)
    return {n: {i for i in found if i and i not in FRONT} for n, found in imports.items() if n not in FRONT}


def test_the_root_holds_the_layers_alone() -> None:
    entries = {p.stem for p in PACKAGE.iterdir() if p.suffix in ("", ".py") and p.name != "__pycache__"}
    assert entries <= {name for layer in LAYERS for name in layer} | FRONT


@pytest.mark.skipif(not (CLONE / "tests").is_dir(), reason="the package is installed without its clone")
def test_methods_and_jobs_are_reached_from_the_root_of_a_clone() -> None:
    for name in ("processors", "pipelines"):
        assert (CLONE / name).resolve() == (PACKAGE / name).resolve()


def test_imports_point_down() -> None:
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{module} -> {imported}"
        for module, imports in _imports().items()
        for imported in sorted(imports)
        if height[imported.split(".")[0]] > height[module.split(".")[0]]
    ]
    assert not upward


def test_backbones_and_shapes_do_not_know_each_other() -> None:
    pairs = ("backbones", "shapes"), ("shapes", "backbones")
    crossing = [
        f"{module} -> {imported}"
        for module, imports in _imports().items()
        for imported in sorted(imports)
        if (module.split(".")[0], imported.split(".")[0]) in pairs
    ]
    assert not crossing


def test_no_file_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(_imports()).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_the_core_can_be_read_in_an_hour() -> None:
    files = [p for p in (PACKAGE / "core").rglob("*.py") if "hosts" not in p.parts]
    lines = {p.name: len(p.read_text().splitlines()) for p in files}
    assert sum(lines.values()) <= CORE_LINES, lines


def _code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Count the lines of a function without its docstring, comments and blank lines."""
    body = function.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    skipped = range(body[0].lineno, (body[0].end_lineno or 0) + 1) if documented else range(0)
    lines = [n for n in range(function.lineno, (function.end_lineno or 0) + 1) if n not in skipped]
    return sum(bool(text := source[n - 1].strip()) and not text.startswith("#") for n in lines)


def test_no_function_is_long() -> None:
    long = []
    for name, path in _modules().items():
        source = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(source))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _code_lines(node, source) > FUNCTION_LINES:
                long.append(f"{name}.{node.name}: {_code_lines(node, source)}")
    assert not long


@pytest.mark.skipif(not (CLONE / "tests").is_dir(), reason="the package is installed without its clone")
def test_no_file_is_long() -> None:
    folders = ("attnctl", "tests", "benchmarks", "examples", "docs")
    files = [p for folder in folders for p in (CLONE / folder).rglob("*.py") if not p.name.startswith("zoo")]
    lines = {str(p.relative_to(CLONE)): len(p.read_text().splitlines()) for p in files}
    assert not {name: n for name, n in lines.items() if n > FILE_LINES}
