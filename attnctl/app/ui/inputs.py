"""What all tabs share: the fields of a request, how progress and errors are shown, tables."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from attnctl.app.commands.common import UsageError
from attnctl.app.ui.actions import Ask, Step
from attnctl.app.ui.models import Models
from attnctl.core.hosts.words import prompt_words
from attnctl.data.specs import parse_control
from attnctl.errors import AttnctlError
from attnctl.pipelines.models import SHIPPED
from attnctl.plans.reading import sealed

__all__ = [
    "Fields",
    "accounts",
    "afterwards",
    "ask",
    "following",
    "further_controls",
    "picture",
    "prompts_for",
    "said",
    "stop",
    "table",
    "ticks",
    "word_choices",
    "written",
]

_SHAPES = (20, 3.0)  # steps and guidance of the shipped models
_SHAPES_VIDEO = {  # fewer steps than on its card: a video and its twin in some fifteen seconds
    f"{SHIPPED}video": (10, 2.0),
    f"{SHIPPED}videodit": (20, 2.0),
}
_PROMPTS = (
    "a red circle and a blue square on gray",
    "a green ring and a white cross on black",
    "a yellow triangle and a purple circle on brown",
)
_ELSEWHERE = ("a photo of a cat and a dog", "an astronaut riding a horse")


class Fields:
    """Hold the fields of a request: model, prompt, seed, steps, guidance.

    Args:
        models: Names of the models to choose from; the first is chosen.
        prompt: The prompt to begin with.
    """

    def __init__(self, models: Sequence[str], prompt: str, *, seed: int = 0) -> None:
        many, guidance = self.settings(models[0])
        self.model = gr.Dropdown(list(models), value=models[0], label="Model", visible=len(models) > 1)
        self.prompt = gr.Textbox(prompt, label="Prompt", lines=2, max_lines=4)
        with gr.Row():
            self.seed = gr.Number(seed, label="Seed", precision=0, min_width=70)
            self.steps = gr.Number(many, label="Steps", precision=0, min_width=70)
            self.guidance = gr.Number(guidance, label="Guidance", step=0.5, min_width=70)

    @property
    def all(self) -> list[Any]:
        """List the components, in the order of `ask`."""
        return [self.model, self.prompt, self.seed, self.steps, self.guidance]

    def settings(self, model: str) -> tuple[int | None, float | None]:
        """Return steps and guidance to begin with; None is the pipeline's own."""
        return _SHAPES_VIDEO.get(model, _SHAPES) if model.startswith(SHIPPED) else (None, None)


def prompts_for(model: str) -> tuple[str, ...]:
    """Return prompts to begin with."""
    return _PROMPTS if model.startswith(SHIPPED) else _ELSEWHERE


def ask(
    model: str,
    prompt: str,
    seed: float | None,
    steps: float | None,
    guidance: float | None,
    negative: str | None = None,
) -> Ask:
    """Read the fields."""
    return Ask(
        model=model,
        prompt=prompt or "",
        seed=0 if seed is None else int(seed),
        steps=None if steps is None else int(steps),
        guidance=None if guidance is None else float(guidance),
        negative=negative or "",
    )


def written(text: str | None) -> list[Any]:
    """Read controls in their short form, one per line; names of files and Hub ids in them are refused."""
    with sealed("The page reads no files and fetches nothing that a control names as text."):
        return [parse_control(line) for line in (text or "").splitlines() if line.strip()]


def ticks(progress: Any, models: Models, request: Ask, runs: int = 1) -> Step:
    """Return what moves the page's bar by one step of so many runs."""
    import inspect

    steps = request.steps
    if steps is None:
        call = inspect.signature(type(models.get(request.model).pipe).__call__).parameters
        steps = call["num_inference_steps"].default
    return following(progress, runs * steps if isinstance(steps, int) else None)


class Halt(UsageError):
    """The user of a window has ended its work."""


