"""How quick the page of `attnctl ui` is, and how it looks: `python benchmarks/ui.py > benchmarks/results/ui.json`.

It starts the command as a user does, opens the page in a headless Chromium that has never seen it, and clicks the
first button of every tab with the settings that the page begins with. Timed are the start of the command, the first
paint (as the browser reports it, from the request on), the time until the page can be used, and each click until its
result is shown. Then a run of 1,000 steps is begun and left: by Stop, and by closing its window; timed is how long
another window waits for a picture of one step. Requests to other machines are counted. `--shots docs/assets` keeps a
screenshot of each tab.

The table goes to stderr, the JSON to stdout. Needs gradio, playwright, and Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAINT, PICTURE, LEFT = 3.0, 15.0, 10.0  # seconds, at most
WAIT = 600_000  # milliseconds that a click may take on a busy machine
TABS = (
    # file, tabs to click in turn, example to click first, button, what shows that it is done
    ("ui-image", ("Image",), False, "#image-go", "#image-marks table"),
    ("ui-words", ("Words",), False, "#words-go", "#words-steps img"),
    ("ui-heads", ("Heads",), False, "#heads-go", "#heads-grid img"),
    ("ui-video", ("Video", "Generate"), False, "#video-go", "#video-marks table"),
    ("ui-edit", ("Video", "Edit"), True, "#edit-go", "#edit-strip img"),
)


@contextlib.contextmanager
def command() -> Iterator[tuple[str, float]]:
    """Start `attnctl ui`; yield its address and the seconds until it was there."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "attnctl", "ui", "--no-browser"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit("attnctl ui did not start; see above")
        yield url, time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def chromium() -> str:
    """Find a Chromium."""
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        raise SystemExit("There is no chromium on the PATH.")
    return found


def paint(browser: Any, url: str) -> dict[str, float]:
    """Open the page as a new visitor and time it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    began = time.perf_counter()
    tab.goto(url)
    tab.wait_for_selector("#image-go", timeout=WAIT)
    usable = time.perf_counter() - began
    first = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return {"first_paint": first / 1000, "usable": usable}


def clicks(browser: Any, url: str, shots: Path | None, only: tuple[str, ...]) -> tuple[dict[str, float], list[str]]:
    """Click through the tabs; return the seconds of each and the requests that went elsewhere."""
    tab = browser.new_page(viewport={"width": 1280, "height": 860})
    tab.set_default_timeout(WAIT)
    outside: list[str] = []
    tab.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else outside.append(r.url))
    tab.goto(url)
    tab.wait_for_selector("#image-go")
    seconds = {}
    for name, tabs, example, button, done in TABS:
        if only and name not in only:
            continue
        for label in tabs:
            tab.get_by_role("tab", name=label, exact=True).click()
        if example:
            tab.locator("#edit-examples").get_by_text("a red circle on gray").first.click()
            tab.wait_for_selector("#edit-video .file-preview")
        began = time.perf_counter()
        tab.click(button)
        tab.wait_for_selector(done)
        seconds[name] = time.perf_counter() - began
        print(f"{name:10} {seconds[name]:6.1f} s", file=sys.stderr, flush=True)
        if shots is not None:
            tab.wait_for_timeout(1500)  # pictures fade in
            tab.screenshot(path=shots / f"{name}.png", full_page=True)
            shrink(shots / f"{name}.png")
    return seconds, outside


def left(browser: Any, url: str, how: str) -> float:
    """Begin a long run in one window and leave it; return the seconds until another has its picture of one step."""
    first, second = (browser.new_page(viewport={"width": 1280, "height": 860}) for _ in range(2))
    for window, steps in ((first, "1000"), (second, "1")):
        window.set_default_timeout(WAIT)
        window.goto(url)
        window.wait_for_selector("#image-go")
        window.get_by_label("Steps").first.fill(steps)
    first.click("#image-go")
    first.wait_for_selector("text=/[1-9]\\d*/2k steps/")
    began = time.perf_counter()
    if how == "stop":
        first.click("#stop")
    else:
        first.close()
    second.click("#image-go")
    second.wait_for_selector("#image-marks table")
    seconds = time.perf_counter() - began
    print(f"{how:10} {seconds:6.1f} s until another window has its picture", file=sys.stderr, flush=True)
    for window in (first, second):
        window.close()
    return seconds


def shrink(path: Path) -> None:
    """Store a screenshot in 256 colours."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=Path, help="folder for a screenshot of each tab")
    parser.add_argument("--only", nargs="*", default=(), help="names such as ui-image; all tabs if left out")
    options = parser.parse_args()

    from playwright.sync_api import sync_playwright

    with command() as (url, start), sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        visits = [paint(browser, url) for _ in range(3)]
        seconds, outside = clicks(browser, url, options.shots, tuple(options.only))
        freed = {how: round(left(browser, url, how), 2) for how in ("stop", "closed")}
        browser.close()
    times = {name: min(visit[name] for visit in visits) for name in visits[0]}
    result = {
        "start": round(start, 2),
        **{name: round(value, 2) for name, value in times.items()},
        "clicks": {name.removeprefix("ui-"): round(value, 2) for name, value in seconds.items()},
        "left_after": freed,
        "requests_elsewhere": outside,
        "limits": {"first_paint": PAINT, "image": PICTURE, "left_after": LEFT},
        "passed": times["first_paint"] < PAINT
        and seconds.get("ui-image", 0) < PICTURE
        and max(freed.values()) < LEFT
        and not outside,
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("gradio", "torch", "diffusers")},
    }
    for name in ("start", "first_paint", "usable"):
        print(f"{name:12} {result[name]:6.2f} s", file=sys.stderr)
    print(f"requests to other machines: {len(outside)}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
