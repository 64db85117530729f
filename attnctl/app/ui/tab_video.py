"""The tab "Video": a video plain and under chosen methods, and an uploaded clip or picture edited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from attnctl.app.ui import actions, video_actions
from attnctl.app.ui.inputs import (
    Fields,
    accounts,
    afterwards,
    ask,
    following,
    further_controls,
    picture,
    said,
    table,
    ticks,
    written,
)
from attnctl.app.ui.methods import Methods, controls_of
from attnctl.app.ui.models import Models
from attnctl.app.ui.video_actions import EditAsk
from attnctl.pipelines.models import SHIPPED

__all__ = ["video_tab"]

_PROMPTS = ("a red circle moving right fast on gray", "a blue square moving up slow on white")
_ELSEWHERE = ("a horse galloping along the beach", "a paper boat on a river")
_WORDS = ("a red circle on gray", "a blue circle on gray")
_STEPS = 10
_SHARE: dict[str, Any] = {"minimum": 0, "maximum": 1, "step": 0.05}
_ALONE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def video_tab(models: Models, folder: Path) -> None:
    """Lay out the tab: two tabs in it."""
    with gr.Tab("Generate", id="video-make"):
        _make_tab(models, folder)
    with gr.Tab("Edit", id="video-edit"):
        _edit_tab(models, folder)


def _make_tab(models: Models, folder: Path) -> None:
    prompts = _PROMPTS if models.videos[0].startswith(SHIPPED) else _ELSEWHERE
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            fields = Fields(models.videos, prompts[0])
            methods = Methods(models, models.videos[0])
            go = gr.Button("Generate video", variant="primary", elem_id="video-go")
            methods.lay_out_knobs()
            with gr.Accordion("More", open=False):
                methods.lay_out_rules()
                more = further_controls("EnhanceAVideo(weight=4.0)")
            gr.Examples([[p] for p in prompts], [fields.prompt], label="Click an example")
        with gr.Column(scale=6, min_width=400):
            with gr.Row():
                plain, controlled = _player("Plain", "video-plain"), _player("Controlled", "video-controlled")
            marks = gr.Markdown(
                "Press *Generate video*: the same noise becomes a video twice.",
                elem_id="video-marks",
                elem_classes=["marks"],
            )
            frames = picture("Frames", "video-frames")
            files = gr.File(label="Files with their record", interactive=False, visible=False)
            report, command = accounts()
    shown = [plain, controlled, frames, marks, files, report, command]
    event = go.click(
        _make(models, folder),
        [*fields.all, *methods.all, more],
        shown,
        inputs_kwargs=methods.named,
        api_name="video",
        show_progress_on=[plain, controlled],
        **_ALONE,
    )
    afterwards(event, shown, "video-plain")
    methods.follow(fields)


def _make(models: Models, folder: Path) -> Callable[..., Any]:
    """Return what the button "Generate video" does."""

    @said
    def video(
        model: str,
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        methods: list[str],
        rule: str,
        controls: str,
        progress: Any = gr.Progress(),  # noqa: B008
        **values: Any,
    ) -> tuple[Any, ...]:
        """Make a video plain and under control: both MP4s, frames of both, the table, files, report, commands."""
        request = ask(model, prompt, seed, steps, guidance)
        acting = [*controls_of(methods, rule, values, model, prompt), *written(controls)]
        done = actions.compare(models, request, acting, ticks(progress, models, request, 2 if acting else 1))
        films = [video_actions.preview(folder, run.videos[0]) for _, run, _ in done.runs]
        strips = [actions.keep(folder, f"{name} {prompt}", run) for name, run, _ in done.runs]
        mp4s = [video_actions.film(folder, f"{n} {prompt}", run.videos[0], run.record) for n, run, _ in done.runs]
        missing = [None] * (2 - len(films))
        return (
            *films,
            *missing,
            actions.keep_bytes(folder, "frames.png", video_actions.frames_sheet(done)),
            table(*video_actions.video_marks(done, prompt)),
            gr.update(value=[f for f in (*mp4s, *strips) if f], visible=True),
            done.report,
            done.commands,
        )

    return video


def _usual(model: str) -> tuple[int | None, float | None, int | None]:
    """Return steps, guidance and size to begin an edit with; None is the model family's own."""
    if not model.startswith(SHIPPED):
        return None, None, 512
    return _STEPS, 2.0 if model == f"{SHIPPED}videodit" else 4.0, 64


