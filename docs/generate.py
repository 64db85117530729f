"""Write what the docs can read off the code: tables of methods and families, references of methods, the navigation.

    python docs/generate.py            # write the files anew
    python docs/generate.py --check    # name the files that are out of date

A file says where: what stands between `<!-- generated: NAME -->` and `<!-- end -->` (in YAML, `# generated: NAME` and
`# end`) is replaced. NAME is one of `methods`, `families`, `goals`, `cite`, `api`, `nav`, `claims...`, `coverage-...`
and `reproduce...`, or `reference` with the name of a control. What acts on which model is read from the result of
benchmarks/coverage.py, and what is claimed from benchmarks/claims.toml.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "docs")]  # the tiny models of the table of pairs; the claims

import claims  # noqa: E402

from attnctl.core.hosts.families import FAMILIES  # noqa: E402
from attnctl.data.catalogue import entry  # noqa: E402
from attnctl.data.controls import controls  # noqa: E402
from attnctl.data.coverage import stored  # noqa: E402
from attnctl.pipelines.reproduce.recipes import experiments  # noqa: E402
from attnctl.pipelines.reproduce.recipes import methods as recipes  # noqa: E402
from attnctl.pipelines.reproduce.report import CATALOGUE, catalogue_rows, markdown  # noqa: E402
from attnctl.processors import Guidance  # noqa: E402

__all__ = ["outdated", "written"]

DOCS = ROOT / "docs"
GROUPS = ("Guidance", "Words and layout", "Sharing", "Editing", "Video", "Speed")
MARK = re.compile(
    r"^([ ]*)(?:<!-- generated: (?P<html>[\w -]+) -->|# generated: (?P<yaml>[\w -]+))\n"
    r".*?^[ ]*(?:<!-- end -->|# end)$",
    re.MULTILINE | re.DOTALL,
)


def methods() -> dict[str, Any]:
    """List the package's controls by the kind of task that they are for, those of one page together."""
    known: dict[str, Any] = controls("attnctl")
    return dict(
        sorted(known.items(), key=lambda item: (GROUPS.index(item[1].about.group), *_order(item[1].about.page)))
    )


def _order(page: str) -> tuple[int, str]:
    return (page != "pag", page)  # the guidance that the others are told by comes first


@cache
def page(name: str) -> Path:
    """Find the page of a method.

    Raises:
        LookupError: There is none.
    """
    found = DOCS / "reference" / "methods" / f"{name}.md"
    if not found.is_file():
        raise LookupError(f"There is no page {found.relative_to(ROOT)}, which a control names as its `about.page`.")
    return found


def link(name: str, at: Path) -> str:
    """Return the address of a page from a file."""
    return Path(os.path.relpath(page(name), at.parent)).as_posix()


# What is written


def method_rows(at: Path) -> Iterator[str]:
    """Write a row for each method."""
    yield "| control | what it does | paper |"
    yield "|---|---|---|"
    for name, cls in methods().items():
        yield f"| [`{name}`]({link(cls.about.page, at)}) | {cls.about.does} | {cls.about.paper} |"


def goal_rows(at: Path) -> Iterator[str]:
    """Write a row for each goal, with the methods that serve it."""
    goals: dict[str, dict[str, list[str]]] = {}
    for name, cls in methods().items():
        pages = goals.setdefault(cls.about.goal, {})
        pages.setdefault(cls.about.page, []).append(cls.about.title or name)
    yield "| to | use |"
    yield "|---|---|"
    for goal, pages in goals.items():
        links = (f"[{', '.join(names)}]({link(name, at)})" for name, names in pages.items())
        yield f"| {goal} | {', '.join(links)} |"


def citations(at: Path) -> Iterator[str]:
    """Write the publications of all methods, each once."""
    named: dict[str, list[str]] = {}
    for name, cls in methods().items():
        for text in cls.about.cite:
            named.setdefault(text, []).append(f"`{name}`")
    yield from (f"- {text} ({', '.join(names)})" for text, names in named.items())


