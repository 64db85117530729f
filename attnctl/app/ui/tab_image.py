"""The tab "Image": one prompt plain and under chosen methods, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from attnctl.app.ui.knobs import Knob, about, control_of, knobs_of, preset
from attnctl.app.ui.models import Models, offered

__all__ = ["image_tab"]

_CHOSEN = {"shapes:text2image": ["AttendExcite"], "shapes:mmdit": ["SoftPAG"]}  # those that the docs found to help most
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
        [*inputs.fields.all, inputs.chosen, inputs.negative, inputs.more],
        shown,
        inputs_kwargs={knob.name: part for knob, part in inputs.knobs.items()},
        api_name="image",
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[plain, controlled],
    )
    afterwards(event, shown, "image-plain")
    _follow(models, inputs)


class _Inputs:
    """Hold the left side of the tab: a request, methods with their knobs, and the button."""

    def __init__(self, models: Models) -> None:
        first = models.images[0]
        self.fields = Fields(models.images, prompts_for(first)[0], seed=_SEEDS[0])
        beginning = _beginning(models, first)
        self.chosen = gr.CheckboxGroup(
            list(models.takes(first)), value=beginning, label="Methods (several act together)"
        )
        self.go = gr.Button("Generate", variant="primary", elem_id="image-go")
        self.groups, self.knobs = _groups(offered(), beginning, first)
        with gr.Accordion("More", open=False):
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
        negative: str,
        controls: str,
        progress: Any = gr.Progress(),  # noqa: B008
        **values: Any,
    ) -> tuple[Any, ...]:
        """Make a picture plain and under control: paths of both PNGs, the judge's table, the report, the commands."""
        request = ask(model, prompt, seed, steps, guidance, negative)
        acting = [control_of(name, _fields(name, values), model, prompt) for name in methods]
        acting += written(controls)
        done = actions.compare(models, request, acting, ticks(progress, models, request, 2 if acting else 1))
        return (*_shown(done, folder, prompt), table(*actions.image_marks(done, prompt)), done.report, done.commands)

    return image


def _follow(models: Models, inputs: _Inputs) -> None:
    """Let the knobs follow the chosen methods, and methods and settings follow the model."""
    groups, knobs, fields = inputs.groups, inputs.knobs, inputs.fields

    def show(methods: list[str]) -> list[Any]:
        return [gr.update(visible=name in methods) for name in groups]

    inputs.chosen.change(
        show, inputs.chosen, list(groups.values()), queue=False, show_progress="hidden", api_visibility="private"
    )

    @said
    def turn(model: str) -> list[Any]:
        many, guidance = fields.settings(model)
        offer = gr.update(choices=list(models.takes(model)), value=_beginning(models, model))
        return [offer, many, guidance, *(_stand(knob, model) for knob in knobs)]

    fields.model.input(
        turn,
        fields.model,
        [inputs.chosen, fields.steps, fields.guidance, *knobs.values()],
        api_visibility="private",
        show_progress="hidden",
    )


def _beginning(models: Models, model: str) -> list[str]:
    takes = models.takes(model)
    return [name for name in _CHOSEN.get(model, ["PAG"]) if name in takes]


def _shown(done: actions.Compared, folder: Path, prompt: str) -> list[str | None]:
    paths = [actions.keep(folder, f"{name} {prompt}", run) for name, run, _ in done.runs]
    return [*paths, *[None] * (2 - len(paths))]


def _fields(method: str, values: dict[str, Any]) -> dict[str, Any]:
    return {knob.field: values[knob.name] for knob in knobs_of(method) if knob.name in values}


def _groups(methods: Sequence[str], chosen: list[str], model: str) -> tuple[dict[str, Any], dict[Knob, Any]]:
    """Make a group of knobs for each method, seen while the method is chosen."""
    groups: dict[str, Any] = {}
    knobs: dict[Knob, Any] = {}
    for method in methods:
        with gr.Group(visible=method in chosen) as group:
            gr.Markdown(f"**{method}** {about(method)}", elem_classes=["about"])
            with gr.Row():
                for knob in knobs_of(method):
                    knobs[knob] = _part(knob, _stand(knob, model))
        groups[method] = group
    return groups, knobs


def _stand(knob: Knob, model: str) -> Any:
    """Say where a knob stands at first: at the setting for the model."""
    value = preset(model, knob.method).get(knob.field, knob.default)
    return "" if knob.field == "concepts" else str(value) if knob.kind == "text" else value


def _part(knob: Knob, value: Any) -> Any:
    options: dict[str, Any] = {"label": knob.field, "min_width": 160}
    if knob.kind == "slider":
        low, high, step = knob.span
        return gr.Slider(low, high, value=value, step=step, **options)
    if knob.kind == "choice":
        return gr.Dropdown(list(knob.choices), value=value, **options)
    if knob.kind == "switch":
        return gr.Checkbox(value, **options)
    if knob.kind == "number":
        return gr.Number(value, **options)
    return gr.Textbox(value, placeholder=knob.hint, lines=1, max_lines=1, **options)