class _EditInputs:
    """Hold the left side of the tab "Edit": a video or pictures, two prompts, settings, and the button."""

    def __init__(self, models: Models, folder: Path) -> None:
        first, several = models.edits[0], len(models.edits) > 1
        steps, guidance, size = _usual(first)
        small = first.startswith(SHIPPED)
        self.model = gr.Dropdown(list(models.edits), value=first, label="Model", visible=several)
        self.clip = gr.File(
            label="A video, a GIF, a picture, or the pictures of a folder",
            file_count="multiple",
            file_types=["video", "image"],
            height=140,
            elem_id="edit-video",
        )
        self.source = gr.Textbox(_WORDS[0] if small else "", label="What it shows")
        self.target = gr.Textbox(_WORDS[1] if small else "", label="What it shall show")
        self.method = gr.Radio(list(video_actions.EDIT_METHODS), value="fatezero", label="Method")
        with gr.Row():
            self.frames = gr.Number(8, label="Frames", precision=0, minimum=1, min_width=70)
            self.steps = _own(steps, "Steps", precision=0, minimum=1)
            self.guidance = _own(guidance, "Guidance (CFG)", step=0.5)
        with gr.Accordion("More; what is empty is the model family's own", open=False):
            self.mode = gr.Radio(["refine", "replace"], value="refine", label="How the prompts are matched (fatezero)")
            with gr.Row():
                self.cross_replace = _own(None, "cross_replace (fatezero)", **_SHARE)
                self.self_replace = _own(None, "self_replace (fatezero)", **_SHARE)
                self.share = _own(None, "Share of the steps (flowedit, inject)", **_SHARE)
            words = "words of the source, such as circle"
            self.blend = gr.Textbox("", label="Keep the source outside of (fatezero)", placeholder=words)
            self.mask = gr.File(label="Mask: what is white may change (fatezero)", file_types=["image"], height=100)
            self.size = _own(size, "Shorter side, pixels", precision=0, minimum=8)
        self.go = gr.Button("Edit", variant="primary", elem_id="edit-go")
        self.model.change(
            _usual, [self.model], [self.steps, self.guidance, self.size], queue=False, api_visibility="private"
        )
        sample = video_actions.sample_clip(folder)
        if sample is not None:
            places = [self.clip, self.source, self.target]
            gr.Examples([[[sample], *_WORDS]], places, label="Click an example", elem_id="edit-examples")

    @property
    def all(self) -> list[Any]:
        """List the components, in the order of the arguments of `_edit`."""
        request = [self.model, self.clip, self.source, self.target, self.method, self.frames, self.steps, self.guidance]
        more = [self.mode, self.cross_replace, self.self_replace, self.share, self.blend, self.mask, self.size]
        return [*request, *more]


def _own(value: float | None, label: str, **more: Any) -> Any:
    return gr.Number(value, label=label, min_width=70, placeholder="own", **more)


def _edit_tab(models: Models, folder: Path) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            inputs = _EditInputs(models, folder)
        with gr.Column(scale=6, min_width=400):
            with gr.Row():
                before, after = _player("Before", "edit-before"), _player("After", "edit-after")
            strip = picture("Before and after", "edit-strip")
            files = gr.File(label="The edit and its record", interactive=False, visible=False)
            report, command = accounts()
    shown = [before, after, strip, files, report, command]
    event = inputs.go.click(
        _edit(models, folder),
        inputs.all,
        shown,
        api_name="edit",
        show_progress_on=[before, after],
        **_ALONE,
    )
    afterwards(event, shown, "edit-strip")


def _edit(models: Models, folder: Path) -> Callable[..., Any]:
    """Return what the button "Edit" does."""

    @said
    def edit(
        model: str,
        video: list[str] | None,
        source: str,
        target: str,
        method: str,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        mode: str = "refine",
        cross_replace: float | None = None,
        self_replace: float | None = None,
        share: float | None = None,
        blend: str = "",
        mask: str | None = None,
        size: int | None = None,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        """Edit a clip or a picture with a prompt: before and after as MP4, the strip, files, report, command."""
        request = EditAsk(
            model=model,
            files=video,
            source=source,
            target=target,
            method=method,
            frames=frames,
            steps=steps,
            guidance=guidance,
            mode=mode,
            cross_replace=cross_replace,
            self_replace=self_replace,
            share=share,
            blend=blend,
            mask=mask,
            size=size,
        )
        done = video_actions.edit(models, request, folder, following(progress, request.ticks(models)))
        shown = gr.update(value=list(done.files), visible=bool(done.files))
        return done.before, done.after, done.strip, shown, done.report, done.command

    return edit


def _player(label: str, name: str) -> Any:
    return gr.Video(label=label, interactive=False, autoplay=True, loop=True, buttons=["download"], elem_id=name)
