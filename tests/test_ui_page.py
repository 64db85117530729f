"""The page of `attnctl ui` through gradio's client, and a browser that clicks."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import network
import pytest
import torch

from attnctl.app.ui import video_actions
from attnctl.app.ui.models import Models
from attnctl.data.record import read
from attnctl.shapes.load import WEIGHTS

PROMPT = "a red circle and a blue square on gray"

CLIP = "a red circle moving right fast on gray"


@pytest.fixture(scope="module")
def models() -> Models:
    torch.set_num_threads(1)
    return Models()


# The page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(models: Models) -> Iterator[str]:
    """Serve the page."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from attnctl.app.ui.serve import serving

    before = os.environ.get("GRADIO_TEMP_DIR")
    with network.guarded() as heard, serving(models) as url:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir()
        yield url
    assert not heard
    assert not folder.exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == before


@pytest.fixture(scope="module")
def client(page: str) -> Any:
    return pytest.importorskip("gradio_client").Client(page, verbose=False)


def fetched(url: str) -> tuple[str, Any]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode(), answer.headers


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    html, headers = fetched(page)
    assert not re.findall(r"""(?:src|href)=["']https?://""", html)
    assert "googleapis" not in html + fetched(f"{page}theme.css")[0]
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert page.startswith("http://127.0.0.1:")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_every_button_has_a_name_for_programs(page: str) -> None:
    config = json.loads(fetched(f"{page}config")[0])
    buttons = {part["id"] for part in config["components"] if part["type"] == "button"}
    named = {t[0]: d["api_name"] for d in config["dependencies"] for t in d["targets"] if t[0] in buttons}
    assert set(named) == buttons
    assert sorted(named.values()) == ["edit", "heads", "image", "regions", "stop", "video", "words"]


def test_the_page_names_its_models_and_begins_a_video_as_its_card_says(page: str) -> None:
    config = json.loads(fetched(f"{page}config")[0])
    parts = {part["id"]: part["props"] for part in config["components"]}
    head = next(props["value"] for props in parts.values() if props.get("elem_id") == "head")
    assert "`shapes:text2image`" in head
    assert "`shapes:video`" in head
    assert "`shapes:videodit`" in head
    (video,) = (d for d in config["dependencies"] if d["api_name"] == "video")
    begins = {parts[i]["label"]: parts[i]["value"] for i in video["inputs"] if "label" in parts[i]}
    card = json.loads((WEIGHTS / "video" / "evaluation.json").read_text(encoding="utf-8"))
    assert begins["Steps"] == 10
    assert begins["Guidance"] == card["scale"]


def test_work_is_stopped_at_its_next_step(client: Any) -> None:
    job = client.submit(prompt=PROMPT, steps=400, methods=[], api_name="/image")
    while job.status().code.name in ("STARTING", "JOINING_QUEUE", "IN_QUEUE", "SENDING_DATA"):
        time.sleep(0.05)
    time.sleep(0.5)
    client.predict(api_name="/stop")
    with pytest.raises(Exception, match="Stopped"):
        job.result(timeout=20)


def test_image_by_a_program(client: Any, page: str) -> None:
    plain, controlled, marks, report, command = client.predict(
        prompt=PROMPT, steps=2, methods=["PAG", "AttendExcite"], PAG_scale=1.5, api_name="/image"
    )
    assert "| plain | " in marks
    assert "PAG(sites='up.0', scale=1.5)" in report
    assert "--control 'PAG(sites=\"up.0\", scale=1.5)'" in command
    records = [read(path)[0] for path in (plain, controlled)]
    assert [len(record.controls) for record in records] == [0, 2]


def test_regions_by_a_program(client: Any) -> None:
    plain, controlled, marks, report, command = client.predict(
        prompt=PROMPT, steps=2, prompt_2="", prompt_4="a green ring", box_4="0.5 0 1 0.5", api_name="/regions"
    )
    assert "| controlled | " in marks
    form = "Regions(prompts=('a red circle', 'a green ring'), areas=((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)))"
    assert form in report
    assert form.replace("'", '"') in command
    assert read(plain)[0].sha256 != read(controlled)[0].sha256
    with pytest.raises(Exception, match="no box"):
        client.predict(prompt=PROMPT, steps=2, prompt_3="a cross", api_name="/regions")


def test_words_and_heads_by_a_program(client: Any) -> None:
    for path in client.predict(prompt=PROMPT, steps=1, words=["square"], api_name="/words"):
        assert read(path)[0].prompts == (PROMPT,)
    assert read(client.predict(prompt=PROMPT, steps=1, word="square", layers="mid", api_name="/heads"))


def test_videos_by_a_program(client: Any, tmp_path: Path) -> None:
    pytest.importorskip("av")
    handle_file = pytest.importorskip("gradio_client").handle_file
    made = client.predict(prompt=CLIP, steps=1, api_name="/video")
    assert "motion, px a frame" in made[3]
    assert len(read(made[2])) == 2
    assert sorted(Path(f).suffix for f in made[4]["value"]) == [".mp4", ".mp4", ".png", ".png"]
    clip = handle_file(video_actions.sample_clip(tmp_path))
    edited = client.predict(video=[clip], frames=2, steps=1, api_name="/edit")
    assert "attnctl edit" in edited[-1]


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("/image", {"prompt": " "}, "prompt is empty"),
        ("/image", {"steps": 1, "controls": "PAG(scal=1)"}, "PAG has no field 'scal'"),
        ("/image", {"steps": 1, "methods": ["PAG"], "PAG_sites": "down.9"}, "down.9"),
        ("/image", {"prompt": "a cat"}, "Name the concepts"),
        ("/words", {"prompt": "a cat", "steps": 1, "words": ["dog"]}, "dog"),
        ("/edit", {"video": None}, "no video"),
    ],
)
def test_errors_are_said_in_words(client: Any, name: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=re.escape(said)) as error:
        client.predict(**values, api_name=name)
    assert "Traceback" not in str(error.value)


