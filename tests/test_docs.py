"""The docs hold together: pages, links, pictures, code blocks, reference, and the site that is built of them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnctl.app.cli import _COMMANDS, _parse
from attnctl.data.controls import controls
from attnctl.data.specs import methods, parse_control, parse_option

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OWN = ("README", "CONTRIBUTING", "UPGRADING", "SECURITY", "CHANGELOG")
TEXTS = [*PAGES, *(ROOT / f"{n}.md" for n in OWN), *sorted((ROOT / "examples").glob("*.md"))]
METHODS = sorted({cls.about.page for cls in controls("attnctl").values()} | {"backbones", "hunt", "refam"})  # type: ignore[attr-defined]
SECTIONS = (*("What it does", "Formula", "When to use it", "Cost", "Parameters", "Before and after", "Limits", "Cite"),)
PUBLIC = ("attnctl", *(f"attnctl.{n}" for n in ("processors", "pipelines", "backbones", "kernels", "plans", "shapes")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LARGEST = 150_000
ALL_PICTURES = 3_000_000


def name(path: Path) -> str:
    """Name a file for a test's id."""
    return str(path.relative_to(ROOT))


def config() -> dict[str, Any]:
    """Read the site's configuration."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return found


def leaves(nav: Any) -> Iterator[str]:
    """List the pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(item)


def prose(path: Path) -> str:
    """Return a page without its code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_navigation_holds_every_page_once() -> None:
    listed = list(leaves(config()["nav"]))
    assert len(set(listed)) == len(listed)
    assert set(listed) == {str(p.relative_to(DOCS)) for p in PAGES}


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_and_pictures_resolve(path: Path) -> None:
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if DOCS in path.parents:  # the site has nothing else
            assert DOCS in there.parents, target
        if anchor:
            assert anchor in anchors(there), target


def test_pictures_are_small_and_used() -> None:
    pictures = sorted((DOCS / "assets").iterdir())
    used = {Path(t).name for path in TEXTS for t in LINK.findall(prose(path))}
    assert {p.name for p in pictures} <= used
    assert sum(p.stat().st_size for p in pictures) <= ALL_PICTURES
    large = {p.name for p in pictures if p.stat().st_size > LARGEST and not p.name.startswith("ui-")}
    assert large <= {"demo.png"}


def test_diagrams_are_as_the_script_draws_them() -> None:
    spec = importlib.util.spec_from_file_location("diagrams", DOCS / "diagrams.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = {f"{name}.svg": draw().svg() for name, draw in script.DIAGRAMS.items()}
    assert drawn == {p.name: p.read_text(encoding="utf-8") for p in (DOCS / "diagrams").iterdir()}
    used = {Path(t).name for path in TEXTS for t in LINK.findall(prose(path))}
    assert set(drawn) <= used


@pytest.mark.parametrize("page", METHODS)
def test_method_pages_share_their_sections(page: str) -> None:
    text = FENCE.sub("", (DOCS / f"reference/methods/{page}.md").read_text(encoding="utf-8"))
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == SECTIONS
    assert re.search(r"\d{4}\.\d{5}|[Nn]o picture", text)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_python_blocks_compile(path: Path) -> None:
    for language, code in FENCE.findall(path.read_text(encoding="utf-8")):
        if language in ("python", "py"):
            ast.parse(textwrap.dedent(code))


def test_the_gallery_shows_every_script_and_every_picture() -> None:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f"({path.name})" in text, path.name
    sections = text.split("## Gallery")[1].split("\n### ")[1:]
    for section in sections:
        form = r"^!\[.*\]\(\.\./docs/assets/\S+\.png\)\n\n```bash\n\S.*\n```$"
        assert re.search(form, section, re.MULTILINE), section
    shown = set(re.findall(r"docs/assets/(\S+)\)", text))
    assert shown >= {p.name for p in (DOCS / "assets").iterdir() if not p.name.startswith("ui-")}


def test_shown_scripts_exist() -> None:
    for path in TEXTS:
        for script in re.findall(r"\b((?:examples|benchmarks|tests)/[\w/]+\.py)", path.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), (path.name, script)


def test_the_template_is_the_example() -> None:
    _, code = FENCE.findall((DOCS / "tutorial/own_control.md").read_text(encoding="utf-8"))[0]
    assert code.strip() in (ROOT / "examples" / "own_control.py").read_text(encoding="utf-8")


def commands(path: Path, *, whole: bool) -> Iterator[list[str]]:
    """List the commands that a page prints, in words: those of its blocks, or those in its lines."""
    text = path.read_text(encoding="utf-8")
    blocks = [code for language, code in FENCE.findall(text) if language in ("", "bash")]
    lines = [line for code in blocks for line in code.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for line in lines if whole else spans:
        for part in re.split(r"&&|\|\s", line):
            if re.match(r"\s*(attnctl|python|pytest|torchrun|accelerate) ", part):
                yield shlex.split(part, comments=True)


def arguments(words: list[str]) -> list[str] | None:
    """Return what is handed to attnctl, or None where something else is run."""
    if words[0] == "attnctl":
        return words[1:]
    if words[0] in ("python", "torchrun", "accelerate") and "attnctl" in words:  # -m attnctl
        return words[words.index("attnctl") + 1 :]
    return None


@functools.cache
def options(command: str) -> frozenset[str]:
    """Read the options of a command of attnctl out of its help."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        _parse([command, "--help"])
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z-]*", said.getvalue()))


