"""Every example runs with `--shapes`, asks no other machine for anything, and writes what it says."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import network
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("unplugged")
EXAMPLES = Path(__file__).parents[1] / "examples"
GUIDED = {"pag_sd15": "pag.png", "pag_sdxl": "pag.png", "softpag_sd35": "softpag.png", "softpag_flux": "softpag.png"}
GUIDED |= {"astar_sd15": "astar.png", "attend_excite_sd15": "attend_excite.png", "slg_sd35": "slg.png"}
GUIDED |= {"seg_sdxl": "seg.png", "tpg_sdxl": "tpg.png", "auto_guidance_sdxl": "auto_guidance.png"}
NO_PASS = {
    "nag_sdxl": "nag.png",
    "regions_flux": "regions.png",
    "textcengen_sd15": "textcengen.png",
    "apg_sdxl": "apg.png",
    "zero_star_sd35": "zero_star.png",
}
GUIDED |= NO_PASS

# What a picture shows of a method, it shows after few steps too. Two run as they stand: one in an interpreter of its
# own, and one whose method shows late.
FEW = ("--steps", "8")
WHOLE = {"pag_sd15", "auto_guidance_sdxl"}

# Long work tells how far it is, in lines outside a terminal.
PROGRESS = re.compile(r"[\w ]+: \d+ of \d+ [\w ]+([,:] .*)?")
CHEAPER = {"agent_sd15", "broadway_animatediff"}
VISION = {
    "vit_classify": ("curve.png", "predictions.png", "heads.png", "importance.png", "distance.png"),
    "vit_segment": ("curve.png", "predictions.png", "attention.png"),
}


def fresh(name: str, out: Path, *more: str) -> str:
    """Run one example in an interpreter of its own."""
    script = [network.__file__, str(EXAMPLES / f"{name}.py")]
    command = [sys.executable, *script, "--shapes", "--out", str(out), *more]
    env = {k: v for k, v in os.environ.items() if k not in network.SWITCHES} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def run(name: str, out: Path, *more: str) -> str:
    """Run one example in this interpreter, which has imported torch already."""
    said, complained = io.StringIO(), io.StringIO()
    arguments, path = sys.argv, sys.path
    sys.argv, sys.path = [f"{name}.py", "--shapes", "--out", str(out), *more], [str(EXAMPLES), *path]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv, sys.path = arguments, path
    assert not [line for line in complained.getvalue().splitlines() if not PROGRESS.fullmatch(line)]
    return said.getvalue()


def test_every_script_is_tested() -> None:
    assert {p.stem for p in EXAMPLES.glob("[!_]*.py")} == {
        *GUIDED,
        "by_hand",
        "nag_few_steps",
        "word_maps",
        "enhance_video",
        "edit_transformer",
        "fatezero_sd15",
        "gallery",
        "hunt_sd3",
        "own_control",
        "pag_wan",
        "paro_cogvideox",
        "prompt_to_prompt_sd15",
        "ir_sdxl",
        "refer_flux",
        "share_sdxl",
        "sparse_flux",
        *CHEAPER,
        *VISION,
    }


@pytest.mark.parametrize("name", GUIDED)
def test_guided_example(name: str, tmp_path: Path) -> None:
    text = (fresh if name == "pag_sd15" else run)(name, tmp_path, *(() if name in WHOLE else FEW))
    assert "kernels: backend=auto" in text
    assert "so far" in text or name in NO_PASS
    plain, guided = (np.asarray(Image.open(tmp_path / f)).astype(int) for f in ("plain.png", GUIDED[name]))
    assert plain.shape == guided.shape == (64, 64, 3)
    assert abs(plain - guided).max() > 8


def test_scripts_of_real_models_say_what_they_need() -> None:
    for path in EXAMPLES.glob("[!_]*.py"):
        text = path.read_text(encoding="utf-8")
        if "from_pretrained" in text or "model(args" in text:
            about = text.split('"""')[1]
            assert "VRAM: about" in about, path.name
            assert "stimate" in about, path.name


@pytest.mark.parametrize("name", VISION)
def test_vision(name: str, tmp_path: Path) -> None:
    text = run(name, tmp_path, "--epochs", "2")
    assert "that it has not seen" in text
    for file in ("weights.safetensors", *VISION[name]):
        assert (tmp_path / file).stat().st_size > 5000, file


def test_sharing(tmp_path: Path) -> None:
    assert "StyleAligned" in run("share_sdxl", tmp_path, *FEW)
    assert Image.open(tmp_path / "shared.png").width > 300
    assert "bank (read): 2 pictures" in run(
        "share_sdxl",
        tmp_path,
        *FEW,
        "--method",
        "Consistent",
        "--prompts",
        "a red circle",
        "a blue ring",
        "--later",
        "a cross",
    )
    assert "ReferenceOnly" in run("share_sdxl", tmp_path, *FEW, "--method", "ReferenceOnly")


