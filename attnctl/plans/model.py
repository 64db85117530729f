"""Block plans of a whole model: one for every attention, in a folder of JSON and safetensors.

A file is never trusted. The JSON is small and checked value by value; sizes are computed from it and held against the
tensor's before anything is unpacked, so a hostile file can neither claim memory nor index out of range.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from attnctl.errors import PlanError
from attnctl.plans.blocks import BlockPlan

__all__ = ["ModelPlan"]

SCHEMA = 1
_JSON, _MASKS = "attnctl_blocks.json", "attnctl_blocks.safetensors"
_MAX_JSON = 16 << 20
_MAX_BITS = 1 << 35
"""Blocks in one file; 42 layers of CogVideoX-5B in ten parts of the run have 1.6e9."""
_FACTS = {"block_q": int, "block_k": int, "n_text": int, "text_first": bool, "order": list, "groups": int, "heads": int}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ModelPlan:
    """Hold the block plans of a model.

    Attributes:
        plans: Plan of every site, by its name in the model.
        model: Hub id or name of the model, or None for any.
        about: Facts for people: prompts, metric, density, errors.
    """

    plans: Mapping[str, BlockPlan]
    model: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.plans:
            raise PlanError("A model's plan needs the plan of at least one site.")

    def __repr__(self) -> str:
        """Tell what it is for; the masks themselves fill screens."""
        return f"ModelPlan({self.model or 'any model'}, {len(self.plans)} sites, density {self.density:.3f})"

    @property
    def density(self) -> float:
        """Mean share of the map that is computed, over sites, heads and parts of the run."""
        return sum(p.density for p in self.plans.values()) / len(self.plans)

    @property
    def packed_bytes(self) -> int:
        """Size of the masks in a file: a bit for every block."""
        return sum(-(-p.keep.numel() // 8) for p in self.plans.values())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the plans into a folder and return it; what stood there is replaced only when all is written."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        masks = {str(i): torch.from_numpy(np.packbits(p.keep.numpy())) for i, p in enumerate(self.plans.values())}
        data = {
            "kind": "blocks",
            "schema": SCHEMA,
            "model": self.model,
            "about": dict(self.about),
            "sites": [_facts(name, plan) for name, plan in self.plans.items()],
        }
        with tempfile.TemporaryDirectory(dir=path) as fresh:
            save_file(masks, Path(fresh) / _MASKS)
            (Path(fresh) / _JSON).write_text(json.dumps(data, indent=1), encoding="utf-8")
            for name in (_MASKS, _JSON):
                os.replace(Path(fresh) / name, path / name)
        return path

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], *, revision: str | None = None) -> ModelPlan:
        """Read the plans of a model from a folder or a Hub repository.

        Raises:
            PlanError: A file is missing, damaged, hostile or of another schema.
        """
        folder = Path(path_or_repo)
        if not folder.is_dir():
            folder = _from_hub(str(path_or_repo), revision)
        data = _read_json(folder / _JSON)
        sites = data.get("sites")
        model, about = data.get("model"), data.get("about", {})
        if not isinstance(sites, list) or not isinstance(about, dict) or not isinstance(model, str | None):
            raise PlanError(f"{_JSON}: expected a list of sites, a model's name or null, and facts.")
        plans = {}
        try:
            with safe_open(folder / _MASKS, "pt") as masks:
                for i, facts in enumerate(sites):
                    name, plan = _plan(i, facts, masks)
                    plans[name] = plan
        except (SafetensorError, OSError) as error:
            raise PlanError(f"{_MASKS} cannot be read ({error}): it is missing or damaged. Nothing was used.") from None
        if len(plans) != len(sites):
            raise PlanError(f"{_JSON} names a site twice.")
        return cls(plans=plans, model=model, about=about)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the plans to a Hub repository and return its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            return str(api.upload_folder(folder_path=self.save_pretrained(folder), repo_id=repo_id))


def _facts(name: str, plan: BlockPlan) -> dict[str, Any]:
    return {
        "site": name,
        "groups": plan.groups,
        "heads": plan.heads,
        "blocks": list(plan.keep.shape[-2:]),
        "block_q": plan.block_q,
        "block_k": plan.block_k,
        "order": list(plan.order),
        "grid": None if plan.grid is None else list(plan.grid),
        "n_image": plan.n_image,
        "n_text": plan.n_text,
        "text_first": plan.text_first,
        "about": dict(plan.about),
    }


def _plan(i: int, facts: Any, masks: Any) -> tuple[str, BlockPlan]:
    """Check the facts of one site and unpack its mask."""
    if not isinstance(facts, dict) or not isinstance(facts.get("site"), str):
        raise PlanError(f"{_JSON}: site {i} has no name.")
    where = f"{_JSON}: {facts['site'] or 'the plan'}"
    for key, kind in _FACTS.items():
        value = facts.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise PlanError(f"{where}: {key}={value!r} should be {kind.__name__}.")
    blocks, about = facts.get("blocks"), facts.get("about", {})
    whole = isinstance(blocks, list) and len(blocks) == 2 and all(type(n) is int and n > 0 for n in blocks)
    if not whole or not isinstance(about, dict) or facts["groups"] < 1 or facts["heads"] < 1:
        raise PlanError(f"{where}: groups, heads and blocks should be whole numbers above 0.")
    shape = (facts["groups"], facts["heads"], *blocks)  # type: ignore[misc]
    bits = math.prod(shape)
    if bits > _MAX_BITS:
        raise PlanError(f"{where}: {bits} blocks are more than any plan has ({_MAX_BITS}). It is not read.")
    if str(i) not in set(masks.keys()):
        raise PlanError(f"{where}: {_MASKS} has no mask for it.")
    found = masks.get_slice(str(i))
    if found.get_dtype() != "U8" or list(found.get_shape()) != [-(-bits // 8)]:
        raise PlanError(f"{where}: its mask is {found.get_dtype()} {found.get_shape()}; expected U8 [{-(-bits // 8)}].")
    keep = np.unpackbits(masks.get_tensor(str(i)).numpy(), count=bits).astype(bool).reshape(shape)
    order, grid = facts["order"], facts.get("grid")
    numbers = all(type(o) is int for o in order) and isinstance(grid, list | None)
    if not numbers or type(facts.get("n_image")) not in (int, type(None)):
        raise PlanError(f"{where}: order, grid and n_image should be whole numbers.")
    plan = BlockPlan.from_mask(
        torch.from_numpy(keep), facts["block_k"], order, facts["n_text"], block_q=facts["block_q"], grid=grid,
        n_image=facts["n_image"], text_first=facts["text_first"], about=about,
    )  # fmt: skip
    return facts["site"], plan


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PlanError(f"{path.name} does not exist in {path.parent.name or '.'}: expected a saved block plan.")
    size = path.stat().st_size
    if size > _MAX_JSON:
        raise PlanError(f"{path.name} holds {size} bytes; a block plan has at most {_MAX_JSON}. It is not read.")
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or a number of thousands of digits
        raise PlanError(f"{path.name} is not JSON: it is damaged. Nothing was read from it.") from None
    if not isinstance(data, dict) or data.get("kind") != "blocks":
        raise PlanError(f"{path.name} is not a block plan: expected a JSON object with kind 'blocks'.")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise PlanError(
            f"{path.name} has schema {data.get('schema')!r}; this attnctl reads schema {SCHEMA}. Update attnctl, or "
            "calibrate again."
        )
    return data


def _from_hub(repo: str, revision: str | None) -> Path:
    if repo.count("/") != 1 or repo.startswith((".", "/")):
        raise PlanError(f"{repo} does not exist. Pass a plan's folder, or a Hub id such as 'user/plan'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[_JSON, _MASKS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PlanError(f"{repo} is no local folder, and no block plan could be fetched: {error}") from None
