"""`attnctl hunt`: search for the attention heads whose perturbation serves an objective."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, say, table
from attnctl.data.progress import in_words

__all__ = ["Hunt"]

_Whole = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the preset's)")]
_Number = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="(default: the preset's)")]
_OF_THE_PLAN = ("rounds", "k", "u", "scale", "steps", "guidance")
_FOR_HEADS_ALONE = ("rounds", "k", "u", "heads", "prune", "group", "repeats", "validate", "show")
_PRESETS = {"quality": (1, 24, 0.25), "style": (5, 3, 1.0), "shapes": (1, 6, 0.5)}


@dataclass(frozen=True, kw_only=True)
class Hunt(Common):
    """Search for heads (HeadHunter, arXiv 2506.10978). Run it under torchrun to share the work between processes."""

    model: str = "shapes:mmdit"
    """`shapes:mmdit` or `shapes:text2image` (shipped), a hub id, or a local folder."""

    preset: Literal["quality", "style", "shapes"] = "shapes"
    """The published searches for quality and for a style, or one for the shipped models and their judge."""

    unit: Literal["head", "block"] = "head"
    """What to search for: heads, or the block to perturb."""

    method: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """With --unit block, the guidance to try: PAG, SEG, SLG, STG; several add up, without any all four."""

    objective: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: by preset)")] = None
    """shapes, clip, pickscore, blip, or module:function for a callable (images, prompts) of your own."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """Prompts to search on (the style preset's contents); without any, the preset's own."""

    style: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The style to search for, with --preset style."""

    pairs: _Whole = None
    """Use only the first prompt-seed pairs."""

    rounds: _Whole = None
    """Rounds; heads chosen in one act in the next."""

    k: _Whole = None
    """Heads chosen in a round."""

    u: _Number = None
    """Strength of the perturbation."""

    scale: _Number = None
    """Guidance weight."""

    steps: _Whole = None
    """Denoising steps."""

    guidance: _Number = None
    """Classifier-free guidance scale during the search; 0 is off."""

    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Another argument of the pipeline, such as height=512."""

    sites: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SELECTOR")] = ()
    """Restrict the pool to layers: names, globs, stages or depths; several add up."""

    heads: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Restrict the pool to a saved head set, or to labels such as "L1H10 L11H15"."""

    prune: float = 0.0
    """Share of the pool to drop by the first step's change."""

    halving: bool = False
    """Successive halving over pairs: candidates that do badly on the first ones see no more."""

    group: int = 0
    """Heads that act together in a picture, told apart by least squares: far fewer pictures. 0 tries each alone."""

    repeats: int = 1
    """How often the heads are dealt out into groups for each pair."""

    batch: int = 1
    """Pictures in one pipeline call; candidates of one layer share calls."""

    validate: bool = False
    """Also mark the chosen set after every round."""

    show: int = 0
    """Pairs to draw at the end: plain, each chosen head, the whole set."""

    log: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: OUT/log)")] = None
    """Folder of the log; a search that was stopped goes on from it."""

    out: Path = Path("heads")
    """Folder for the head set, the heat map and the pictures."""

    dry_run: bool = False
    """Only say what the search would cost: images, passes, hours on this machine."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The commit or branch of a hub model."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: str = "auto"
    """auto, float32, float16, bfloat16."""

    force: bool = False
    """Replace a result that is already there."""

    def run(self, command: str) -> Result:
        """Plan, say what it costs, search, save."""
        if self.unit == "head" and self.method:
            raise UsageError("--method is for --unit block: leave it out, or give --unit block.")
        importing()
        from attnctl.core.hosts.listing import find_sites
        from attnctl.errors import ConfigError
        from attnctl.pipelines.hunting.search import hunt, seconds_of
        from attnctl.pipelines.models import device_and_dtype, load
        from attnctl.pipelines.workers import Workers
        from attnctl.plans.writing import check_free

        file = "blocks.json" if self.unit == "block" else "hunt_result.json"
        if not self.dry_run:
            check_free([self.out / file], force=self.force)
        try:
            plan = self._block_plan() if self.unit == "block" else self._plan()
        except ConfigError as error:
            raise UsageError(str(error)) from None
        device, dtype = device_and_dtype(self.device, self.dtype)
        crew = Workers(device)
        if crew.size > 1 and device == "cuda":
            device = f"cuda:{crew.local}"
        if not crew.rank:
            say(f"Loading {self.model} ({device}, {dtype})")
        loaded = load(self.model, revision=self.revision, device=device, dtype=dtype)
        if self.unit == "block":
            return self._blocks(loaded, plan, crew, device)
        pool = plan.pool(find_sites(loaded.pipe))
        plan = self._halved(plan, len(pool))
        cost = plan.estimate(pool)
        data: dict[str, Any] = {
            "model": loaded.name, "pool": len(pool), "pairs": len(plan.pairs), "images": cost.images,
            "images_per_round": list(cost.search), "passes": cost.passes, "processes": crew.size,
        }  # fmt: skip
        if not crew.rank:
            say("Timing one picture on this machine")
        hours = seconds_of(loaded.pipe, plan) * cost.images / 3600 / crew.size if self.dry_run or not crew.rank else 0.0
        data["hours"] = round(hours, 4)
        outlook = (
            f"{len(pool)} heads, {len(plan.pairs)} prompt-seed pairs, {plan.rounds} rounds of {plan.k}: {cost.images} "
            f"images, {cost.passes} denoiser rows, about {in_words(3600 * hours)} on this machine "
            f"({crew.size} processes)"
        )
        if self.dry_run:
            return Result(data, outlook)
        if not crew.rank:
            say(outlook)
        result = self._found(hunt, loaded, plan, crew, device)
        if result is None:
            return Result(None, "")
        return Result(data | result.to_dict() | {"out": str(self.out)}, _text(result, self.out, self.model))

    def _found(self, search: Callable[..., Any], loaded: Any, plan: Any, crew: Any, device: str) -> Any:
        """Search and save what was found; return it, or None in all processes but the first."""
        from attnctl.pipelines.hunting.scorers import objective_of

        name, log = self.objective or {"shapes": "shapes"}.get(self.preset, "pickscore"), self.log or self.out / "log"
        result = search(loaded.pipe, plan, objective_of(name, device), log=log, model=loaded.name, objective=name)
        if crew.rank:
            return None
        result.save(self.out, force=self.force)
        return result

    def _plan(self) -> Any:
        """Build the plan that the flags describe."""
        from attnctl.data.specs import parse_option
        from attnctl.pipelines.hunting.plan import STYLE_CONTENTS, HuntPlan

        rounds, k, u = _PRESETS[self.preset]
        given: dict[str, Any] = {
            "rounds": rounds, "k": k, "u": u, "call": dict(parse_option(text) for text in self.option),
            "prune": self.prune, "prune_pairs": min(2, self.pairs or 2), "group": self.group, "repeats": self.repeats,
            "batch": self.batch, "show": self.show, "validate": self.validate,
        }  # fmt: skip
        for name in _OF_THE_PLAN:
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        if self.sites:
            given["sites"] = tuple(int(s) if s.isdigit() else s for s in self.sites)
        if self.heads is not None:
            given["heads"] = _heads(self.heads)
        if (self.preset == "style") != (self.style is not None):
            raise UsageError("--style and --preset style belong together: give both, or neither.")
        if self.preset == "style":
            plan = HuntPlan.style(str(self.style), self.prompt or STYLE_CONTENTS, **given)
        elif self.preset == "quality":
            if not self.prompt:
                raise UsageError("--preset quality needs prompts: give --prompt ten times, as published.")
            plan = HuntPlan.quality(self.prompt, **given)
        else:
            plan = self._shapes(given)
        if self.pairs is None:
            return plan
        if not 1 <= self.pairs <= len(plan.pairs):
            raise UsageError(f"--pairs {self.pairs} is out of range: this search has {len(plan.pairs)} pairs.")
        return replace(plan, pairs=plan.pairs[: self.pairs])

    def _shapes(self, given: dict[str, Any]) -> Any:
        from attnctl.pipelines.hunting.plan import HuntPlan
        from attnctl.shapes.scenes import pair_prompts

        prompts = self.prompt or pair_prompts(21, 64 if self.pairs else 16, "tuning")
        usual: dict[str, Any] = {"scale": 2.5, "steps": 10, "guidance": 3.0}
        if self.model == "shapes:mmdit":
            given["call"] = {"max_sequence_length": 0} | given["call"]
        return HuntPlan(pairs=tuple((text, i) for i, text in enumerate(prompts)), **usual | given)

    def _block_plan(self) -> Any:
        """Build the plan of a search for the block to perturb, on the prompts that a search for heads has."""
        from attnctl.pipelines.hunting.blocks import METHODS, BlockHunt

        usual = {f.name: f.default for f in fields(self)}
        given = [name for name in _FOR_HEADS_ALONE if getattr(self, name) != usual[name]]
        if given:
            raise UsageError(f"--{given[0]} is for a search for heads: leave it out with --unit block.")
        plan = self._plan()
        return BlockHunt(
            pairs=plan.pairs if self.pairs is not None else plan.pairs[:8], scale=plan.scale, steps=plan.steps,
            guidance=plan.guidance, sites=plan.sites, call=plan.call, batch=plan.batch,
            methods=tuple(name.upper() for name in self.method) or tuple(METHODS),
        )  # fmt: skip

    def _blocks(self, loaded: Any, plan: Any, crew: Any, device: str) -> Result:
        """Search for the block to perturb."""
        from attnctl.core.hosts.listing import find_sites
        from attnctl.pipelines.hunting.blocks import hunt_blocks
        from attnctl.pipelines.hunting.plan import halvings

        count = len(plan.candidates(find_sites(loaded.pipe)))
        if self.halving:
            plan = replace(plan, halving=halvings(count, len(plan.pairs), 1))
        data: dict[str, Any] = {"model": loaded.name, "candidates": count, "images": plan.images(count)}
        outlook = f"{count} candidates, {len(plan.pairs)} prompt-seed pairs: {data['images']} images at most"
        if self.dry_run:
            return Result(data, outlook)
        if not crew.rank:
            say(outlook)
        ranked = self._found(hunt_blocks, loaded, plan, crew, device)
        if ranked is None:
            return Result(None, "")
        return Result(data | ranked.to_dict() | {"out": str(self.out)}, _ranked(ranked, self.out, self.model))

    def _halved(self, plan: Any, pool: int) -> Any:
        from attnctl.pipelines.hunting.plan import halvings

        if not self.halving:
            return plan
        return replace(plan, halving=halvings(pool - int(plan.prune * pool), len(plan.pairs), plan.k))


def _heads(text: str) -> Any:
    from attnctl.plans import HeadSet

    return HeadSet.from_pretrained(text) if Path(text).exists() else HeadSet.from_labels(text)


def _ranked(ranked: Any, out: Path, model: str) -> str:
    rows = [
        (i + 1, method, site, f"{ranked.gains[method, site][0]:+.4f}", f"{ranked.gains[method, site][1]:.4f}",
         ranked.seen[method, site])
        for i, (method, site) in enumerate(ranked.ranking[:12])
    ]  # fmt: skip
    lines = [table(("place", "method", "site", "gain", "error", "pairs"), rows)]
    lines += [f"{method} at {site} was refused: {reason}" for (method, site), reason in ranked.refused.items()]
    lines.append(f"plain: {ranked.baseline:.4f}; {ranked.images} images; {out / 'blocks.json'}")
    control = ranked.control()
    if control is None:
        return "\n".join([*lines, "No candidate has bettered plain pictures: use none, or try another --scale."])
    form, prompt = control.describe(), ranked.plan.pairs[0][0]
    command = shlex.join(("attnctl", "generate", "--model", model, "--prompt", prompt, "--control", form))
    return "\n".join([*lines, "To use it:", f"  {form}", f"  {command}"])


def _text(result: Any, out: Path, model: str) -> str:
    rows = [
        (i + 1, f"{site} head {head}", round(r.scores[site, head], 4), r.seen[site, head])
        for i, r in enumerate(result.rounds)
        for site, head in r.chosen
    ]
    lines = [table(("round", "head", "mark", "pairs"), rows)]
    if result.baseline is not None:
        lines.append(f"without perturbation: {result.baseline:.4f}")
    lines += [f"after round {i + 1}: {r.score:.4f}" for i, r in enumerate(result.rounds) if r.score is not None]
    strength = f"u={result.plan.u:g}, scale={result.plan.scale:g})"
    arguments = shlex.join(("--model", model, "--prompt", result.plan.pairs[0][0]))
    pairs = "".join(f'("{site}", {head}), ' for site, head in result.heads.pairs).rstrip()
    lines += [
        f"{result.images} images; {out}: head set, marks, heat map. To use them:",
        f'  SoftPAG(heads=HeadSet.from_pretrained("{out}"), {strength}',
        f"  attnctl generate {arguments} --control 'SoftPAG(heads=({pairs}), {strength}'",
    ]
    return "\n".join(lines)
