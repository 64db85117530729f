"""What `import attnctl` costs and says."""

from __future__ import annotations

import subprocess
import sys

import pytest

TIMED = """
import logging
logging.getLogger("xformers").setLevel(logging.ERROR)
import time, torch, diffusers
begin = time.process_time()
import attnctl
print(time.process_time() - begin)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)


def test_import_is_silent() -> None:
    done = run("import attnctl, attnctl.kernels; attnctl.kernels.backends(); from attnctl.processors import PAG; PAG()")
    assert done.stdout == ""
    assert done.stderr == ""


def test_import_is_quick() -> None:
    # Beyond torch and diffusers; processor time, so that a busy machine does not count.
    seconds = min(float(run(TIMED).stdout) for _ in range(2))
    assert seconds < 0.3


@pytest.mark.parametrize(
    "heavy", ["timm", "cv2", "matplotlib", "gradio", "tyro", "accelerate.utils.launch", "xformers.ops"]
)
def test_import_leaves_alone_what_it_does_not_need(heavy: str) -> None:
    code = f"import sys, torch, diffusers; before = {heavy!r} in sys.modules; import attnctl; print({heavy!r} in sys.modules and not before)"
    assert run(code).stdout.strip() == "False"


def test_public_names_are_importable() -> None:
    import attnctl
    import attnctl.processors

    for module in (attnctl, attnctl.processors):
        for name in module.__all__:
            assert getattr(module, name) is not None
