"""Selections as data: which heads to perturb, saved as JSON and checked when read.

A plan file is never trusted: its size, schema and every value are checked, and nothing but JSON is read.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from attnctl.errors import ConfigError, PlanError, SiteError, nearest, unboxed
from attnctl.plans import hub
from attnctl.plans.reading import Expected, check_schema, read_json
from attnctl.plans.writing import publish

__all__ = ["HeadSet"]

SCHEMA = 1
_FILE, _CARD = "attnctl_heads.json", "README.md"
_EXPECTED = Expected("a head set", PlanError, 4 << 20)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")

Pair = tuple[str | int, int]


@dataclass(frozen=True, kw_only=True)
class HeadSet:
    """Attention heads of one model, in the order in which they were chosen.

    Attributes:
        pairs: (site name or depth, head index).
        model: Hub id or name of the model that they were chosen for, or None for any.
        layers: Number of attention depths of that model, or None; checked when the set is used.
        method: What chose them.
        u: Strength that they were chosen for, or None.
        scale: Guidance weight that they were chosen for, or None.
        objective: What they were chosen to improve.

    Example:
        >>> HeadSet.from_pairs([(1, 2), (1, 10)]).pairs
        ((1, 2), (1, 10))
    """

    pairs: tuple[Pair, ...]
    model: str | None = None
    layers: int | None = None
    method: str = "manual"
    u: float | None = None
    scale: float | None = None
    objective: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", _checked_pairs(self.pairs, SiteError))
        _check_facts(vars(self), ConfigError, "heads")

    @classmethod
    def from_pairs(cls, pairs: Sequence[Sequence[Any]], **about: Any) -> HeadSet:
        """Make a head set from pairs (site name or depth, head index).

        Raises:
            SiteError: A pair is not a name or depth and a head index, or appears twice.
        """
        return cls(pairs=pairs, **about)  # type: ignore[arg-type]

    @classmethod
    def from_labels(cls, labels: str, **about: Any) -> HeadSet:
        """Make a head set from labels as papers print them: "L1H10, L11H15" is head 10 of depth 1, head 15 of depth 11.

        Example:
            >>> HeadSet.from_labels("L0H15 L1H19").pairs
            ((0, 15), (1, 19))

        Raises:
            SiteError: Something in the text is no such label.
        """
        pairs = []
        for label in re.split(r"[\s,;{}]+", labels.strip(" {}")):
            match = re.fullmatch(r"L(\d+)H(\d+)", label)
            if match is None:
                raise SiteError(f"{label!r} in {labels!r} is no head; expected labels such as L1H10.")
            pairs.append((int(match[1]), int(match[2])))
        return cls(pairs=tuple(pairs), **about)

    def card(self) -> str:
        """Describe the set as a Hub model card in Markdown."""
        about = {
            "model": self.model, "attention depths": self.layers, "found by": self.method, "for": self.objective,
            "u": self.u, "scale": self.scale,
        }  # fmt: skip
        facts = "\n".join(f"| {name} | {value} |" for name, value in about.items() if value is not None)
        pairs = "\n".join(f"| {i + 1} | `{where}` | {head} |" for i, (where, head) in enumerate(self.pairs))
        base = f"base_model: {self.model}\n" if self.model and self.model.count("/") == 1 else ""
        u = "" if self.u is None else f", u={self.u:g}"
        scale = "" if self.scale is None else f", scale={self.scale:g}"
        return (
            f"---\nlibrary_name: attnctl\ntags: [attnctl, perturbed-attention-guidance]\n{base}---\n\n"
            f"# Attention heads of {self.model or 'a model'}\n\nHeads whose perturbation guides the model, for SoftPAG "
            "(*Fine-Grained Perturbation Guidance via Attention Head Selection*, arXiv 2506.10978).\n\n"
            f"| | |\n|---|---|\n{facts}\n\n```python\nimport attnctl\nfrom attnctl.processors import SoftPAG\n\n"
            'heads = attnctl.HeadSet.from_pretrained("this repository or folder")\n'
            f"with attnctl.control(pipe, SoftPAG(heads=heads{u}{scale})):\n    image = pipe(prompt).images[0]\n```\n\n"
            f"| order | site | head |\n|---|---|---|\n{pairs}\n"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the set as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"kind": "heads", "schema": SCHEMA, **values, "pairs": [list(p) for p in self.pairs]}

    @classmethod
    def from_dict(cls, data: Any, source: str = "head set") -> HeadSet:
        """Read a set from plain JSON values.

        Raises:
            PlanError: The values are not a head set of a known schema.
        """
        check_schema(data, source, _EXPECTED, kind="heads", schema=SCHEMA)
        names = {f.name for f in fields(cls)}
        for name in data:
            if name not in names | {"kind", "schema"}:
                raise PlanError(f"{source} has an unknown field {name!r}.{nearest(name, sorted(names))}")
        values = {n: v for n, v in data.items() if n in names}
        pairs = _checked_pairs(values.pop("pairs", None), PlanError, source)
        _check_facts(values, PlanError, source)
        return cls(pairs=pairs, **values)

    def save_pretrained(self, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the set into a folder as JSON, with a card if there is no README yet, and return the JSON file.

        Raises:
            FileExists: Another head set is there, and `force` is not set.
            WriteError: The disk is full, or the folder cannot be written.
        """
        path = Path(folder)
        content = json.dumps(self.to_dict(), indent=1).encode()
        if not (path / _FILE).is_file() or (path / _FILE).read_bytes() != content:
            publish({path / _FILE: content}, force=force)
        if not (path / _CARD).exists():  # never in the place of somebody's own text
            publish({path / _CARD: self.card().encode()})
        return path / _FILE

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], *, revision: str | None = None) -> HeadSet:
        """Read a set from a file, a folder or a Hub repository.

        Raises:
            PlanError: The file is missing, too large, a pickle, damaged, or of another schema.
        """
        path = hub.local(path_or_repo, "a head set")
        if path.suffix in _PICKLES:
            raise PlanError(
                f"{path.name} looks like a pickle, which could run code when read. attnctl reads JSON head sets only: "
                "write the pairs with HeadSet.from_pairs([...]).save_pretrained(folder)."
            )
        if path.is_dir():
            path = path / _FILE
        elif not path.exists():
            path = hub.find(str(path_or_repo), (_FILE,), "a head set", revision) / _FILE
        return cls.from_dict(read_json(path, _EXPECTED), path.name)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the set and its card to a Hub repository and return the repository's address."""
        return hub.push(partial(self.save_pretrained, force=True), repo_id, private=private, token=token)


