"""Hostile records and lists of prompts, made at random from a seed: numbers, lengths and texts that nobody needs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from attnctl.data.record import SCHEMA

__all__ = ["prompt_file", "record_file"]

_MOST = 17 << 20  # characters of a file: readers refuse from 16 MiB on
_NUMBERS: tuple[Any, ...] = (
    -1,
    0,
    1,
    2,
    3,
    7,
    65,
    255,
    1024,
    1025,
    16_385,
    10**5,
    10**6,
    10**9,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    10**20,
    -(2**63),
    0.5,
    -0.0,
    1e308,
    True,
    None,
    "7",
    [1],
    {},
)
_TEXTS: tuple[Any, ...] = (
    "",
    " ",
    "a cat",
    "../../etc/passwd",
    "/dev/zero",
    "a" * 5_000,
    "a" * 200_000,
    "\u202e\u0007",
    "{0}{1}",
    "%s%n",
    "__import__('os').system('id')",
    "http://127.0.0.1/x",
    "\ud800",
    "😀" * 1000,
    None,
    3,
    [],
    {},
)
_CONTROLS: tuple[Any, ...] = (
    {"method": "PAG", "scale": 1e308},
    {"method": "PAG", "scale": "x"},
    {"method": "PAG", "sites": ["mid"] * 5_000},
    {"method": "PAG", "sites": {"type": "range", "start": 0, "stop": 10**18, "step": 1}},
    {"method": "Nothing"},
    {"method": "SEG", "sigma": 1e30},
    {"method": "SEG", "sigma": {"type": "float", "value": "inf"}},
    {"method": 3},
    [],
    {"method": "AStar", "words": ["cat"] * 10_000},
    {"method": "AttendExcite", "words": [[["a"]]]},
    {"method": "SoftPAG", "heads": {"type": "HeadSet", "pairs": [["a", 10**12]]}},
    {"method": "NAG", "scale": -1},
    {"method": "FDG", "levels": 10**9},
    {"method": "PARO", "plan": "/dev/zero"},
    {"method": "PARO", "plan": "a/b"},
    {"method": "SparseAttention", "select": {"type": "Online", "density": 1e-300, "block": 10**9}},
    {"method": "Regions", "prompts": ["a"] * 300, "areas": [[0, 0, 1, 1]] * 300},
    {"method": "Capture"},
    {"method": "AgentAttention", "ratio": 10**9},
    {"method": "ShareAttention"},
    {"method": "PAG", "start": 2.0},
    {"method": "PAG", "every": 10**9},
    {"method": "CFGPlusPlus"},
    {"method": "AutoGuidance", "rate": 5},
)
_FORMS = (
    "PAG(scale=1e400)",
    "PAG + " * 500 + "PAG",
    "PAG(sites=range(0, 10**18))",
    "PAG(sites=[1] * 10**9)",
    "(" * 3_000,
)
_BYTES = (b"\xff\xfe\x00", b"\0" * 1_000, b'prompt\n"' + b"a" * 300_000)
_SCHEDULERS: tuple[Any, ...] = (
    {},
    {"_class_name": "DDIMScheduler"},
    {"_class_name": "EulerDiscreteScheduler", "beta_start": "x"},
    {"_class_name": "DDIMScheduler", "num_train_timesteps": 10**12},
    {"_class_name": "__import__"},
    {"_class_name": "DDIMScheduler", "num_train_timesteps": 1},
    {"_class_name": "UniPCMultistepScheduler", "solver_order": 99},
    {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "none"},
    {"_class_name": "SchedulerMixin"},
    {"_class_name": "DDIMScheduler", "trained_betas": [0.1] * 9_000},
    {"_class_name": "LCMScheduler", "steps_offset": -(10**5)},
    {"_class_name": "DDIMScheduler", "beta_end": 1e308},
    {"_class_name": "DDPMScheduler", "variance_type": "learned"},
)
_OPTIONS: tuple[Any, ...] = (
    {"max_sequence_length": 10**9},
    {"num_frames": 10**6},
    {"clip_skip": 10**6},
    {"clip_skip": "x"},
    {"eta": "x"},
    {"guidance_rescale": 1e308},
    {"guidance_rescale": "x"},
    {"cross_attention_kwargs": {"scale": []}},
    {"sigmas": [1] * 20_000},
    {"timesteps": list(range(5_000, 0, -1))},
    {"timesteps": [0]},
    {"callback_on_step_end_tensor_inputs": ["unet"]},
    {"prompt_embeds": [0] * 9_000},
    {"latents": [[1]]},
    {"ip_adapter_image": "/etc/passwd"},
    {"generator": 1},
    {"a": {"b": 1}},
)


def record_file(rng: random.Random, sound: dict[str, Any], path: Path) -> Path:
    """Write a record with one to three hostile fields, or a file that is none; return its path."""
    data = dict(sound)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data |= _spoiled(rng, data)
    text = json.dumps(data, allow_nan=True)
    kind = rng.random()
    if kind < 0.05:
        text = text[: rng.randrange(len(text))]
    elif kind < 0.08:
        text = f'{{"schema": {SCHEMA}, "records": [{_repeated(text, rng.choice((0, 1, 2, 2_000)), ", ")}]}}'
    elif kind < 0.1:
        text = "[" * rng.choice((10, 10_000)) + text
    path.write_text(text[:_MOST], encoding="utf-8", errors="surrogatepass")
    return path


def _repeated(text: str, times: int, between: str) -> str:
    """Repeat a text, but not far beyond what a reader takes: the memory measured is to be the reader's."""
    return between.join([text] * min(times, 1 + _MOST // (len(text) + 1)))


def _spoiled(rng: random.Random, data: dict[str, Any]) -> dict[str, Any]:
    n = rng.choice((1, 2, 1_025, 20_000))
    name = rng.choice((*data, "controls", "controls", "options", "options", "scheduler", "pictures", "strange"))
    if name == "pictures":  # of one call
        return {"prompts": ["a cat"] * n, "seeds": list(range(n)), "sha256": ["0" * 64] * n, "shows": list(range(n))}
    if name == "controls":
        return {name: [rng.choice(_CONTROLS) for _ in range(rng.choice((1, 1, 2, 200)))]}
    if name == "options":
        return {name: rng.choice(_OPTIONS)}
    if name == "scheduler":
        return {name: rng.choice(_SCHEDULERS)}
    if name in ("seeds", "shows"):
        return {name: [rng.choice(_NUMBERS) for _ in range(rng.choice((1, 1, 3, 20_000)))]}
    if name in ("prompts", "sha256", "sites"):
        return {name: [rng.choice(_TEXTS) for _ in range(rng.choice((0, 1, 1, 2, 20_000)))]}
    if name == "strange":
        return {rng.choice(("__class__", "from", "a" * 1_000, "schema")): rng.choice(_TEXTS)}
    old = data[name]
    return {name: rng.choice(_NUMBERS if isinstance(old, (int, float)) else _TEXTS)}


def prompt_file(rng: random.Random, folder: Path, number: int) -> Path:
    """Write a hostile list of prompts; return its path."""
    kind = rng.choice((".txt", ".csv", ".jsonl", ".jsonl", ".tsv", ".exe"))
    path = folder / f"{number}{kind}"
    if rng.random() < 0.15:
        path.write_bytes(
            rng.choice((b"\xff\xfe\x00", b"\0" * 1_000, rng.randbytes(2_000), b'prompt\n"' + b"a" * 300_000))
        )
        return path
    count = rng.choice((0, 1, 1, 1, 2, 12_000))
    rows = [_line(rng) for _ in range(min(count, 3))]
    if kind == ".jsonl":
        head, lines = "", [json.dumps(row) for row in rows]
    elif kind in (".csv", ".tsv"):
        mark = "," if kind == ".csv" else "\t"
        names = sorted({name for row in rows for name in row})
        head, lines = mark.join(names) + "\n", [mark.join(str(row.get(name, "")) for name in names) for row in rows]
    else:
        head, lines = "", [str(row["prompt"]) for row in rows]
    text = head + _repeated("\n".join(lines), max(1, count // 3), "\n")
    path.write_text(text[:_MOST], encoding="utf-8", errors="surrogatepass")
    return path


def _line(rng: random.Random) -> dict[str, Any]:
    line: dict[str, Any] = {"prompt": rng.choice((*_TEXTS, "a cat", "a dog"))}
    for name in ("seed", "num", "steps", "guidance", "width", "height"):
        if rng.random() < 0.2:
            line[name] = rng.choice(_NUMBERS)
    if rng.random() < 0.2:
        line["control"] = rng.choice(
            (*_TEXTS, "PAG(scale=1e400)", "PAG + " * 500 + "PAG", "PAG(sites=range(0, 10**18))", "(" * 3_000)
        )
    if rng.random() < 0.1:
        line[rng.choice(("negative", "model", "from", "__class__"))] = rng.choice(_TEXTS)
    return line
