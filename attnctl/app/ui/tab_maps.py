"""The tabs "Words" and "Heads": where a picture attends to words of its prompt, together and head by head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from attnctl.app.ui import actions
from attnctl.app.ui.inputs import Fields, afterwards, ask, picture, prompts_for, said, ticks, word_choices
from attnctl.app.ui.knobs import selector
from attnctl.app.ui.models import Models

__all__ = ["heads_tab", "words_tab"]

_NOUNS = ("circle", "square", "cat", "dog")


def words_tab(models: Models, folder: Path) -> None:
    """Lay out the tab "Words"."""
    prompts = prompts_for(models.images[0])
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            fields = Fields(models.images, prompts[0])
            choices, nouns = word_choices(prompts[0], _NOUNS)
            chosen = gr.CheckboxGroup(choices, value=nouns, label="Words (none: all)")
            go = gr.Button("Show words", variant="primary", elem_id="words-go")
            gr.Examples([[p] for p in prompts], [fields.prompt], label="Click an example")
        with gr.Column(scale=6, min_width=400):
            over, steps = picture("Words over the picture", "words-over"), picture("Step by step", "words-steps")

    @said
    def words(
        model: str,
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        words: list[str],
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> tuple[str, ...]:
        """Make a picture and show where it attends to words: paths of two PNGs."""
        request = ask(model, prompt, seed, steps, guidance)
        sheets = actions.words(models, request, words, ticks(progress, models, request))
        return tuple(actions.keep_bytes(folder, f"{name}.png", sheet) for name, sheet in sheets.items())

    event = go.click(words, [*fields.all, chosen], [over, steps], api_name="words", **_ALONE)
    afterwards(event, [over, steps], "words-over")

    def read(prompt: str, before: list[str]) -> Any:
        choices, ticked = word_choices(prompt, before)
        return gr.update(choices=choices, value=ticked)

    _on_prompt(fields, read, chosen)
    _on_model(fields)


def heads_tab(models: Models, folder: Path) -> None:
    """Lay out the tab "Heads"."""
    prompts = prompts_for(models.images[0])
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            fields = Fields(models.images, prompts[0])
            choices, nouns = word_choices(prompts[0], _NOUNS)
            with gr.Row():
                word = gr.Dropdown(choices, value=nouns[0], label="Word", min_width=100)
                sites = gr.Textbox("", label="Layers", placeholder="blank: all; or mid, up.1, 3", min_width=100)
            go = gr.Button("Show heads", variant="primary", elem_id="heads-go")
            gr.Examples([[p] for p in prompts], [fields.prompt], label="Click an example")
        with gr.Column(scale=6, min_width=400):
            grid = picture("One row a layer, one column a head", "heads-grid")

    @said
    def heads(
        model: str,
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        word: str,
        layers: str,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> str:
        """Make a picture and show where each head looks for a word: the path of a PNG."""
        request = ask(model, prompt, seed, steps, guidance)
        sheet = actions.heads(models, request, word, selector(layers), ticks(progress, models, request))["heads"]
        return actions.keep_bytes(folder, "heads.png", sheet)

    event = go.click(heads, [*fields.all, word, sites], grid, api_name="heads", **_ALONE)
    afterwards(event, [grid], "heads-grid")

    def read(prompt: str, before: str) -> Any:
        choices, ticked = word_choices(prompt, [before] if before else [])
        return gr.update(choices=choices, value=ticked[0] if ticked else choices[-1] if choices else None)

    _on_prompt(fields, read, word)
    _on_model(fields)


_ALONE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
_QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def _on_prompt(fields: Fields, read: Any, words: Any) -> None:
    """Let the words follow the prompt."""
    fields.prompt.change(read, [fields.prompt, words], words, trigger_mode="always_last", **_QUIET)


def _on_model(fields: Fields) -> None:
    fields.model.input(fields.settings, fields.model, [fields.steps, fields.guidance], **_QUIET)