def _check_facts(values: dict[str, Any], error: type[Exception], source: str) -> None:
    """Raise an error unless the facts beside the pairs have their types."""
    for name, kind in (("model", str), ("layers", int), ("method", str), ("objective", str)):
        value = values.get(name)
        optional = value is None and (name != "method" or name not in values)
        if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
            raise error(f"{source}: {name}={value!r:.80} should be {kind.__name__}.")
    for name in ("u", "scale"):
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise error(f"{source}: {name}={value!r:.80} should be a number.")
        if value is not None and not abs(value) <= sys.float_info.max:
            raise error(f"{source}: {name}={value!r} should be a finite number.")


def _checked_pairs(pairs: Any, error: type[Exception], source: str = "heads") -> tuple[Pair, ...]:
    expected = "pairs (site name or depth, head index), such as (9, 3)"
    if not isinstance(pairs, (list, tuple)):
        raise error(f"{source}: expected {expected}; got {type(pairs).__name__}.")
    checked: dict[Pair, None] = {}  # in order; a list would take a day to search where somebody sends a long file
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise error(f"{source}: expected {expected}; got {pair!r:.80}.")
        where, head = map(unboxed, pair)
        if isinstance(where, bool) or not isinstance(where, (str, int)):
            raise error(f"{source}: expected {expected}; got {pair!r:.80}.")
        if isinstance(head, bool) or not isinstance(head, int) or head < 0:
            raise error(f"{source}: head {head!r:.40} of {where!r:.80} is not a head index (0, 1, ...).")
        if (where, head) in checked:
            raise error(f"{source}: the pair {(where, head)!r} appears twice.")
        checked[where, head] = None
    return tuple(checked)
