"""What `import attnctl` costs and says."""

from __future__ import annotations

import subprocess
import sys

import processes

TIMED = """
import time, torch, diffusers
begin = time.process_time()
import attnctl, attnctl.core.handle
print(time.process_time() - begin)
"""


def run(code: str) -> str:
    """Run code where torch and diffusers are imported, and return what it printed."""
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_silent() -> None:
    code = "import attnctl, attnctl.kernels; attnctl.kernels.backends(); from attnctl.processors import PAG; PAG()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_import_is_quick() -> None:
    # Beyond torch and diffusers; processor time, so that a busy machine does not count.
    seconds = min(float(run(TIMED)) for _ in range(2))
    assert seconds < 0.3


HEAVY = ("timm", "cv2", "matplotlib", "gradio", "tyro", "xformers.ops")
LOADED = """
import sys, torch, diffusers
before = set(sys.modules)
import attnctl, attnctl.core.handle
print(sorted(name for name in {heavy} if name in sys.modules and name not in before))
"""


def test_import_leaves_alone_what_it_does_not_need() -> None:
    assert run(LOADED.format(heavy=HEAVY)).strip() == "[]"


def test_public_names_are_importable() -> None:
    import attnctl
    import attnctl.processors

    for module in (attnctl, attnctl.processors):
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_lazy_names_are_not_modules() -> None:
    # Importing a module makes it an attribute of its package, where it would hide the object of the same name.
    import pkgutil

    import attnctl
    import attnctl.pipelines
    import attnctl.processors

    for package in (attnctl, attnctl.pipelines, attnctl.processors):
        assert not {m.name for m in pkgutil.iter_modules(package.__path__)} & set(package.__all__), package.__name__