def test_isolation(tmp_path: Path) -> None:
    assert "IRDiffusion" in run("ir_sdxl", tmp_path, *FEW)
    assert Image.open(tmp_path / "ir.png").width > 300


def test_refer(tmp_path: Path) -> None:
    assert "the green circle: box (" in run("refer_flux", tmp_path)
    assert {"segments.png", "segments.json"} <= {p.name for p in tmp_path.iterdir()}


def test_by_hand_equals_control(tmp_path: Path) -> None:
    text = run("by_hand", tmp_path)
    assert float(text.split("two: ")[1].split()[0]) < 1e-4
    assert (tmp_path / "by_hand.png").is_file()


def test_paro(tmp_path: Path) -> None:
    text = run("paro_cogvideox", tmp_path, "--steps", "4")
    assert "dB to dense" in text
    for name in ("report.md", "maps.png", "plan/attnctl_blocks.json", "plain.png", "paro.png"):
        assert (tmp_path / name).is_file(), name


def test_sparse(tmp_path: Path) -> None:
    text = run("sparse_flux", tmp_path, "--steps", "2")
    assert "% of the maps between image tokens computed" in text
    for name in ("plain.png", "online.png", "windows.png"):
        assert (tmp_path / name).is_file(), name


def test_word_maps(tmp_path: Path) -> None:
    text = run("word_maps", tmp_path, *FEW)
    assert "circle: highest share of attention 0." in text
    for name in ("words.png", "overlay.png", "word_maps.safetensors", "word_maps.json"):
        assert (tmp_path / name).is_file()


def test_fatezero(tmp_path: Path) -> None:
    assert "denoiser calls" in run("edit_transformer", tmp_path, "--steps", "2")
    text = run("fatezero_sd15", tmp_path, "--frames", "2", "--steps", "4")
    assert "source: recompute" in text
    assert (tmp_path / "strip.png").is_file()
    frames = [np.asarray(Image.open(tmp_path / "edited" / f"0000{i}.png")).astype(int) for i in range(2)]
    assert frames[0].shape == (64, 64, 3)
    assert frames[0][..., 2].max() > frames[0][..., 0].max() + 50  # what was red is blue


def test_hunt(tmp_path: Path) -> None:
    text = run("hunt_sd3", tmp_path, *FEW)
    assert "14 images" in text
    assert text.count("round 1: transformer_blocks.6.attn head") == 2
    for name in ("attnctl_heads.json", "heat_map_1.png", "plain.png", "hunted.png"):
        assert (tmp_path / name).is_file()


def test_agent(tmp_path: Path) -> None:
    text = run("agent_sd15", tmp_path, *FEW)
    assert "AgentSD, arXiv 2312.08874" in text
    plain, agent = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in ("plain", "agent"))
    assert plain.shape == agent.shape == (64, 64, 3)
    assert abs(plain - agent).max() > 8


def test_broadway(tmp_path: Path) -> None:
    text = run("broadway_animatediff", tmp_path, "--steps", "5")
    assert "arXiv 2410.06241" in text
    assert (tmp_path / "plain.gif").is_file()
    assert (tmp_path / "broadway.gif").is_file()


def test_wan(tmp_path: Path) -> None:
    text = run("pag_wan", tmp_path, "--steps", "4")
    assert "perturbed passes so far: 2" in text
    for name in ("plain.gif", "pag.gif"):
        assert (tmp_path / name).stat().st_size > 1000


def test_enhance_video(tmp_path: Path) -> None:
    text = run("enhance_video", tmp_path)
    assert "arXiv 2502.07508" in text
    assert 0.01 < float(text.split("move by ")[1].split()[0]) < 10


def test_prompt_to_prompt(tmp_path: Path) -> None:
    run("prompt_to_prompt_sd15", tmp_path)
    image, edited = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in ("source", "edited"))
    assert abs(image - edited).max() > 60
    assert np.median(abs(image - edited)) <= 8  # the background stays
    assert (tmp_path / "pair.png").is_file()


def test_nag_without_guidance(tmp_path: Path) -> None:
    assert "negative_prompt='a blue square on gray'" in run("nag_few_steps", tmp_path)
    plain, guided = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in ("plain", "nag"))
    assert abs(plain - guided).max() > 8


def test_own_control(tmp_path: Path) -> None:
    assert "Tempered(sites=6, scale=2.5)" in run("own_control", tmp_path)
    plain, tempered = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in ("plain", "tempered"))
    assert abs(plain - tempered).max() > 8


def test_gallery(tmp_path: Path) -> None:
    from attnctl.data.record import read

    text = run("gallery", tmp_path, "nag", "--steps", "2", "--rows", "1")
    assert "NAG(scale=4.0)" in text
    assert [len(record.controls) for record in read(tmp_path / "nag.png")] == [0, 1]
