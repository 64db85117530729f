"""Words of a prompt against the tokens that the text encoders were given: `python benchmarks/words.py`.

Every text-to-image or -video pipeline of diffusers whose encoders can be built tiny (random weights, a trained byte
tokenizer) encodes a prompt with its own code: its template, cleaning, padding, dropping and joining. Two experiments
say where the word "cat" is among the text tokens that attention sees, and know nothing of layouts:

fed         the same prompt with "dog" for "cat" is encoded: where the ids that an encoder is fed differ is the word
moved       the encoder's output is changed at these ids alone: the rows of the embeddings that change are its places

They are set beside the places that attnctl names. Counted are classes of denoisers with at least one pipeline whose
places are right, and none whose places are wrong. The table goes to stderr, the JSON to stdout.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402, F401  (first: offline, quiet, one thread)
import diffusers  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
import zoo_pipelines as pipes  # noqa: E402
from test_roads_words import PROMPT, bpe, tiny  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from attnctl.core.hosts.prompt import PromptWatch  # noqa: E402
from attnctl.core.hosts.textlayout import text_before  # noqa: E402
from attnctl.core.hosts.words import words_in  # noqa: E402
from attnctl.data.provenance import versions  # noqa: E402

RESULT = Path(__file__).parent / "results" / "words.json"
ENCODERS = (("CLIP", "clip"), ("Gemma", "gemma"), ("T5", "t5"), ("Bert", "t5"))
CAUSAL = ("Qwen", "Llama", "Mistral", "GLM", "Glm", "SmolLM", "Ministral", "Auto", "PreTrained")
# What calls cannot leave out, or what makes them longer than a tiny encoder is.
VARIANTS = re.compile(
    "Img2Img|Image2Image|Inpaint|ControlNet|PAG|Upscale|Edit|Fill|Redux|Control|Video2Video|VideoToVideo|Alt|Audio"
)
OPTIONS = {"device": "cpu", "do_classifier_free_guidance": False, "text_encoder_out_layers": (1, 2, 3)}


def parts_of(cls: type) -> dict[str, Any]:
    """Build a pipeline's tokenizers and text encoders by the types that it asks for; everything else is left out."""
    told = inspect.signature(cls.__init__).parameters
    made: dict[str, Any] = {name: None for name in list(told)[1:] if told[name].default is inspect.Parameter.empty}
    for name in [n for n in told if n.startswith("text_encoder")]:
        asked = str(told[name].annotation)
        kind = next((kind for part, kind in ENCODERS if part in asked), None)
        kind = kind or ("qwen" if any(part in asked for part in CAUSAL) else None)
        tokenizer = name.replace("text_encoder", "tokenizer")
        if kind is None or tokenizer not in told:
            raise ValueError(f"no tiny encoder of the kind {asked:.80}")
        if kind == "clip":
            text = pipes.Parts(batch=1, dtype=torch.float32, seed=0).text()
            made |= {tokenizer: text["tokenizer"], name: text["text_encoder"]}
            if "WithProjection" in asked:
                from transformers import CLIPTextModelWithProjection

                made[name] = CLIPTextModelWithProjection(text["text_encoder"].config).eval()
        else:
            made |= {tokenizer: bpe(start=kind != "t5"), name: tiny(kind, width=96 if kind == "t5" else 16)}
    if "scheduler" in made:
        made["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    if "safety_checker" in told:
        made["safety_checker"] = nn.Identity()
    return made


def denoiser_class(cls: type) -> str | None:
    """Name the denoiser that a pipeline asks for."""
    told = inspect.signature(cls.__init__).parameters
    for name in ("transformer", "unet", "prior", "decoder"):
        if name in told:
            found = re.findall(r"\w+(?:Transformer\w*|UNet\w*|DiT\w*|Model|UVit\w*)\b", str(told[name].annotation))
            return str(found[0]) if found else None
    return None


def build(cls: type) -> Any:
    """Build a pipeline, with a denoiser of the zoo where there is one."""
    made = parts_of(cls)
    wanted = denoiser_class(cls)
    for name in ("transformer", "unet"):
        if name in made and wanted in DENOISERS:
            made[name] = zoo.build(DENOISERS[str(wanted)], 1)[0]
    return cls(**made)


def _denoisers() -> dict[str, str]:
    """Name one family of the zoo per class of denoisers."""
    return {type(zoo.build(name, 1)[0]).__name__: name for name in reversed(zoo.EVERY)}


DENOISERS: dict[str, str] = {}


@contextmanager
def listening(pipe: Any, moved: dict[str, list[int]]) -> Iterator[dict[str, list[int]]]:
    """Note the ids that each encoder is fed, and change its output at some of them."""
    fed: dict[str, list[int]] = {}

    def hook(name: str) -> Any:
        def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            ids = kwargs.get("input_ids", args[0] if args else None)
            fed.setdefault(name, []).extend(ids[0].tolist())
            places = [p for p in moved.get(name, []) if p < ids.shape[1]]
            for key in ("last_hidden_state", "hidden_states"):
                value = getattr(output, key, None)
                if isinstance(value, Tensor):
                    setattr(output, key, bumped(value, places))
                elif value is not None:
                    setattr(output, key, tuple(bumped(x, places) for x in value))
            return output

        return after

    names = [
        n for n in ("text_encoder", "text_encoder_2", "text_encoder_3") if isinstance(getattr(pipe, n, None), nn.Module)
    ]
    hooks = [getattr(pipe, n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    try:
        yield fed
    finally:
        for h in hooks:
            h.remove()


def bumped(x: Tensor, places: list[int]) -> Tensor:
    """Change the states of some tokens."""
    x = x.clone()
    x[:, places] += torch.linspace(1, 2, x.shape[-1])
    return x


def encode(pipe: Any, prompt: str, moved: dict[str, list[int]], watched: bool = False) -> tuple[Any, Tensor, Any]:
    """Encode a prompt: what the encoders were fed, the embeddings of the prompt [T, C], and what attnctl heard."""
    told = inspect.signature(type(pipe).encode_prompt).parameters
    options = {n: OPTIONS.get(n) for n, p in told.items() if p.default is inspect.Parameter.empty and n != "self"}
    options |= {n: v for n, v in OPTIONS.items() if n in told}
    options |= {n: 1 for n in ("num_images_per_prompt", "num_videos_per_prompt") if n in told}
    if type(pipe).__name__.startswith(("HunyuanVideoPipeline", "HunyuanSkyreels")):
        options["prompt_template"] = {"template": "a photo of {} and the mat", "crop_start": 2}
    watch = PromptWatch(pipe).attach()
    try:
        watch.begin()
        with listening(pipe, moved) as fed, torch.no_grad():
            out = pipe.encode_prompt(**options | {"prompt": [prompt]})
        first = out[0] if isinstance(out, (tuple, list)) else out
        return fed, first[0], watch.call
    finally:
        watch.detach()


def measured(cls: type) -> dict[str, Any]:
    """Compare the places of a word in one pipeline."""
    row: dict[str, Any] = {"denoiser": denoiser_class(cls)}
    try:
        pipe = build(cls)
        fed, plain, call = encode(pipe, PROMPT, {})
        other = encode(pipe, PROMPT.replace("cat", "dog"), {})[0]
        places = {
            n: [i for i, (a, b) in enumerate(zip(ids, other[n], strict=True)) if a != b] for n, ids in fed.items()
        }
        moved = encode(pipe, PROMPT, places)[1]
        changed = [int(i) for i in (plain != moved).any(-1).nonzero()[:, 0]]
    except Exception as error:
        return row | {"result": "not built", "why": f"{type(error).__name__}: {str(error)[:160]}"}
    if not changed or call is None:
        return row | {"result": "not built", "why": "the experiment changes no row of the embeddings"}
    truth = [text_before(pipe) + i for i in changed]
    if call.readings is None:
        return row | {"result": "refused", "truth": truth}
    named = sorted(words_in(call.readings[0], ["cat"])[0].positions)
    return row | {"result": "right" if named == truth else "wrong", "named": named, "truth": truth, "rows": len(plain)}


def main() -> int:
    """Run all pipelines and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None, help="names of pipelines")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    DENOISERS.update(_denoisers())
    names = options.only or sorted(n for n in dir(diffusers) if n.endswith("Pipeline") and not VARIANTS.search(n))
    rows: dict[str, Any] = {}
    for name in names:
        try:
            cls = getattr(diffusers, name)
            known = isinstance(cls, type) and hasattr(cls, "encode_prompt")
        except (ImportError, RuntimeError):  # it wants a package that is not installed
            continue
        if not known:
            continue
        rows[name] = measured(cls)
        print(f"{name}: {rows[name]}", file=sys.stderr)
    results = {
        n: [r["result"] for r in rows.values() if r["denoiser"] == n] for n in {r["denoiser"] for r in rows.values()}
    }
    right = sorted(str(n) for n, found in results.items() if n and "right" in found and "wrong" not in found)
    count = {r: sum(row["result"] == r for row in rows.values()) for r in ("right", "wrong", "refused", "not built")}
    made = {"versions": versions(), "classes": len(right), "right_classes": right, "pipelines": count, "rows": rows}
    print(json.dumps(made, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
