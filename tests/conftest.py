"""Keep every test offline, quiet and on one thread per worker."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator

# Before the first import of torch and the hubs, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import contract
import diffusers
import network
import pytest
import torch
import transformers
from hypothesis import settings

# The same cases in every run, and few; `pytest --hypothesis-profile=night` tries twenty times as many, at random.
settings.register_profile("ci", derandomize=True, database=None, deadline=None)
settings.register_profile("night", max_examples=20 * settings.get_profile("default").max_examples, deadline=None)
settings.load_profile("ci")

torch.set_num_threads(1)
logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns at its import where its wheel cannot run
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_sessionstart() -> None:
    """Import the tests without the garbage collector: a million objects are made, of which few are garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the collector run again, seldom, and leave aside what was imported, which it would look through each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> contract.Precise:
    """Build tiny models in double precision, and keep it within them."""
    contract.round_nowhere(monkeypatch)
    return contract.precise


@pytest.fixture
def unplugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where something asks for another machine, though nothing forbids the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with network.guarded() as heard:
        yield
    assert not heard


@pytest.fixture(autouse=True)
def controls_of_this_test_alone() -> Iterator[None]:
    """Forget the controls that a test defines, so that no other test meets them."""
    from attnctl.core import registry

    before = dict(registry.CONTROLS)
    yield
    # The package's own stay: their modules are imported once, whichever test needs them first.
    own = {name: cls for name, cls in registry.CONTROLS.items() if registry.HOMES.get(name) == cls.__module__}
    registry.CONTROLS.clear()
    registry.CONTROLS.update(before | own)


@pytest.fixture(autouse=True)
def attention_backend_of_this_test_alone() -> Iterator[None]:
    """Give diffusers its attention back: `set_attention_backend` sets it for every model of the process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry._active_backend = before


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Compute without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def eight_frames(monkeypatch: pytest.MonkeyPatch, no_grad: None) -> Iterator[None]:
    """Build videos of 8 frames, long enough for a band of frequencies, and expect the warnings of BroadWay."""
    import zoo

    monkeypatch.setattr(zoo, "FRAMES", 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="attnctl: .* (mixes the frames|enhances only)")
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a tiny random Stable Diffusion pipeline."""
    import zoo_pipelines

    path = tmp_path_factory.mktemp("models") / "tiny-sd"
    zoo_pipelines.build("sd")[0].save_pretrained(path)
    return str(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command and return its exit code, stdout and stderr."""
    from attnctl.app.cli import main

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return call