# A browser -------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser() -> Iterator[Any]:
    """Start a headless Chromium of the system."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if path is None:
        pytest.skip("there is no Chromium here")
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield chromium
        finally:
            chromium.close()


def test_a_browser_clicks_and_looks(browser: Any, page: str) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(60_000)
    outside: list[str] = []
    tab.on("request", lambda r: outside.append(r.url) if not r.url.startswith((page, "data:", "blob:")) else None)
    failed: list[str] = []
    tab.on("pageerror", lambda error: failed.append(str(error)))
    tab.goto(page)
    tab.get_by_label("Steps").first.fill("2")
    tab.click("#image-go")
    tab.wait_for_selector("#image-marks table")
    tab.wait_for_selector("#image-controlled img")
    tab.wait_for_function("[...document.querySelectorAll('.fill img')].every(i => i.naturalWidth)")  # they load later
    sizes = tab.evaluate("[...document.querySelectorAll('.fill img')].map(i => [i.naturalWidth, i.clientWidth])")
    assert [natural for natural, _ in sizes] == [64, 64]
    assert all(shown > 200 for _, shown in sizes)  # enlarged, not a stamp
    assert tab.locator("#image-marks").inner_text().count("circle") >= 1

    tab.get_by_label("PAG", exact=True).first.check()
    tab.wait_for_selector("text=Guide away from the prediction whose self-attention maps are the identity")
    tab.get_by_label("Prompt").first.fill(" ")
    tab.click("#image-go")
    tab.wait_for_selector("text=The prompt is empty")
    assert "Traceback" not in tab.content()

    tab.get_by_label("Model").first.click()
    tab.get_by_role("option", name="shapes:mmdit").click()
    tab.wait_for_selector("text=Guide away from the prediction whose attention maps lean towards a target")
    # It needs self-attention of image tokens alone, which this model has not.
    assert not tab.get_by_label("AgentAttention", exact=True).count()

    assert [image.get_attribute("alt") for image in tab.locator("#image-controlled img").all()] in ([], ["Controlled"])
    tab.get_by_role("tab", name="Words").click()
    tab.get_by_label("Steps").nth(1).fill("1")
    tab.click("#words-go")
    tab.wait_for_selector("#words-steps img")
    assert not outside
    assert not failed


def test_a_closed_window_leaves_no_work_behind(browser: Any, page: str, models: Models) -> None:
    steps: list[float] = []
    unet = models.get("shapes:text2image").pipe.unet
    hook = unet.register_forward_pre_hook(lambda *_: steps.append(time.monotonic()))
    try:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(60_000)
        tab.goto(page)
        tab.get_by_label("Steps").first.fill("1000")
        tab.click("#image-go")
        begun = time.monotonic()
        while not steps:
            assert time.monotonic() - begun < 60, "the run did not begin"
            tab.wait_for_timeout(50)
        tab.close()
        closed = time.monotonic()
        while time.monotonic() - steps[-1] < 10 and time.monotonic() - closed < 60:
            time.sleep(0.1)
    finally:
        hook.remove()
    assert steps[-1] - closed < 10


def test_on_a_phone_results_come_into_view_and_work_can_be_stopped(browser: Any, page: str) -> None:
    phone = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    tab = phone.new_page()
    tab.set_default_timeout(60_000)
    tab.goto(page)
    tab.get_by_label("Steps").first.fill("1000")
    tab.tap("#image-go")
    tab.wait_for_selector("#image-plain >> text=computing")
    tab.wait_for_function("document.getElementById('image-plain').getBoundingClientRect().top < innerHeight / 2")
    tab.tap("#stop")  # it stays in reach
    tab.wait_for_selector(".toast-body.info >> text=Stopped. Nothing was written.")  # as asked for: no error
    assert not tab.locator(".toast-body.error").count()
    tab.get_by_label("Steps").first.fill("1")
    tab.tap("#image-go")
    tab.wait_for_selector("#image-marks table")
    tab.wait_for_function("document.getElementById('image-plain').getBoundingClientRect().top < innerHeight / 2")
    assert tab.evaluate("innerWidth") == 390  # nothing is wider than the screen
    assert tab.evaluate("document.querySelector('#image-marks table').getBoundingClientRect().right") <= 390
    phone.close()


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_tab_is_wider_than_its_screen(browser: Any, page: str, width: int) -> None:
    screen = browser.new_context(viewport={"width": width, "height": 844}, is_mobile=width < 400, has_touch=width < 400)
    tab = screen.new_page()
    tab.set_default_timeout(60_000)
    tab.goto(page)
    tab.wait_for_selector("#image-go")
    for labels in (("Image",), ("Regions",), ("Words",), ("Heads",), ("Video", "Generate"), ("Video", "Edit")):
        for label in labels:
            tab.get_by_role("tab", name=label, exact=True).click()
        tab.wait_for_timeout(500)
        assert tab.evaluate("document.documentElement.scrollWidth") == width, labels
    screen.close()