def script_options(path: Path) -> set[str]:
    """Read the options of a script off its code: those that it adds itself, and those of the examples' runner."""
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"\"(--[\w-]+)\"", text))
    if "from _run import" in text:
        names |= set(re.findall(r"\"(--[\w-]+)\"", (path.parent / "_run.py").read_text(encoding="utf-8")))
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id == "arguments":
                names |= {f"--{word.arg.replace('_', '-')}" for word in call.keywords if word.arg}
    return names


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_printed_commands_are_understood(path: Path) -> None:
    for words in commands(path, whole=True):
        given = arguments(words)
        if given is not None:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    asked = _parse(given)
                except SystemExit:
                    pytest.fail(f"{shlex.join(words)}: {said.getvalue()}")
            for text in getattr(asked, "control", ()):
                parse_control(text)
            for text in getattr(asked, "option", ()):
                parse_option(text)
    for words in (*commands(path, whole=True), *commands(path, whole=False)):
        given = arguments(words)
        if given is not None:
            assert not given or given[0] in _COMMANDS, words
            known: Collection[str] = options(given[0]) if given else ()
        elif words[0] == "pytest":
            known = {"--cov", "--dist", "--hypothesis-profile"}
            assert all((ROOT / w).is_file() for w in words if w.startswith("tests/")), words
        elif words[0] == "python" and words[1].endswith(".py"):
            known = script_options(ROOT / words[1])
        else:
            continue
        asked_for = {w.partition("=")[0] for w in words[1:] if w.startswith("--")}
        if given is not None:
            asked_for = {w.partition("=")[0] for w in given if w.startswith("--")}
        assert asked_for <= set(known), words


def test_the_page_of_commands_tells_of_each_and_of_its_own_options() -> None:
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    sections = re.split(r"^## attnctl ", text, flags=re.MULTILINE)[1:]
    assert {section.split()[0] for section in sections} == set(_COMMANDS)
    for section in sections:
        command = section.split()[0]
        # Other programs, such as torchrun, have options of their own.
        told = re.sub(r"`(?!attnctl )[\w./ -]+ -m\s+attnctl [^`]*`", "", section)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", told)) <= options(command), command


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_python_blocks_use_names_and_fields_that_exist(path: Path) -> None:
    for language, code in FENCE.findall(path.read_text(encoding="utf-8")):
        if language not in ("python", "py"):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(code))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "attnctl":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "attnctl":
                there = hasattr(importlib.import_module("attnctl"), node.attr)
                assert there or importlib.util.find_spec(f"attnctl.{node.attr}"), node.attr
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in methods():
                fields = {field.name for field in dataclasses.fields(methods()[node.func.id])}
                assert {k.arg for k in node.keywords if k.arg} <= fields, ast.unparse(node)


def test_every_public_name_is_in_the_reference() -> None:
    pages = (DOCS / "reference" / "api").glob("*.md")
    shown = {n for p in pages for n in re.findall(r"^::: (\S+)$", p.read_text(), re.MULTILINE)}
    for module in PUBLIC:
        names = {f"{module}.{n}" for n in importlib.import_module(module).__all__ if not n.startswith("__")}
        assert names <= shown, sorted(names - shown)
    for entry in shown:
        module, _, attribute = entry.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), entry


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "attnctl").symlink_to(ROOT / "attnctl")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.search(r"warning|griffe:", said, re.IGNORECASE), said
    for page in leaves(config()["nav"]):
        html = (tmp_path / "site" / page).with_suffix(".html").read_text(encoding="utf-8")
        assert "</html>" in html
    reference = (tmp_path / "site" / "reference" / "api" / "processors.html").read_text(encoding="utf-8")
    assert "attnctl.processors.PAG" in reference