def following(progress: Any, total: int | None) -> Step:
    """Return what moves the page's bar by one of `total` steps, and ends the work where its window was told to stop."""
    done, window = 0, _window()
    _STOPPED.discard(window)

    def step() -> None:
        nonlocal done
        done += 1
        if window in _STOPPED:
            _STOPPED.discard(window)
            raise Halt("Stopped. Nothing was written.")
        progress((min(done, total or done), total), desc="computing", unit="steps")

    progress((0, total), desc="computing", unit="steps")
    return step


# Windows of the page whose work shall end at its next step. A window is what gradio calls a session.
_STOPPED: set[str | None] = set()


def _window() -> str | None:
    from gradio.context import LocalContext

    request = LocalContext.request.get(None)
    return getattr(request, "session_hash", None)


def stop(request: gr.Request) -> None:
    """End the work of a window at its next step: of the button "Stop", and when a window is closed."""
    _STOPPED.add(request.session_hash)


def said(action: Callable[..., Any]) -> Callable[..., Any]:
    """Show errors as messages in the page: what attnctl raises in its own words, never a stack trace."""

    @functools.wraps(action)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except Halt as halt:  # told as asked for; the hidden error ends what waits for a result
            gr.Info(str(halt), title="Stopped")
            raise gr.Error(str(halt), visible=False, print_exception=False) from None
        except AttnctlError as error:
            raise gr.Error(" ".join(str(error).split()), title="That cannot be", print_exception=False) from None
        except Exception as error:
            traceback.print_exc(file=sys.stderr)  # for the terminal of whoever started the page
            message = f"Unexpected {type(error).__name__}: {' '.join(str(error).split())}"
            raise gr.Error(message, title="attnctl failed", print_exception=False) from None

    return run


def afterwards(event: Any, outputs: Sequence[Any], place: str) -> None:
    """Clear what a tab shows where its work fails, so that no result of an earlier request stands beside the error.

    On a narrow screen, where results stand below the button, they come into view when the work begins (the page's own
    script) and again when it is over, since other results may have moved them.

    Args:
        event: What the button began.
        outputs: What the tab shows.
        place: The name of the first result.
    """
    event.failure(
        lambda: [None] * len(outputs) if len(outputs) > 1 else None,
        None,
        list(outputs),
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    script = f"() => {{ if (innerWidth < 800) document.getElementById('{place}')?.scrollIntoView() }}"
    event.then(None, js=script, queue=False, show_progress="hidden", api_visibility="private")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def picture(label: str, name: str, *, height: int | None = None, pixels: bool = False) -> Any:
    """Make a place for a picture; its file is handed on as it is, so that it keeps its record.

    Args:
        label: What stands in its corner, and what a screen reader says.
        name: Its name in the page.
        height: Pixels that it is enlarged to; None for sheets, which are as high as they are, below their label.
        pixels: Enlarge small pictures without smoothing.
    """
    return gr.Image(
        label=label,
        alt_text=label,
        type="filepath",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
        height=height,
        elem_classes=["fill" if height else "sheet", *(["pixels"] if pixels else [])],
    )


def further_controls(example: str) -> Any:
    """Make the field for controls in their short form."""
    label = "Further controls, one a line, as --control takes them"
    return gr.Textbox("", label=label, placeholder=example, lines=2)


def accounts() -> tuple[Any, Any]:
    """Make two folded places: for the report of what acted where, and for the command that makes the same."""
    with gr.Accordion("Report: what acted where", open=False):
        report = gr.Textbox(show_label=False, lines=6, max_lines=20, elem_classes=["mono"])
    with gr.Accordion("The same from the command line", open=False):
        command = gr.Code(language="shell", show_label=False, interactive=False)
    return report, command


def word_choices(prompt: str, chosen: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """List the words of a prompt, and those of `chosen` that are among them; its last words if none is."""
    words = list(prompt_words(prompt))
    return words, [word for word in chosen if word in words]
