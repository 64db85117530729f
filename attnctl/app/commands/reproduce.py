"""`attnctl reproduce`: run the headline experiment of a paper, and put published figures beside measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnctl.app.commands.common import Common, Result, UsageError, importing, say, table
from attnctl.plans.writing import check_writable

__all__ = ["Reproduce"]

_OWN = "(default: the recipe's)"


@dataclass(frozen=True, kw_only=True)
class Reproduce(Common):
    """Run the headline experiments of a method's paper; without a method, list them and what has been measured."""

    method: tyro.conf.Positional[str] = ""
    """A recipe, such as pag; they are listed without one."""

    only: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: all)")] = None
    """One experiment of the recipe."""

    plan: bool = False
    """Only say what it would cost: images, seconds, gigabytes."""

    toy: bool = False
    """Run at toy size, offline, with shipped or tiny random models. The figures mean nothing."""

    pictures: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_OWN)] = None
    """Pictures of each variant."""

    batch: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_OWN)] = None
    """Pictures in one pipeline call."""

    seed: int = 0
    """Seed of the first picture."""

    prompts: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: shipped)")] = None
    """Prompts of your own, one per line: a text file, or a folder of them."""

    coco: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """COCO's folder: its captions are the prompts, its pictures FID's reference."""

    reference: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Real pictures for FID."""

    clips: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Clips to edit, each with a text file: what it shows, and in a second line what it shall show."""

    heads: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint=_OWN)] = None
    """Heads that `attnctl hunt` has found, for headhunter."""

    metric: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    """Measure this instead of the recipe's metrics; several add up; "none" makes the pictures alone."""

    inception: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Weights of FID's Inception network, where they cannot be fetched."""

    model: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint=_OWN)] = None
    """A hub id or a local folder in place of the recipe's model."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = None
    """The commit or branch of a hub model."""

    offload: bool = False
    """Let parts of the model wait on the CPU until they are needed."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    dtype: str = "auto"
    """auto, float32, float16, bfloat16."""

    out: Path = Path("out/reproduce")
    """Folder of all reproductions; what is finished there is kept and skipped."""

    def run(self, command: str) -> Result:
        """List the recipes, or plan and run one."""
        from attnctl.errors import ConfigError
        from attnctl.pipelines.reproduce.recipes import experiments

        if not self.method:
            return self._list()
        try:
            self._check_numbers()
            chosen = experiments(self.method, self.only, toy=self.toy)
            importing()  # the metrics bring torch: what is wrong above is said without it
            from attnctl.pipelines.reproduce.metrics import by_name

            by_name(self._metrics(chosen[0]))
        except ConfigError as error:
            raise UsageError(str(error)) from None
        pool: dict[str, Any] = {}
        results = [self._one(experiment, command, pool) for experiment in chosen]
        done = [result for result in results if result is not None]
        if not done:
            return Result(None, "")
        text = "\n\n".join(text for _, text, _ in done)
        return Result({"experiments": [data for data, _, _ in done]}, text, max(code for _, _, code in done))

    def _list(self) -> Result:
        from attnctl.pipelines.reproduce.report import CATALOGUE, catalogue_rows

        rows = list(catalogue_rows(self.out))
        return Result([dict(zip(CATALOGUE, row, strict=True)) for row in rows], table(CATALOGUE, rows))

    def _check_numbers(self) -> None:
        from attnctl.pipelines.bounds import check_whole

        for name, kind in (("pictures", "num"), ("batch", "batch"), ("seed", "seed")):
            value = getattr(self, name)
            if value is not None:
                check_whole("frames" if kind == "num" else kind, value, UsageError, f"--{name}")

    def _metrics(self, experiment: Any) -> tuple[str, ...]:
        return () if self.metric == ("none",) else self.metric or experiment.metrics

    def _one(self, experiment: Any, command: str, pool: dict[str, Any]) -> tuple[dict[str, Any], str, int] | None:
        """Plan one experiment, and run it unless only the plan is wanted; None for all processes but the first."""
        import dataclasses

        from attnctl.pipelines.models import device_and_dtype
        from attnctl.pipelines.reproduce.prompts import asked, check_extras
        from attnctl.pipelines.workers import Workers

        if self.batch is not None and not experiment.edits:
            experiment = dataclasses.replace(experiment, batch=self.batch)
        device, dtype = device_and_dtype(self.device, self.dtype)
        if self.dtype == "auto" and device != "cpu":
            dtype = experiment.dtype
        crew = Workers("cpu" if device == "cpu" else None)
        if crew.size > 1 and device == "cuda":
            device = f"cuda:{crew.local}"
        wanted = asked(experiment, self.pictures, self.seed, self.prompts, self.coco, self.clips, self.plan)
        if self.clips is not None or not experiment.edits:
            check_extras(experiment, wanted)
        return _Run(self, experiment, wanted, device, dtype, crew, command, pool).run()


