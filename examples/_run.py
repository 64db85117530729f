"""What the examples share: the command line, the shipped model or one of the Hub, and the same noise every time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import attnctl

__all__ = ["PROMPT", "SCALE", "STEPS", "arguments", "compare", "draw", "model", "prompt_of", "save_gif"]

PROMPT = {"help": "what to draw"}
SCALE = {"type": float, "default": 3.0, "help": "guidance weight"}
STEPS = {"type": int, "help": "denoising steps"}


def arguments(
    about: str, *, shapes: str = "use the shipped model", steps: Any = STEPS, seed: bool = True, **options: Any
) -> Any:
    """Read --shapes, the options of the example by name (what argparse takes), --steps, --seed and --out."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", action="store_true", help=shapes)
    for name, option in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option)
    if steps is not None:
        parser.add_argument("--steps", **steps)
    if seed:
        parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def model(
    args: Any, shipped: str, pipeline: str, repository: str, *, dtype: str = "float16", cpu: bool = False, **more: Any
) -> Any:
    """Load a shipped model under --shapes, else a pipeline of the Hub onto the GPU; `cpu` says that it runs without."""
    if args.shapes:
        return attnctl.load_shapes(shipped)
    import diffusers

    gpu = torch.cuda.is_available()
    if not gpu and not cpu:
        raise SystemExit("This model needs a CUDA GPU; --shapes runs anywhere.")
    kind = getattr(torch, dtype) if gpu else torch.float32
    loaded = getattr(diffusers, pipeline).from_pretrained(repository, torch_dtype=kind, **more)
    return loaded.to("cuda" if gpu else "cpu")


def prompt_of(args: Any, prompt: str, shapes: str = "a red circle and a blue square on gray") -> str:
    """Return the prompt that was given, or one that suits the model."""
    return args.prompt or (shapes if args.shapes else prompt)


def draw(args: Any, pipe: Any, prompt: str, **call: Any) -> Any:
    """Generate an image from the same noise every time, in --steps or the example's own number of steps."""
    if args.steps:
        call["num_inference_steps"] = args.steps
    return pipe(prompt, **call, generator=torch.Generator("cpu").manual_seed(args.seed)).images[0]


def compare(args: Any, pipe: Any, prompt: str, control: Any, name: str, **call: Any) -> None:
    """Write plain.png and NAME.png, and print what acted where."""
    plain, controlled = args.out / "plain.png", args.out / f"{name}.png"
    draw(args, pipe, prompt, **call).save(plain)
    with attnctl.control(pipe, control) as handle:
        draw(args, pipe, prompt, **call).save(controlled)
        print(handle.report())
    print(f"wrote {plain} and {controlled}")


def save_gif(frames: Sequence[Any], path: Path, duration: int) -> None:
    """Write frames as a moving picture; each is shown for so many milliseconds."""
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
