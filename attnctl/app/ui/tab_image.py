"""The tab "Image": one prompt plain and under chosen methods, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from attnctl.app.ui import actions
from attnctl.app.ui.inputs import Fields, ask, picture, prompts_for, said, table, ticks, written
from attnctl.app.ui.knobs import Knob, about, control_of, knobs_of, preset
from attnctl.app.ui.models import ELSEWHERE, Models
from attnctl.data.specs import methods

__all__ = ["image_tab"]

_CHOSEN = {"shapes:text2image": ["AttendExcite"], "shapes:mmdit": ["SoftPAG"]}  # those that the docs found to help most
_SEEDS = (2, 0, 0)  # the first is one where the plain picture fails: what a method does is seen


def image_tab(models: Models, folder: Path) -> None:
    """Lay out the tab."""
    first = models.images[0]
    offered = [method for method in methods() if method not in ELSEWHERE]
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            fields = Fields(models.images, prompts_for(first)[0], seed=_SEEDS[0])
            chosen = gr.CheckboxGroup(
                list(models.takes(first)), value=_beginning(models, first), label="Methods (several act together)"
            )
            go = gr.Button("Generate", variant="primary", elem_id="image-go")
            groups, knobs = _groups(offered, chosen.value, first)
            with gr.Accordion("More", open=False):
                negative = gr.Textbox("", label="Negative prompt", lines=1)
                more = gr.Textbox(
                    "",
                    label="Further controls, one a line, as --control takes them",
                    placeholder='PAG(scale=2.0, sites="mid", every=2)',
                    lines=2,
                )
            gr.Examples(
                [[p, s] for p, s in zip(prompts_for(first), _SEEDS, strict=False)],
                [fields.prompt, fields.seed],
                label="Click an example",
            )
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
            with gr.Accordion("Report: what acted where", open=False):
                report = gr.Textbox(show_label=False, lines=6, max_lines=20, elem_classes=["mono"])
            with gr.Accordion("The same from the command line", open=False):
                command = gr.Code(language="shell", show_label=False, interactive=False)

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
        asked = ask(model, prompt, seed, steps, guidance, negative)
        acting = [control_of(name, _fields(name, values), model, prompt) for name in methods]
        acting += written(controls)
        done = actions.compare(models, asked, acting, ticks(progress, models, asked, 2 if acting else 1))
        return (*_shown(done, folder, prompt), table(*actions.image_marks(done, prompt)), done.report, done.commands)

    go.click(
        image,
        [*fields.all, chosen, negative, more],
        [plain, controlled, marks, report, command],
        inputs_kwargs={knob.name: part for knob, part in knobs.items()},
        api_name="image",
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=[plain, controlled],
    )

    def show(methods: list[str]) -> list[Any]:
        return [gr.update(visible=name in methods) for name in groups]

    chosen.change(show, chosen, list(groups.values()), queue=False, show_progress="hidden", api_visibility="private")

    @said
    def turn(model: str) -> list[Any]:
        many, guidance = fields.settings(model)
        offer = gr.update(choices=list(models.takes(model)), value=_beginning(models, model))
        return [offer, many, guidance, *(_stand(knob, model) for knob in knobs)]

    fields.model.input(
        turn,
        fields.model,
        [chosen, fields.steps, fields.guidance, *knobs.values()],
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


def _groups(offered: list[str], chosen: list[str], model: str) -> tuple[dict[str, Any], dict[Knob, Any]]:
    """Make a group of knobs for each method, seen while the method is chosen."""
    groups: dict[str, Any] = {}
    knobs: dict[Knob, Any] = {}
    for method in offered:
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
