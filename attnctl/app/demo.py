"""The sheets of `attnctl demo --all`: which shipped models are shown under which controls; the page shares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["SHEETS", "Panel", "Sheet", "columns_of", "nouns"]


@dataclass(frozen=True)
class Panel:
    """Describe one column of the demo: its label and its controls, in the short form of `--control`.

    The word NOUNS in a control stands for the two nouns of each prompt.
    """

    name: str
    controls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sheet:
    """Describe one picture of the demo: a model and its columns, the first of which is plain.

    Attributes:
        model: A shipped model.
        file: Name of the picture, without its ending.
        share: One image in how many of the first sheet's is made; for models that take longer.
        maps: Name of a second picture, of where the plain images attend to their nouns, or "".
        options: Further arguments of the pipeline call.
    """

    model: str
    file: str
    share: int = 1
    maps: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Return the columns: plain, and the methods that have a column for the model."""
        return columns_of(self.model)


def columns_of(model: str) -> tuple[Panel, ...]:
    """List the columns for a model: plain, then the presets that methods declare with a column."""
    from attnctl.data.catalogue import presets_for

    shown = sorted((p for p in presets_for(model).values() if p.column), key=lambda p: p.column)
    return (Panel("plain"), *(Panel(p.label or p.method, (p.form,)) for p in shown))


SHEETS: tuple[Sheet, ...] = (
    Sheet("shapes:text2image", "demo-text2image", maps="demo-maps"),
    Sheet(
        "shapes:mmdit",
        "demo-mmdit",
        share=4,
        options=(("max_sequence_length", 0),),  # no padding in the place of T5: half the time
    ),
)


def nouns(prompt: str) -> tuple[str, ...]:
    """Name the shapes of a prompt of the shapes world as words to attend to: "circle#2" for a second circle.

    Raises:
        JudgeError: it is another prompt.
    """
    from attnctl.shapes import parse

    shapes = [thing.shape for thing in parse(prompt).things]
    return tuple(f"{s}#{shapes[: i + 1].count(s)}" if shapes.count(s) > 1 else s for i, s in enumerate(shapes))
