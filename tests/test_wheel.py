"""The wheel: built, put into an environment that does not see the source, and used there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import json, sys
from pathlib import Path
import attnctl
from attnctl.app.cli import main
from attnctl.processors import PAG

pipe = attnctl.load_shapes("text2image")
pipe.set_progress_bar_config(disable=True)
call = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 2.0}
def run():
    import torch
    return pipe("a red circle on gray", generator=torch.Generator().manual_seed(0), **call).images[0]
plain = run()
with attnctl.control(pipe, PAG(sites="mid", scale=3.0)):
    guided = run()
print(json.dumps({
    "file": attnctl.__file__,
    "changed": bool((plain != guided).any()),
    "restored": bool((plain == run()).all()),
    "size": plain.shape[:2],
    "typed": (Path(attnctl.__file__).parent / "py.typed").is_file(),
    "env": main(["env"]),
}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel out of a copy, which leaves no build folder in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "attnctl", source / "attnctl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "-q", "-w", str(folder)]
    done = subprocess.run(
        [*command, *(["--no-build-isolation"] if _has_setuptools() else [])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def _has_setuptools() -> bool:
    """Tell whether the build backend is here, so that none need be fetched."""
    code = "import setuptools, wheel; assert int(setuptools.__version__.split('.')[0]) >= 77"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"attnctl", wheel.name.split("-py3")[0] + ".dist-info"}
    weights = [n for n in names if n.startswith("attnctl/shapes/weights/")]
    for model in ("text2image", "mmdit", "video"):
        assert f"attnctl/shapes/weights/{model}/model_index.json" in weights
    assert not [n for n in names if n.endswith((".pt", ".bin", ".ckpt", ".pkl", ".pyc"))]
    assert wheel.stat().st_size < 60e6


def test_the_wheel_alone_makes_a_controlled_picture(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = next((tmp_path / "venv").rglob("site-packages"))
    zipfile.ZipFile(wheel).extractall(own)  # what pip does, without asking any index
    # Everything else is of this environment. Its .pth files, by which an editable install is found, are not followed.
    (own / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-W", "ignore", "-c", USE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stderr.strip().splitlines()[-1])
    assert Path(told["file"]).is_relative_to(own)
    assert told == told | {"changed": True, "restored": True, "size": [64, 64], "typed": True, "env": 0}
    assert "attnctl" in done.stdout


def test_the_oldest_versions_that_are_promised_are_measured() -> None:
    """What pip may install beside the package has run its tests there (benchmarks/host_matrix.py)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    hosts = json.loads((ROOT / "benchmarks" / "results" / "host_matrix.json").read_text(encoding="utf-8"))["hosts"]
    for name in ("torch", "diffusers", "transformers", "timm"):
        floors = set(re.findall(rf'"{name}>=([\d.]+)"', text))
        assert len(floors) == 1, (name, floors)
        (floor,) = floors
        measured = [h for h in hosts.values() if h["ok"] and f"{h['versions'][name]}.".startswith(f"{floor}.")]
        assert measured, f"{name} {floor} is promised; no host of that version passed all of its tests"
