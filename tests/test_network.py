"""Nothing is fetched unasked: imports, commands, models and jobs make no connection, with the hub's switch off."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import network
import pytest

TESTS = Path(__file__).parent
IMPORTS = """
import importlib.util, pkgutil
import attnctl
without = () if importlib.util.find_spec("gradio") else ("attnctl.app.ui.",)
for module in pkgutil.walk_packages(attnctl.__path__, "attnctl."):
    if not module.name.startswith(without):
        importlib.import_module(module.name)
import timm
timm.create_model("biformer_micro")
"""
COMMANDS = """
import sys
from pathlib import Path
from attnctl.app.cli import _COMMANDS, main

folder = sys.argv[1]
prompt = ["--prompt", "a red circle and a blue square on gray", "--steps", "1"]
for name in _COMMANDS:
    assert main([name, "--help"]) == 0
assert main(["env"]) == 0
assert main(["bench", "--list"]) == 0
for model in ("text2image", "mmdit", "video"):
    assert main(["sites", f"shapes:{model}"]) == 0
    assert main(["generate", "--model", f"shapes:{model}", *prompt, "--out", f"{folder}/{model}"]) == 0
assert main(["maps", *prompt, "--word", "circle", "--out", f"{folder}/maps"]) == 0
assert main(["calibrate", "--model", "shapes:mmdit", *prompt, "--block", "16", "--out", f"{folder}/plan"]) == 0
heads = ["--heads", "L7H0 L7H3", "--pairs", "1", "--k", "1", "--steps", "1"]
assert main(["hunt", *heads, "--out", f"{folder}/heads"]) == 0
"""
NAMED = """
import network
assert network._heard == []
assert main(["sites", "nobody/nothing"]) == 1
"""
EXTRAS = ("matplotlib", "av", "gradio", "torchmetrics", "sklearn", "segmentation_models_pytorch", "onnx", "onnxscript",
          "onnxruntime", "zensical", "ftfy", "hypothesis", "peft", "playwright", "sentencepiece", "pytest",
          "xformers", "triton")  # fmt: skip
# As if packages were not installed: importlib finds none of them, which diffusers and others ask it about.
WITHOUT = """
import importlib, logging, pkgutil, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in blocked else find(name, path, target)
PathFinder.find_spec = find_spec
import attnctl
for module in pkgutil.walk_packages(attnctl.__path__, "attnctl."):
    if not module.name.startswith(left_out):
        importlib.import_module(module.name)
from attnctl.app.cli import main
folder = sys.argv[1]
"""
LEFT_OUT = ("attnctl.app.ui.", "attnctl.kernels.sparse.triton", "attnctl.backbones", "attnctl.app.commands.demo_video")
# `pip install attnctl`: control of a pipeline's denoiser, and commands that say what is missing.
PLAIN = f"""
blocked = {(*EXTRAS, "transformers", "timm", "cv2", "accelerate", "einops", "torchvision")!r}
left_out = {(*LEFT_OUT, "attnctl.shapes", "attnctl.app", "attnctl.pipelines", "attnctl.data")!r}
{WITHOUT}
import torch
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
call = lambda: unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 32)).sample
plain = call()
with attnctl.control(unet, attnctl.processors.PAG(sites="mid"), layout="cond"):
    assert not torch.equal(call(), plain)
assert main(["--help"]) == 0
assert main(["env"]) == 0
assert main(["generate", "--prompt", "a red ring", "--out", folder]) == 1
assert main(["ui", "--no-browser"]) == 1
try:
    attnctl.swap
except ImportError as error:
    print(error, file=sys.stderr)
"""
# `pip install "attnctl[models]"`: the shipped models, and the commands that run pipelines.
MODELS = f"""
blocked = {(*EXTRAS, "timm", "einops", "torchvision")!r}
left_out = {(*LEFT_OUT, "attnctl.pipelines.vision")!r}
{WITHOUT}
asked = ["--prompt", "a red circle on gray", "--steps", "2"]
assert main(["generate", *asked, "--control", 'PAG(sites="mid")', "--out", folder]) == 0
assert main(["maps", *asked, "--word", "circle", "--out", folder + "/maps"]) == 0
"""


def run(code: str, folder: Path, *, guard: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, where nothing forbids the hub."""
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k not in network.SWITCHES}
    # An empty cache: what was fetched once would be found without asking.
    env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hub")}
    command = [sys.executable, *([str(TESTS / "network.py")] if guard else []), str(script), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, cwd=folder)


def test_the_guard_hears_what_is_asked() -> None:
    with network.guarded() as heard:
        with pytest.raises(ConnectionRefusedError):
            socket.getaddrinfo("huggingface.co", 443)
        with socket.socket() as one, pytest.raises(ConnectionRefusedError):
            one.connect(("203.0.113.1", 80))
        socket.getaddrinfo("127.0.0.1", 80)
    assert heard == ["socket.getaddrinfo huggingface.co", "socket.connect 203.0.113.1"]


def test_imports_ask_for_nothing(tmp_path: Path) -> None:
    done = run(IMPORTS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_commands_ask_for_nothing_but_a_model_that_is_named(tmp_path: Path) -> None:
    done = run(COMMANDS + NAMED, tmp_path)
    assert done.returncode == 1, done.stderr  # of the guard, which has heard of a model
    assert "huggingface.co" in done.stderr.splitlines()[-1]
    assert "Cannot load 'nobody/nothing'" in done.stderr
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_the_hard_dependencies_are_enough(tmp_path: Path) -> None:
    done = run(PLAIN, tmp_path, guard=False)
    assert done.returncode == 0, done.stderr
    for extra in ("models", "ui", "backbones"):
        assert f"pip install 'attnctl[{extra}]'" in done.stderr.replace('"', "'")


def test_models_run_with_their_extra(tmp_path: Path) -> None:
    done = run(MODELS, tmp_path, guard=False)
    assert done.returncode == 0, done.stderr
