"""What a control tells readers about itself: tables, its page, `attnctl controls`, the demo and the page read it."""

from __future__ import annotations

from dataclasses import dataclass

from attnctl.errors import ConfigError

__all__ = ["About", "Preset"]


@dataclass(frozen=True, kw_only=True)
class About:
    """What readers are told about a method, in tables, on its page and by `attnctl controls`.

    Attributes:
        does: What it does, in half a sentence that begins with a verb.
        page: Name of its page in the docs, without the ending.
        goal: What a user wants who takes it, as a verb: "sharpen structure".
        title: Its name in words; empty for the name of the class.
        paper: Where it was published, such as "arXiv 2403.17377"; empty for no publication.
        cite: Authors, title and number of each publication.
        group: The kind of task it is for.
        sites: Its default sites in words, where a rule chooses them and no table of families.
        offered: Whether the page offers it among its methods, for models that take it; not where it has a tab of its
            own, or needs what a page cannot give.
        needs: What it takes from the pipeline besides attention, such as "the prompt".
    """

    does: str
    page: str
    goal: str = ""
    title: str = ""
    paper: str = ""
    cite: tuple[str, ...] = ()
    group: str = "Guidance"
    sites: str = ""
    offered: bool = True
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("does", "page"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"About: {name}={value!r} is empty: {_WANTED[name]}.")


_WANTED = {"does": "say what the control does", "page": "name the page that explains the control, such as 'pag'"}


@dataclass(frozen=True)
class Preset:
    """A setting of a method for one model: what the page offers, and the demo where `column` is given.

    Attributes:
        model: The model, such as "shapes:mmdit".
        form: The control in its short form; NOUNS stands for the nouns of the prompt.
        column: Its place among the columns of the demo, from 1; 0 for none.
        label: What the demo calls it; empty for the name of the method.
    """

    model: str
    form: str
    column: int = 0
    label: str = ""

    @property
    def method(self) -> str:
        """Return the name of the method."""
        return self.form.partition("(")[0]
