"""What a new user adds to the blocks of the docs, and what must have come of each task of newcomer.py."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# What stands in front of a block -------------------------------------------------------------------------------------

SEED = """
import torch

def seed():
    return torch.Generator().manual_seed(0)
"""
PIPE = """
import attnctl, numpy as np, torch
from attnctl.processors import NAG, PAG, Capture

pipe = attnctl.load_shapes("text2image")

def run():
    seed = torch.Generator().manual_seed(0)
    return np.asarray(pipe("a red circle on gray", num_inference_steps=4, generator=seed).images[0], dtype=int)

plain = run()
"""
HANDLE = """
handle = attnctl.control(pipe, PAG(scale=3.0))
"""
VIDEO = """
import attnctl, torch
from attnctl.processors import PAG, EnhanceAVideo

pipe = attnctl.load_shapes("videodit")
SIZE = {"num_frames": 17, "height": 64, "width": 64}

def run():
    seed = torch.Generator().manual_seed(0)
    prompt = "a red circle moving right fast on gray"
    return pipe(prompt, num_inference_steps=4, generator=seed, output_type="np", **SIZE)

before = run().frames
"""
MMDIT = """
pipe = __import__("attnctl").load_shapes("mmdit")
"""

# What stands below it -------------------------------------------------------------------------------------------------

UNDO = """
assert (run() != plain).any()
handle.enabled = False
assert (run() == plain).all()
handle.enabled = True
handle.detach()
assert (run() == plain).all()
print("RIGHT: acts while attached, the same bits when disabled and when detached")
"""
PLUG = """
after = run().frames
with attnctl.control(pipe, EnhanceAVideo()):
    same = run().frames
assert (before == after).all() and (video != before[0]).any() and (video == same[0]).all()
pipe.transformer.set_attn_processor(PAG())
try:
    run()
except attnctl.errors.AttnctlError as error:
    assert "attn_processors" in str(error)
else:
    raise SystemExit("a control went through as a processor")
print("RIGHT: the bits of attnctl.control, off again to the bit; a control in place of a processor is refused")
"""
CLIP = """
import numpy as np
from pathlib import Path
from attnctl.data.clips import mp4_bytes

y, x = np.mgrid[:64, :64]
def frame(left):
    disc = (x - left) ** 2 + (y - 32) ** 2 < 144
    return np.where(disc[..., None], (220, 30, 30), (128, 128, 128)).astype(np.uint8)
Path("in.mp4").write_bytes(mp4_bytes([frame(20 + 2 * i) for i in range(8)], 8.0))
"""
LIST = """
from pathlib import Path

Path("prompts.txt").write_text("a red circle on gray\\na blue square on white\\n")
"""
COMBINED = """
assert maps is not None and (np.asarray(image, dtype=int) != plain).any()
assert (run() == plain).all()
print("RIGHT: two controls and maps of one run; off afterwards")
"""
SCALED = """
assert handle.controls[0].scale == 1.5 and handle.controls[0].stop == 1.0
changed = run()
handle.set(0, scale=0)
assert (run() == plain).all()
handle.detach()
with attnctl.control(pipe, PAG(scale=1.5)):
    assert (run() == changed).all()
print("RIGHT: a changed scale is that of a control made with it; 0 is plain, bit for bit")
"""
SWAPPED = """
import torch

model = timm.create_model("deit_tiny_patch16_224").eval()
x = torch.randn(1, 3, 224, 224)
with torch.no_grad():
    plain = model(x)
    swapped = attnctl.swap(model, "agent", num_agents=49)(x)
    attnctl.unswap(model)
    assert swapped.shape == plain.shape and (swapped != plain).any() and (model(x) == plain).all()
print("RIGHT: other logits of the same shape, and the old ones bit for bit after unswap")
"""
PAGE = """
from PIL import Image, ImageChops

