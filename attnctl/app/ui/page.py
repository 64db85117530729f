"""The page: its tabs and how it looks. Nothing in it comes from another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from attnctl.app.ui.inputs import stop
from attnctl.app.ui.models import Models
from attnctl.app.ui.tab_image import image_tab
from attnctl.app.ui.tab_maps import heads_tab, words_tab
from attnctl.app.ui.tab_regions import regions_tab
from attnctl.app.ui.tab_video import video_tab

__all__ = ["CSS", "SCRIPT", "build", "theme"]

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.fill button, .fill .image-frame, .fill img { width: 100% !important; height: 100% !important; object-fit: contain; }
.pixels img { image-rendering: pixelated; }
.sheet .image-container { padding-top: 30px; }
.sheet img { width: 100%; }
.mono textarea { font-family: monospace; font-size: 12px; white-space: pre; overflow-x: auto; }
.about { padding: 8px 12px 4px !important; font-size: 13px; background: var(--block-background-fill) !important; }
.marks table { width: 100%; font-size: 13px; }
.marks th, .marks td { border-color: var(--border-color-primary) !important; padding: 4px 8px !important; }
.marks th, .marks td:first-child { white-space: nowrap; }
#edit-examples th, #edit-examples td { white-space: normal !important; }
#head p { margin: 0; }
:is(button, input, textarea, select, a, [tabindex="0"]):focus-visible {
  outline: 2px solid var(--body-text-color) !important; outline-offset: -2px;
}
#stop { align-self: flex-start; height: auto; }
@media (max-width: 799px) {
  #stop { position: fixed; right: 12px; bottom: 12px; z-index: 50; box-shadow: 0 1px 6px rgba(0, 0, 0, 0.4); }
  .gradio-container { padding-bottom: 56px; max-width: 100vw !important; }
  .tab-container button { padding: 0 10px; }
  .marks table { display: table; font-size: 12px; table-layout: auto; }
  .marks th, .marks td, .marks td:first-child { padding: 4px !important; white-space: normal; }
}
"""

# On a narrow screen results stand below what is filled in: they come into view as soon as a tab's button is pressed.
SCRIPT = """() => document.addEventListener('click', event => {
  const results = event.target.closest('button.primary')?.closest('.row')?.lastElementChild
  if (results && innerWidth < 800) results.scrollIntoView({ behavior: 'smooth' })
})"""


def theme() -> Any:
    """Return a theme whose letters are those of the reader's own system."""
    return gr.themes.Default(
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        spacing_size="sm",
        text_size="md",
    )


def build(models: Models, folder: Path) -> Any:
    """Lay out the page.

    Args:
        models: What it can run.
        folder: Where it may write.
    """
    with gr.Blocks(title="attnctl", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        pictures, videos = (" or ".join(f"`{name}`" for name in names) for names in (models.images, models.videos))
        ready = f"Pictures by {pictures}, videos by {videos}"
        with gr.Row(equal_height=False):
            gr.Markdown(f"### attnctl\nAttention control, side by side. {ready}.", elem_id="head")
            halt = gr.Button("Stop", size="sm", scale=0, min_width=80, elem_id="stop")
        halt.click(stop, None, None, queue=False, show_progress="hidden", api_name="stop")
        page.unload(stop)  # a window that is closed leaves no work behind
        with gr.Tab("Image", id="image"):
            image_tab(models, folder)
        with gr.Tab("Regions", id="regions"):
            regions_tab(models, folder)
        with gr.Tab("Words", id="words"):
            words_tab(models, folder)
        with gr.Tab("Heads", id="heads"):
            heads_tab(models, folder)
        with gr.Tab("Video", id="video"):
            video_tab(models, folder)
    return page
