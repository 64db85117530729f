"""Has the API pages show "Example:" sections as code: the reader of docstrings knows "Examples:" only."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Rename the section in every docstring that is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rename it in one."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