assert ImageChops.difference(*(Image.open(p).convert("RGB") for p in (plain, controlled))).getbbox()
assert "PAG(" in report and "attnctl generate" in commands
print("RIGHT: two pictures, the judge's table, the report and the commands")
"""

# Checks: each returns what was seen, or fails ------------------------------------------------------------------------


def installed(clone: Path, said: Sequence[str]) -> str:
    """Check that pip says it has installed the clone."""
    (line,) = [line for line in said[-1].splitlines() if line.startswith("Successfully installed")]
    assert "attnctl" in line
    return re.search(r"attnctl-[\d.]+", line)[0]  # type: ignore[index]


def demo(clone: Path, said: Sequence[str]) -> str:
    """Check the sheet and the table of figures."""
    width, height = Image.open(clone / "out" / "demo.png").size
    rows = [line for line in said[0].splitlines() if "benchmarks/" in line]
    assert len(rows) >= 8, said[0][-500:]
    return f"a sheet of {width} x {height} and a table of {len(rows)} rows"


def script(clone: Path, said: Sequence[str]) -> str:
    """Check that the script's picture is the command's, pixel for pixel."""
    (made,) = (clone / "same").glob("*-pag-0.png")
    mine, theirs = (np.asarray(Image.open(p).convert("RGB")) for p in (clone / "own.png", made))
    assert "PAG" in said[0]
    assert (mine == theirs).all()
    return "the script's picture is the command's, pixel for pixel"


def said_right(clone: Path, said: Sequence[str]) -> str:
    """Check that the last lines of each script were reached."""
    lines = [line for text in said for line in text.splitlines() if line.startswith("RIGHT: ")]
    assert len(lines) == len(said), said[-1][-500:]
    return "; ".join(line.removeprefix("RIGHT: ") for line in lines)


def pictures(clone: Path, said: Sequence[str]) -> str:
    """Check that more test pictures are right than guessing gives."""
    answers = json.loads((clone / "answers" / "predictions.json").read_text(encoding="utf-8"))
    rows = answers["pictures"] if isinstance(answers, dict) else answers
    right = Counter(row["answer"] for row in rows)["triangle"]
    assert len(rows) == 20, len(rows)
    assert right > 12, right  # 7 by guessing
    for name in ("model.safetensors", "run.json", "confusion.png", "curve.png", "predictions.png"):
        assert (clone / "run" / name).is_file(), name
    return f"{right} of 20 triangles are called so after 5 epochs"


def maps(clone: Path, said: Sequence[str]) -> str:
    """Check the files, and that the map of the square lies on what is blue."""
    (folder,) = (p.parent for p in (clone / "out").rglob("words.png"))
    for name in ("image.png", "regions.json", "maps.safetensors", "maps.json"):
        assert (folder / name).is_file(), name
    return f"{len(list(folder.iterdir()))} files for two words"


def edited(clone: Path, said: Sequence[str]) -> str:
    """Check that the disc of the strip is red before and blue after."""
    (strip,) = (clone / "out").glob("in-*-strip.png")
    (video,) = (clone / "out").glob("in-*.mp4")
    values = np.asarray(Image.open(strip).convert("RGB")).astype(int)
    red, blue = ((values[..., a] - values[..., b] > 80).any(1) for a, b in ((0, 2), (2, 0)))
    rows = np.arange(len(values))
    assert red.any()
    assert blue.any()
    assert rows[red].mean() < rows[blue].mean()
    return f"red above and blue below in the strip; {video.stat().st_size // 1024} KiB of MP4"


def batch(clone: Path, said: Sequence[str]) -> str:
    """Check the table, the sheets, and that nothing is made twice."""
    with (clone / "study" / "prompts-pictures.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = Counter(row["column"] for row in rows)
    seeds = Counter(row["seed"] for row in rows)
    assert set(columns.values()) == {4}, columns
    assert len(seeds) == 2, seeds
    assert len(rows) == 12
    assert len(list((clone / "study").glob("*-compare-*.png"))) == 2
    assert all((clone / row["path"]).is_file() or (clone / "study" / row["path"]).is_file() for row in rows)
    assert re.search(r"PAG\(scale=3.0\)\s+4", said[2]), said[2]
    again = said[3].splitlines()
    told = next((line for line in again if "12" in line and ("there" in line or "kept" in line)), "")
    assert told, said[3][-600:]
    return f"12 pictures, 2 sheets; again: {told.strip()}"


def record(clone: Path, said: Sequence[str]) -> str:
    """Check that the second process says that the pixels are the same."""
    assert re.search(r"\b3 +yes\b", said[1]), said[1]  # the seed, and whether its pixels are identical
    return "another process makes the same pixels"


def sparse(clone: Path, said: Sequence[str]) -> str:
    """Check plan, report and picture."""
    for folder in ("plan", "plan2"):
        for name in ("attnctl_blocks.json", "attnctl_blocks.safetensors", "report.md", "report.json", "maps.png"):
            assert (clone / folder / name).is_file(), name
    assert (clone / "paro.png").is_file()
    found = re.findall(r"[\d.]+ dB|[\d.]+ decibels", said[0])
    return f"plan and report; {len(found)} figures in dB said"
