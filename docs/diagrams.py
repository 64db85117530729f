"""Draw the diagrams of the docs as SVG: `python docs/diagrams.py` writes `docs/diagrams/*.svg`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "diagrams"
INK, SOFT, LINE = "#1f2933", "#52606d", "#9aa5b1"
PAPER, BLUE, GREEN, AMBER, ROSE, GREY = "#ffffff", "#d6e8fa", "#d9f0dd", "#fdeec2", "#fadbd8", "#eceff3"


class Drawing:
    """Collect the shapes of one diagram, in pixels from the top left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str, *lines: str, size: int = 14, bold: bool = True):
        """Draw a rounded box with centred lines of text, the first one bold."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" fill="{fill}" stroke="{LINE}"/>'
        )
        step = size + 4
        top = y + h / 2 - step * (len(lines) - 1) / 2 + size * 0.35
        for i, line in enumerate(lines):
            first = bold and not i
            self.text(x + w / 2, top + i * step, line, size=size if not i else size - 2, anchor="middle", bold=first)

    def cell(self, x: float, y: float, w: float, h: float, fill: str) -> None:
        """Draw a rectangle without text."""
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{LINE}"/>')

    def text(
        self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "start", bold: bool = False,
        color: str = INK,
    ) -> None:  # fmt: skip
        """Write one line of text; y is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{weight}>'
            f"{escape(words)}</text>"
        )

    def line(self, *points: tuple[float, float], color: str = SOFT, dashed: bool = False, head: bool = True) -> None:
        """Draw a line through points, with an arrow head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        end = ' marker-end="url(#head)"' if head else ""
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dash}{end}/>')

    def svg(self) -> str:
        """Return the whole file."""
        body = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="system-ui, sans-serif" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{SOFT}"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )


def layers() -> Drawing:
    """Draw the folders of the package; each imports only from those below it."""
    rows = (
        (("app", "command line and page"),),
        (("pipelines", "whole jobs: generate, edit, hunt, calibrate, train"),),
        (("backbones", "timm models and swaps"), ("shapes", "shipped models, renderer, judge")),
        (("processors", "the methods: one method, one file"),),
        (("data", "maps, records, pictures, clips"),),
        (("core", "put a model under control, take it off"), ("core/hosts", "every fact about diffusers")),
        (("kernels", "functions on tensors: no model, no state"),),
        (("plans", "what is saved about a model: heads, blocks, orders"),),
        (("errors", "every error raised on purpose"),),
    )
    d = Drawing(720, 60 + 58 * len(rows), "The layers of the package: imports point down")
    fills = (GREY, AMBER, BLUE, GREEN, BLUE, ROSE, BLUE, GREY, GREY)
    for i, (row, fill) in enumerate(zip(rows, fills, strict=True)):
        width = (560 - 10 * (len(row) - 1)) / len(row)
        for j, (name, words) in enumerate(row):
            d.box(120 + j * (width + 10), 28 + 58 * i, width, 48, fill, name, words)
    d.line((60, 56), (60, 20 + 58 * len(rows)))
    d.text(12, 30, "imports point", size=13, color=SOFT)
    d.text(12, 47, "down", size=13, color=SOFT)

    return d


def step() -> Drawing:
    """Draw one step of a run in time, with its base, perturbed and extra pass."""
    d = Drawing(980, 470, "One step in time: base pass, perturbed pass, extra pass")
    lanes = ("pipeline", "hooks of the denoiser", "base pass", "perturbed pass", "extra pass", "scheduler")
    top, height, left = 46, 62, 170
    for i, lane in enumerate(lanes):
        y = top + i * height
        d.cell(10, y, 960, height, PAPER if i % 2 else "#f8fafb")
        d.text(22, y + height / 2 + 5, lane, bold=True)
    d.text(left, 32, "time", color=SOFT)
    d.line((left + 36, 28), (960, 28))

    def at(lane: str, x: float, w: float, fill: str, *words: str) -> None:
        d.box(left + x, top + lanes.index(lane) * height + 8, w, height - 16, fill, *words, size=13)

    def middle(lane: str) -> float:
        return top + lanes.index(lane) * height + height / 2

    at("pipeline", 0, 110, GREY, "1 call denoiser", "[negative, prompt]")
    at("hooks of the denoiser", 40, 132, ROSE, "2 read the call", "step, rows, grid, words")
    at("extra pass", 90, 146, AMBER, "3 before_call", "gradients move latents")
    at("base pass", 224, 150, BLUE, "4 all rows", "controls wrap attention")
    at("perturbed pass", 388, 166, GREEN, "5 prompt rows only", "starts at first changed block")
    at("hooks of the denoiser", 566, 118, ROSE, "6 add w (c - p)", "to both halves")
    at("pipeline", 640, 150, GREY, "7 combine", "u + s (c - u), as ever")
    at("scheduler", 668, 122, GREY, "8 step", "counts the steps")
    d.line((left + 60, middle("pipeline") + 23), (left + 60, middle("hooks of the denoiser") - 24))
    d.line((left + 106, middle("hooks of the denoiser") + 23), (left + 140, middle("extra pass") - 24), dashed=True)
    d.line((left + 172, middle("hooks of the denoiser")), (left + 236, middle("base pass") - 24))
    d.line((left + 236, middle("extra pass")), (left + 250, middle("base pass") + 24), dashed=True)
    d.line((left + 374, middle("base pass")), (left + 420, middle("perturbed pass") - 24))
    d.line((left + 540, middle("perturbed pass") - 23), (left + 590, middle("hooks of the denoiser") + 24))
    d.line((left + 684, middle("hooks of the denoiser") - 10), (left + 700, middle("pipeline") + 24))
    d.line((left + 760, middle("pipeline") + 23), (left + 760, middle("scheduler") - 24))
    d.text(
        22,
        444,
        "Without a guidance, 5 and 6 do not run; without a control that moves latents, 3 does not run.",
        color=SOFT,
    )
    return d


def joint() -> Drawing:
    """Draw the joint attention map with the rows and columns that each scope of a perturbation changes."""
    d = Drawing(920, 366, "Joint attention: rows are queries, columns are keys; what each scope changes")
    names = ('scope="image_block"', 'scope="image"', 'scope="all"')
    text, image, size = 60, 160, 20
    for p, name in enumerate(names):
        x0, y0 = 60 + p * 290, 70
        d.text(x0 + (text + image) / 2, 34, name, anchor="middle", bold=True, size=15)
        d.text(x0 + text / 2, 60, "text", anchor="middle", size=12, color=SOFT)
        d.text(x0 + text + image / 2, 60, "image", anchor="middle", size=12, color=SOFT)
        kept = GREY if name == names[2] else BLUE
        d.cell(x0, y0, text, text, kept)
        d.cell(x0 + text, y0, image, text, kept)
        d.cell(x0, y0 + text, text, image, BLUE if name == names[0] else GREY)
        d.cell(x0 + text, y0 + text, image, image, GREY)
        start = 0 if name == names[2] else text
        for i in range(start, text + image, size):
            d.cell(x0 + i, y0 + i, size, size, ROSE)
        if not p:
            d.text(x0 - 8, y0 + text / 2 + 4, "text", anchor="end", size=12, color=SOFT)
            d.text(x0 - 8, y0 + text + image / 2 + 4, "image", anchor="end", size=12, color=SOFT)
    for x, fill, words in (
        (60, BLUE, "unchanged"),
        (250, ROSE, "each token attends to itself"),
        (560, GREY, "no attention"),
    ):
        d.cell(x, 318, 20, 20, fill)
        d.text(x + 28, 333, words)
    return d


def sites() -> Drawing:
    """Draw sites and depths on a UNet and on a diffusion transformer."""
    d = Drawing(940, 420, "Sites and depths on a UNet and on a diffusion transformer")
    d.text(230, 30, "Stable Diffusion 1.5 (UNet)", anchor="middle", bold=True, size=15)
    stages = (
        (20, 50, "down.0", "depths 0 to 3"),
        (50, 130, "down.1", "depths 4 to 7"),
        (80, 210, "down.2", "depths 8 to 11"),
        (170, 310, "mid", "depths 12 and 13"),
        (262, 210, "up.1", "depths 14 to 19"),
        (292, 130, "up.2", "depths 20 to 25"),
        (322, 50, "up.3", "depths 26 to 31"),
    )
    for x, y, name, words in stages:
        d.box(x, y, 128, 54, GREEN if name == "mid" else BLUE, name, words)
    for (x, y, *_), (u, v, *_) in pairwise(stages[:3]):
        d.line((x + 64, y + 54), (u + 64, v))
    d.line((144, 264), (200, 310))
    d.line((268, 310), (320, 264))
    d.line((326, 210), (352, 184))
    d.line((356, 130), (382, 104))
    for y in (77, 157, 237):
        d.line((152 + (y - 77) * 30 / 80, y), (318 - (y - 77) * 30 / 80, y), dashed=True, color=LINE)
    d.text(
        230, 396, "each layer: a self site, then a cross site (one depth each)", anchor="middle", size=12, color=SOFT
    )
    d.text(610, 30, "SD3 medium", anchor="middle", bold=True, size=15)
    d.text(820, 30, "FLUX.1", anchor="middle", bold=True, size=15)
    for i, (name, fill) in enumerate(
        (
            ("block 0: depth 0", BLUE),
            ("...", PAPER),
            ("block 13: depth 13", GREEN),
            ("...", PAPER),
            ("block 23: depth 23", BLUE),
        )
    ):
        d.box(520, 50 + i * 66, 180, 48, fill, name)
    for i, (name, fill) in enumerate(
        (("double 0: depth 0", BLUE), ("double 18: depth 18", BLUE), ("single 0: depth 19", AMBER), ("...", PAPER),
         ("single 37: depth 56", AMBER))
    ):  # fmt: skip
        d.box(730, 50 + i * 66, 180, 48, fill, name)
    for x in (610, 820):
        for i in range(4):
            d.line((x, 98 + i * 66), (x, 116 + i * 66))
    d.text(
        715,
        396,
        "joint sites: text and image in one sequence; green: PAG's published layer",
        anchor="middle",
        size=12,
        color=SOFT,
    )
    return d


def life() -> Drawing:
    """Draw the life of a control from its declaration to its removal."""
    d = Drawing(960, 330, "The life of a control")
    stages = (
        (GREY, "declare", "frozen dataclass", "fields checked"),
        (BLUE, "resolve", "sites and conflicts", "nothing touched yet"),
        (ROSE, "attach", "processors and hooks", "undo list is filled"),
        (GREEN, "run", "begin_run, then steps", "off: bit-identical"),
        (AMBER, "result", "handle.result(...)", "maps, report"),
        (ROSE, "detach", "undo list backwards", "no trace is left"),
    )
    for i, (fill, *words) in enumerate(stages):
        d.box(16 + i * 157, 40, 144, 84, fill, *words, size=14)
        if i:
            d.line((16 + i * 157 - 13, 82), (16 + i * 157 - 1, 82))
    d.line((559, 124), (559, 160))
    d.text(30, 152, "in each step:", bold=True)
    events = (
        ("before_call", "may give other inputs"),
        ("wrap", "base pass attention"),
        ("perturbed pass", "for a guidance"),
        ("after_call", "the prediction"),
        ("stepping", "latents before the step"),
        ("stepped", "latents after the step"),
    )
    for i, words in enumerate(events):
        d.box(16 + i * 157, 168, 144, 62, PAPER, *words, size=13)
        if i:
            d.line((16 + i * 157 - 13, 199), (16 + i * 157 - 1, 199))
    d.line((16 + 5 * 157 + 72, 230), (16 + 5 * 157 + 72, 268), (88, 268), (88, 232), dashed=True)
    d.text(480, 290, "next step", anchor="middle", color=SOFT)
    return d


DIAGRAMS = {"layers": layers, "step": step, "joint": joint, "sites": sites, "life": life}


def main() -> None:
    """Write every diagram."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DIAGRAMS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