def claim_rows(at: Path) -> Iterator[str]:
    """Write what is claimed of each method and whether it is shown."""
    pages = {name: cls.about.page for name, cls in methods().items()} | claims.OTHERS
    yield from claims.rows(tuple(methods()), {name: link(page, at) for name, page in pages.items()})


def claim_counts(at: Path) -> Iterator[str]:
    """Say how many claims are shown."""
    yield from claims.counts(tuple(methods()))


def api_entries(at: Path) -> Iterator[str]:
    """Name every control for the pages that are made of docstrings."""
    for name in methods():
        yield f"::: attnctl.processors.{name}"
        yield ""


def navigation(at: Path) -> Iterator[str]:
    """Write the pages of the methods by group, for the site's menu."""
    for group in GROUPS:
        titles: dict[str, list[str]] = {}
        for name, cls in methods().items():
            if cls.about.group == group:
                titles.setdefault(cls.about.page, []).append(cls.about.title or name)
        yield f"- {group}:"
        for name, parts in titles.items():
            yield f"    - {', '.join(parts)}: {page(name).relative_to(DOCS).as_posix()}"


def family_rows(at: Path) -> Iterator[str]:
    """Write a row for each family of models, with the controls that act on its classes."""
    columns = [n for n, cls in methods().items() if issubclass(cls, Guidance)] + ["NAG", "Capture"]
    yield f"| family | published layers | {' | '.join(columns)} |"
    yield "|---" * (2 + len(columns)) + "|"
    for family in FAMILIES:
        default = family.published.get("Guidance")
        place = "name them" if default is None else default.describe()
        rows = [row for cls, row in stored().items() if cls in family.classes]
        ticks = (all(row.cell(n).state == "acts" for row in rows) and bool(rows) for n in columns)
        yield f"| {family.name} | {place} |{'|'.join(' ✓ ' if tick else '  ' for tick in ticks)}|"


def coverage_counts(at: Path) -> Iterator[str]:
    """Write on how many classes each control acts."""
    yield "| control | acts on | refuses in words | fault |"
    yield "|---|---|---|---|"
    for name in _run_controls():
        states = [row.cell(name).state for row in stored().values()]
        yield f"| `{name}` | {states.count('acts')} | {states.count('refused')} | {states.count('fault')} |"


def coverage_rows(at: Path) -> Iterator[str]:
    """Write a row for each denoiser class, with what every control did."""
    marks = {"acts": "✓", "refused": "–", "fault": "✗", "unknown": ""}
    names = _run_controls()
    yield f"| class | family | unchanged | {' | '.join(names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for cls, row in stored().items():
        cells = " | ".join(marks[row.cell(name).state] for name in names)
        yield f"| {cls} | {row.family} | {'✓' if row.through == 'exact' else '–'} | {cells} |"


def coverage_reasons(at: Path) -> Iterator[str]:
    """Write for each control why it refused, with the classes that a reason holds for."""
    for name in _run_controls():
        why: dict[str, list[str]] = {}
        for cls, row in stored().items():
            cell = row.cell(name)
            if cell.state in ("refused", "fault"):
                why.setdefault(_reason(cell.why), []).append(cls)
        if why:
            yield f"### {name}"
            yield ""
            yield from (f"- {_cell(reason)} ({', '.join(classes)})" for reason, classes in sorted(why.items()))
            yield ""


def _reason(error: str) -> str:
    """Shorten an error to its first sentence, with names of layers and numbers left out."""
    text = error.partition(": ")[2] if re.match(r"\w+Error: |NeverApplied: ", error) else error
    text = re.sub(r"\[[^]]{40,}\]", "[...]", text)
    text = re.split(r"(?<=[a-z)]{2})[.:;] (?=[A-Z])", text)[0].rstrip(".")
    text = re.sub(r"(?:[a-z_]+\d?\.)+\d+(?:\.\w+)*(?:, (?:\w+\.)+\w+)*", "a layer", text)
    return re.sub(r"\b\d[\d.]*\b", "n", text)[:240]


def _run_controls() -> list[str]:
    """Name the controls that were run on classes, in the order of the tables."""
    ran = {name for row in stored().values() for name in row.cells}
    return [name for name in methods() if name in ran]