@dataclass
class _Run:
    """One experiment on its way: plan, pictures, figures."""

    flags: Reproduce
    experiment: Any
    wanted: Sequence[Any]
    device: str
    dtype: str
    crew: Any
    command: str
    pool: dict[str, Any]
    """The pipeline that the experiment before has loaded, by its name."""

    def run(self) -> tuple[dict[str, Any], str, int] | None:
        """Say the cost, make what is missing, measure."""
        from attnctl.pipelines.reproduce.costs import in_words
        from attnctl.pipelines.reproduce.models import check_device
        from attnctl.pipelines.reproduce.report import COLUMNS, judged, lines_of, write_results
        from attnctl.pipelines.reproduce.run import heads_of
        from attnctl.pipelines.reproduce.store import Store

        flags, experiment = self.flags, self.experiment
        if not flags.plan:
            check_writable(flags.out)
        networks, names = self._networks()
        heads = heads_of(flags.heads)
        about = self._about(heads)
        store = Store(flags.out, experiment, about, self.crew.rank)
        store.claim(fresh=False)
        loaded = self._load() if experiment.toy else None
        cost = self._cost(store, loaded)
        if flags.plan:
            words = in_words(experiment, cost, self.device == "cpu")
            return None if self.crew.rank else ({"experiment": experiment.label, **cost.to_dict()}, words, 0)
        if not self.crew.rank:
            say(in_words(experiment, cost, self.device == "cpu"))
        check_device(experiment, self.device, flags.device, cost.seconds / 3600)
        if not self.crew.rank:
            networks.fetch(self._needed(names))
        if cost.finished < cost.pictures:
            self._make(store, loaded or self._load(), heads)
        if self.crew.rank:
            return None
        results = judged(experiment, store, self.wanted, networks, names)
        data = write_results(experiment, store, self.wanted, results, {**about, "device": self.device})
        text = f"{experiment.label}: {experiment.about}\n{table(COLUMNS, lines_of(data))}\n{self._remarks(data, store)}"
        return {**data, "out": str(store.folder)}, text, 1 if data["missing"] else 0

    def _remarks(self, data: dict[str, Any], store: Any) -> str:
        e = self.experiment
        remarks = [f"not measured: {name}: {why}" for name, why in data["missing"].items()]
        if e.toy:
            remarks.append("At toy size: the figures mean nothing.")
        elif e.figures:
            remarks.append(f"Published figures: {e.source}.")
        if e.note and not e.toy:
            remarks.append(e.note)
        return "\n".join([*remarks, f"pictures, results.json, results.md, sheet.png: {store.folder}"])

    def _load(self) -> Any:
        from attnctl.pipelines.reproduce.models import load_model

        flags = self.flags
        name = f"{flags.model or self.experiment.model} {self.experiment.adapter}"
        if name in self.pool:
            return self.pool[name]
        self.pool.clear()
        if not self.crew.rank:
            say(f"Loading {flags.model or self.experiment.model} ({self.device}, {self.dtype})")
        self.pool[name] = load_model(
            self.experiment, flags.model, revision=flags.revision, device=self.device, dtype=self.dtype,
            offload=flags.offload,
        )  # fmt: skip
        return self.pool[name]

    def _about(self, heads: Any) -> dict[str, Any]:
        """Say what must be the same whenever the folder is used again."""
        from attnctl.pipelines.hunting.log import key_of

        e, flags = self.experiment, self.flags
        facts = [e.steps, e.guidance, e.height, e.width, e.negative, dict(e.options), e.prefix]
        ways = [[v.name, list(v.controls), v.guidance, v.density] for v in e.variants]
        return {
            "model": flags.model or e.model, "adapter": e.adapter, "revision": flags.revision, "seed": flags.seed,
            "settings": key_of(facts, ways, heads or e.heads),
            "prompts": self.wanted[0].prompt,
        }  # fmt: skip

    def _networks(self) -> tuple[Any, tuple[str, ...]]:
        """Return the networks that measure, and what is measured; refuse what cannot be, before any work."""
        from attnctl.pipelines.reproduce.networks import Networks, ToyNetworks
        from attnctl.pipelines.reproduce.prompts import pictures_in

        flags, e = self.flags, self.experiment
        names = flags._metrics(e)
        folder = flags.reference or flags.coco
        real = pictures_in(folder, "real pictures") if folder is not None and "fid" in names else ()
        if "fid" in names and not real and not e.toy and not flags.plan:
            raise UsageError(
                f"{e.label} measures FID to real pictures: give --coco DIR (COCO's pictures and captions) or "
                "--reference DIR, or choose other metrics with --metric."
            )
        kind = ToyNetworks if e.toy else Networks
        return kind(e.clip, self.device, real, flags.inception), names

    def _needed(self, names: Sequence[str]) -> list[str]:
        """Name the networks that the metrics look through."""
        from attnctl.pipelines.reproduce.metrics import by_name
        from attnctl.pipelines.reproduce.networks import check_torchmetrics

        metrics = by_name(names)
        if any(m.torchmetrics for m in metrics):
            check_torchmetrics()
        return sorted({network for m in metrics for network in m.networks})

    def _cost(self, store: Any, loaded: Any) -> Any:
        from attnctl.pipelines.reproduce.costs import estimate
        from attnctl.pipelines.reproduce.run import row_seconds

        e = self.experiment
        finished = [store.finished(v, self.wanted) for v in e.variants]
        seen = store.seconds()
        timed = row_seconds(e, loaded, self.wanted) if loaded is not None and not all(seen) else None
        return estimate(
            e, len(self.wanted), finished, self.device, self.dtype, self.crew.size, seen, timed, self._clip_frames()
        )

    def _clip_frames(self) -> float:
        """Return the mean number of frames of the clips to edit: 1 where none is, 8 for one that is not given yet."""
        from attnctl.data.clips import open_clip

        if not self.experiment.edits:
            return 1.0
        counts = [8 if one.clip is None else open_clip(one.clip).count for one in self.wanted]
        return sum(counts) / len(counts)

    def _make(self, store: Any, loaded: Any, heads: Any) -> None:
        import sys

        from tqdm import tqdm

        from attnctl.pipelines.reproduce.run import Job

        store.claim()
        total = len(self.wanted) * len(self.experiment.variants)
        quiet = self.crew.rank > 0 or not sys.stderr.isatty()
        with tqdm(total=total, unit="picture", disable=quiet, leave=False) as bar:
            Job(self.experiment, loaded, self.wanted, store, self.crew, heads, self.command, say, bar.update).run()
        store.claim()  # reads what the other processes have written down
