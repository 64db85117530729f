"""Run timm's own model tests on names that attnctl registers.

    pip download --no-binary :all: --no-deps timm==1.0.31 && tar xzf timm-1.0.31.tar.gz
    python benchmarks/timm_contract.py timm-1.0.31 biformer_tiny agent_deit_tiny

The tests lie in timm's source distribution. Each collects its models through `timm.list_models`, which is given our
names instead; only the tests that run per model are kept. Prints counts and seconds as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm

import attnctl.backbones  # noqa: F401  (registers the names)

TOKENS = (
    "agent_deit*",
    "inline_deit*",
    "*_vanilla_*",
)  # features are token sequences, which timm tests as those of its own ViTs
PER_MODEL = (
    "test_model_forward", "test_model_backward", "test_model_default_cfgs", "test_model_default_cfgs_non_std",
    "test_model_forward_torchscript", "test_model_forward_features", "test_model_forward_intermediates_features",
    "test_model_forward_intermediates", "test_prune_intermediate_layers_contract", "test_model_forward_fx",
    "test_model_backward_fx", "test_model_forward_fx_torchscript",
)  # fmt: skip


def listing(names: list[str]) -> Any:
    """Build a stand-in for timm.list_models that knows only these names."""

    def list_models(filter: Any = "", module: Any = "", pretrained: bool = False, exclude_filters: Any = "", **_: Any):  # type: ignore[no-untyped-def]
        if pretrained:
            return []
        filters = [filter] if isinstance(filter, str) else list(filter)
        barred = [exclude_filters] if isinstance(exclude_filters, str) else list(exclude_filters)
        if "vit_*" in filters:
            kept = [n for n in names if any(fnmatch.fnmatch(n, t) for t in TOKENS)]
        elif "vit_*" in barred:
            kept = [n for n in names if not any(fnmatch.fnmatch(n, t) for t in TOKENS)]
        else:
            kept = names if not any(filters) else []
        return [n for n in kept if not any(b and fnmatch.fnmatch(n, b) for b in barred)]

    return list_models


class Count:
    """Keep the per-model tests and count what becomes of them."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Drop every test that is not a per-model one."""
        items[:] = [i for i in items if getattr(i, "originalname", "") in PER_MODEL and "NOTSET" not in i.name]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one outcome per test."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1


def main() -> int:
    """Run the tests and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="unpacked source distribution of timm")
    parser.add_argument("names", nargs="*", help="models; every registered one if none is given")
    args = parser.parse_args()
    known = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("attnctl.")]
    names = args.names or known
    if unknown := set(names) - set(known):
        parser.error(f"unknown models {sorted(unknown)}; registered: {', '.join(known)}")
    stand_in = listing(names)
    for place in (timm, timm.models, sys.modules["timm.models._registry"]):
        place.list_models = stand_in
        place.list_pretrained = lambda *_, **__: []
    count, begun = Count(), time.time()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(
            ["-q", "-p", "no:cacheprovider", "-W", "ignore", f"--rootdir={args.sdist}",
             str(args.sdist / "tests" / "test_models.py")], plugins=[count],
        )  # fmt: skip
    print(json.dumps({"models": names, **count.outcomes, "seconds": round(time.time() - begun, 1)}))
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
