"""The choice of methods that tabs share: which act, how the two predictions are put together, and their knobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from attnctl.app.ui.inputs import Fields, said
from attnctl.app.ui.knobs import Knob, about, control_of, knobs_of, preset
from attnctl.app.ui.models import Models, combiners, offered

__all__ = ["Methods", "controls_of"]

_CHOSEN = {  # those that the docs found to help most
    "shapes:text2image": ["AttendExcite"],
    "shapes:mmdit": ["SoftPAG"],
    "shapes:video": ["BroadWay"],
}
_OWN = "the pipeline's own"


class Methods:
    """Hold a choice of methods, one rule that sums up predictions, and the knobs of all; their places are given.

    Args:
        models: What the page can run.
        model: The model to begin with.
    """

    def __init__(self, models: Models, model: str) -> None:
        self._models = models
        takes, chosen = models.takes(model), self._beginning(model)
        self.chosen = gr.CheckboxGroup(
            [m for m in takes if m not in combiners()], value=chosen, label="Methods (several act together)"
        )
        self._first = model
        self._groups: dict[str, Any] = {}
        self.knobs: dict[Knob, Any] = {}

    def lay_out_knobs(self) -> None:
        """Make a group of knobs for each method, seen while it is chosen."""
        chosen = self._beginning(self._first)
        self._groups, self.knobs = _groups([m for m in offered() if m not in combiners()], chosen, self._first)

    def lay_out_rules(self) -> None:
        """Make the choice of a rule with the knobs of each."""
        takes = self._models.takes(self._first)
        self.rule = gr.Dropdown(self._rules(takes), value=_OWN, label="Sum of the predictions (CFG)")
        self._rule_groups, knobs = _groups(combiners(), (), self._first)
        self.knobs |= knobs

    @property
    def all(self) -> list[Any]:
        """List the components of a choice, in the order of `controls_of`; the knobs go by name."""
        return [self.chosen, self.rule]

    @property
    def named(self) -> dict[str, Any]:
        """Return the knobs by the names of their arguments."""
        return {knob.name: part for knob, part in self.knobs.items()}

    def follow(self, fields: Fields) -> None:
        """Let the knobs follow the choice, and methods and settings follow the model."""
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.chosen.change(
            lambda names: [gr.update(visible=name in names) for name in self._groups],
            self.chosen,
            list(self._groups.values()),
            **quiet,
        )
        self.rule.change(
            lambda rule: [gr.update(visible=name == rule) for name in self._rule_groups],
            self.rule,
            list(self._rule_groups.values()),
            **quiet,
        )

        @said
        def turn(model: str) -> list[Any]:
            takes = self._models.takes(model)
            methods = gr.update(choices=[m for m in takes if m not in combiners()], value=self._beginning(model))
            rules = gr.update(choices=self._rules(takes), value=_OWN)
            return [methods, rules, *fields.settings(model), *(_stand(knob, model) for knob in self.knobs)]

        fields.model.input(
            turn,
            fields.model,
            [*self.all, fields.steps, fields.guidance, *self.knobs.values()],
            api_visibility="private",
            show_progress="hidden",
        )

    def _beginning(self, model: str) -> list[str]:
        takes = self._models.takes(model)
        return [name for name in _CHOSEN.get(model, ["PAG"]) if name in takes]

    def _rules(self, takes: Sequence[str]) -> list[str]:
        return [_OWN, *(name for name in combiners() if name in takes)]


def controls_of(
    chosen: Sequence[str], rule: str | None, values: Mapping[str, Any], model: str, prompt: str
) -> list[Any]:
    """Make the controls of a choice."""
    names = [*chosen, *([rule] if rule and rule != _OWN else [])]
    return [control_of(name, _fields(name, values), model, prompt) for name in names]


def _fields(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {knob.field: values[knob.name] for knob in knobs_of(method) if knob.name in values}


def _groups(methods: Sequence[str], chosen: Sequence[str], model: str) -> tuple[dict[str, Any], dict[Knob, Any]]:
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
