"""Check the folders of saved pipelines before anything in them is loaded: none brings code of its own."""

from __future__ import annotations

from pathlib import Path

from attnctl.errors import UnsupportedModelError
from attnctl.plans.reading import Expected, read_json

__all__ = ["CONFIG", "check_folder"]

CONFIG = Expected("a model's configuration", UnsupportedModelError)
_LIBRARIES = ("diffusers", "transformers")


def check_folder(folder: Path) -> None:
    """Refuse a model's folder that would run code of its own when it is loaded.

    Raises:
        UnsupportedModelError: A Python file lies beside its configurations, or a part comes from a library that is
            neither diffusers nor transformers.
    """
    import diffusers.pipelines

    scripts = sorted(p for depth in ("*.py", "*/*.py") for p in folder.glob(depth))
    if scripts:
        raise UnsupportedModelError(
            f"The model {folder.name} brings code of its own ({scripts[0].relative_to(folder)}), which is never run: "
            "expected configurations and safetensors alone. Remove it, or use another copy of the model."
        )
    if not (folder / "model_index.json").is_file():
        raise UnsupportedModelError(
            f"Cannot load {folder.name!r}: it has no model_index.json. Expected 'shapes:text2image', a hub id, or the "
            "folder of a saved pipeline."
        )
    index = read_json(folder / "model_index.json", CONFIG)
    parts = index.items() if isinstance(index, dict) else ()
    own_class = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(own_class, str) or not hasattr(diffusers, own_class):
        raise UnsupportedModelError(f"The model {folder.name} is a {own_class!r:.80}, which diffusers does not have.")
    for part, where in parts:
        if isinstance(where, list) and where and where[0] is not None:
            library = where[0]
            if library not in _LIBRARIES and not (isinstance(library, str) and hasattr(diffusers.pipelines, library)):
                raise UnsupportedModelError(
                    f"The {part!s:.40} of the model {folder.name} comes from {library!r:.80}; expected "
                    f"{' or '.join(_LIBRARIES)}. No other code is loaded for a model."
                )