def reference(at: Path, name: str) -> Iterator[str]:
    """Write what a control takes: fields, published layers, and what it cannot act together with."""
    one = entry(controls("attnctl")[name])
    yield f"Every field of `{name}`:"
    yield ""
    yield "| field | default | range | meaning |"
    yield "|---|---|---|---|"
    for f in one.fields:
        yield f"| `{f.name}` | {_cell(f.default)} | {_cell(f.range)} | {_cell(f.meaning)} |"
    if one.sites:
        yield ""
        yield "With `sites=None` it acts on the published layers of the model's family:"
        yield ""
        yield "| family | layers |"
        yield "|---|---|"
        yield from (f"| {family} | {_cell(place)} |" for family, place in one.sites)
    elif one.about is not None and one.about.sites:
        yield ""
        yield f"With `sites=None` it acts on {one.about.sites}."
    if one.conflicts:
        yield ""
        yield "It cannot act together with these, at the same time and place:"
        yield ""
        yield "| control | | because |"
        yield "|---|---|---|"
        yield from (f"| `{other}` | {where} | {reason} |" for other, where, reason in one.conflicts)


def reproduce_rows(at: Path) -> Iterator[str]:
    """Write the figures of every recipe, published and measured."""
    yield from markdown(CATALOGUE, list(catalogue_rows(ROOT / "benchmarks" / "results" / "reproduce")))


def reproduce_sources(at: Path) -> Iterator[str]:
    """Write of every experiment what it runs, where its published figures are from, and how it differs."""
    for method in recipes():
        for e in experiments(method):
            note = f" {e.note}" if e.note else ""
            source = f"{e.source[0].upper()}{e.source[1:]}."
            yield f"- `{e.label}` (arXiv {e.paper}). {e.about}. {source}{note}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS: dict[str, Callable[[Path], Iterator[str]]] = {
    "methods": method_rows,
    "goals": goal_rows,
    "cite": citations,
    "api": api_entries,
    "nav": navigation,
    "families": family_rows,
    "claims": claim_rows,
    "claims-counts": claim_counts,
    "coverage-counts": coverage_counts,
    "coverage-rows": coverage_rows,
    "coverage-reasons": coverage_reasons,
    "reproduce": reproduce_rows,
    "reproduce-sources": reproduce_sources,
}


def written(path: Path) -> str:
    """Return a file with its generated parts written anew."""

    def replace(found: re.Match[str]) -> str:
        part, _, name = (found["html"] or found["yaml"]).partition(" ")
        lines = reference(path, name) if part == "reference" else PARTS[part](path)
        first, last = found[0].split("\n", 1)[0], found[0].rsplit("\n", 1)[-1]
        indent = found[1]
        body = [f"{indent}{line}".rstrip() for line in lines]
        space = "" if found["yaml"] else "\n"
        return f"{first}\n{space}{chr(10).join(body).rstrip()}\n{space}{last}"

    return MARK.sub(replace, path.read_text(encoding="utf-8"))


def files() -> list[Path]:
    """List the files that have generated parts, and the table of pairs last."""
    known = [ROOT / "README.md", ROOT / "mkdocs.yml", *sorted(DOCS.rglob("*.md"))]
    return [path for path in known if MARK.search(path.read_text(encoding="utf-8"))]


def outdated() -> list[str]:
    """Name the files whose generated parts are not what the code says."""
    return [str(p.relative_to(ROOT)) for p in files() if written(p) != p.read_text(encoding="utf-8")]


def main() -> int:
    """Write the files, or with --check name those that are out of date."""
    import conftest  # noqa: F401  (offline, quiet, one thread)
    import pairs

    table = next(path for path in DOCS.rglob("pairs.md"))
    if "--check" in sys.argv[1:]:
        old = [*outdated(), *([] if table.read_text(encoding="utf-8") == pairs.markdown() else [str(table)])]
        print("\n".join(old) or "up to date")
        return 1 if old else 0
    for path in files():
        path.write_text(written(path), encoding="utf-8")
    table.write_text(pairs.markdown(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
