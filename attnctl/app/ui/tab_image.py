"""The tab "Image": one prompt plain and under chosen methods, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from attnctl.app.ui import actions
from attnctl.app.ui.inputs import (
    Fields,
    accounts,
    afterwards,
    ask,
    further_controls,
    picture,
    prompts_for,
    said,
    table,
    ticks,
    written,
)
from attnctl.app.ui.methods import Methods, controls_of
from attnctl.app.ui.models import Models

__all__ = ["image_tab"]

_SEEDS = (2, 0, 0)  # the first is one where the plain picture fails: what a method does is seen


def image_tab(models: Models, folder: Path) -> None:
    """Lay out the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            inputs = _Inputs(models)
        with gr.Column(scale=6, min_width=400):
            with gr.Row():
                plain, controlled = (
                    picture(label, f"image-{label.lower()}", height=330, pixels=models.given is None)
                    for label in ("Plain", "Controlled")
                )
            marks = gr.Markdown(
                "Press *Generate*: the same noise becomes a picture twice.",
                elem_id="image-marks",
                elem_classes=["marks"],
            )
            report, command = accounts()
    shown = [plain, controlled, marks, report, command]
    event = inputs.go.click(
        _make(models, folder),
        [*inputs.fields.all, *inputs.methods.all, inputs.negative, inputs.more],
        shown,
        inputs_kwargs=inputs.methods.named,
        api_name="image",
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[plain, controlled],
    )
    afterwards(event, shown, "image-plain")
    inputs.methods.follow(inputs.fields)


class _Inputs:
    """Hold the left side of the tab: a request, methods with their knobs, and the button."""

    def __init__(self, models: Models) -> None:
        first = models.images[0]
        self.fields = Fields(models.images, prompts_for(first)[0], seed=_SEEDS[0])
        self.methods = Methods(models, first)
        self.go = gr.Button("Generate", variant="primary", elem_id="image-go")
        self.methods.lay_out_knobs()
        with gr.Accordion("More", open=False):
            self.methods.lay_out_rules()
            self.negative = gr.Textbox("", label="Negative prompt", lines=1)
            self.more = further_controls('PAG(scale=2.0, sites="mid", every=2)')
        gr.Examples(
            [[p, s] for p, s in zip(prompts_for(first), _SEEDS, strict=False)],
            [self.fields.prompt, self.fields.seed],
            label="Click an example",
        )


def _make(models: Models, folder: Path) -> Callable[..., Any]:
    """Return what the button does."""

    @said
    def image(
        model: str,
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        methods: list[str],
        rule: str,
        negative: str,
        controls: str,
        progress: Any = gr.Progress(),  # noqa: B008
        **values: Any,
    ) -> tuple[Any, ...]:
        """Make a picture plain and under control: paths of both PNGs, the judge's table, the report, the commands."""
        request = ask(model, prompt, seed, steps, guidance, negative)
        acting = [*controls_of(methods, rule, values, model, prompt), *written(controls)]
        done = actions.compare(models, request, acting, ticks(progress, models, request, 2 if acting else 1))
        return (*_shown(done, folder, prompt), table(*actions.image_marks(done, prompt)), done.report, done.commands)

    return image


def _shown(done: actions.Compared, folder: Path, prompt: str) -> list[str | None]:
    paths = [actions.keep(folder, f"{name} {prompt}", run) for name, run, _ in done.runs]
    return [*paths, *[None] * (2 - len(paths))]
