"""Wrong calls of the public API from Python: one clear sentence of the project's own each, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo_pipelines as pipes
from contract import assert_clean, snapshot

import attnctl
from attnctl import backbones, kernels, pipelines, plans, processors, shapes
from attnctl.errors import (
    AttnctlError,
    BackendError,
    ConfigError,
    ConflictError,
    JudgeError,
    NeverApplied,
    PlanError,
    SiteError,
    UnsupportedModelError,
    shown,
)
from attnctl.processors import NAG, PAG, SEG, SLG, AttendExcite, Capture, FateZero, Regions, SoftPAG, SparseAttention

pytestmark = pytest.mark.usefixtures("no_grad")
timm = pytest.importorskip("timm")
MID = PAG(sites="mid")
Q = torch.randn(1, 2, 4, 8)
CLIP = np.zeros((2, 64, 64, 3), np.uint8)
EDIT = FateZero(source="a cat", target="a dog")


@pytest.fixture(scope="module")
def w() -> Any:
    """Build what the calls are about: two pipelines, a vision transformer and a network without attention."""
    (pipe, kwargs), (other, _) = pipes.build("sd"), pipes.build("sd")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    cnn = timm.create_model("resnet10t")
    return SimpleNamespace(pipe=pipe, kwargs=kwargs, other=other, vit=vit, cnn=cnn)


def attached(call: Callable[[Any, Any], Any], *controls: Any) -> Callable[[Any], Any]:
    """Make the call with a handle whose controls are attached."""

    def run(w: Any) -> Any:
        with attnctl.control(w.pipe, *(controls or (MID,))) as handle:
            return call(w, handle)

    return run


def detached(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make the call with a handle that was detached."""

    def run(w: Any) -> Any:
        handle = attnctl.control(w.pipe, MID)
        handle.detach()
        return call(handle)

    return run


def run_with(control: Any, **changes: Any) -> Callable[[Any], Any]:
    """Run the pipeline under a control with other arguments."""
    return attached(lambda w, h: pipes.run(w.pipe, {**w.kwargs, **changes}), control)


def put(name: str, value: Any) -> Callable[[Any, Any], Any]:
    """Set an attribute of the handle."""
    return lambda w, h: setattr(h, name, value)


Case = tuple[str, Callable[[Any], Any], type[AttnctlError], str]
TARGETS: list[Case] = [
    ("a class of pipelines", lambda w: attnctl.control(type(w.pipe), MID), UnsupportedModelError, "object of it first"),
    ("controls first", lambda w: attnctl.control(MID, w.pipe), UnsupportedModelError, "pipeline comes first"),
    ("a model's name", lambda w: attnctl.control("runwayml/sd", MID), UnsupportedModelError, "Load the model first"),
    ("a list of pipelines", lambda w: attnctl.control([w.pipe], MID), UnsupportedModelError, "one pipeline per call"),
    ("a text encoder", lambda w: attnctl.control(w.pipe.text_encoder, MID), UnsupportedModelError, "CLIPAttention"),
    ("weights", lambda w: attnctl.control(w.pipe.unet.state_dict(), MID), UnsupportedModelError, "denoiser itself"),
    ("a scheduler", lambda w: attnctl.control(w.pipe.scheduler, MID), UnsupportedModelError, "denoiser itself"),
    ("a handle", attached(lambda w, h: attnctl.control(h, MID)), UnsupportedModelError, "denoiser itself"),
    ("sites of a name", lambda w: attnctl.find_sites("sd"), UnsupportedModelError, "Load the model first"),
    ("sites of nothing", lambda w: attnctl.find_sites(None), UnsupportedModelError, "None has no `unet`"),
    ("the handle of a name", lambda w: attnctl.handle_of("pipe"), UnsupportedModelError, "'pipe' has no"),
    ("processors of nothing", lambda w: attnctl.attn_processors(None, MID), UnsupportedModelError, "None has no"),
    ("PAG on a backbone", lambda w: attnctl.control(w.vit, PAG()), UnsupportedModelError, "attnctl.swap"),
    ("words of a backbone", lambda w: attnctl.control(w.vit, Capture(words=("cat",))), ConfigError, "class, mean"),
]
CONTROLS: list[Case] = [
    ("a list of controls", lambda w: attnctl.control(w.pipe, [MID, MID]), ConfigError, r"one by one.*\*controls"),
    ("a tuple of controls", lambda w: attnctl.control(w.pipe, (MID,)), ConfigError, "one by one"),
    ("a class", lambda w: attnctl.control(w.pipe, PAG), ConfigError, r"the class PAG is not.*PAG\(scale"),
    ("a function", lambda w: attnctl.control(w.pipe, lambda: MID), ConfigError, "is not a control"),
    ("a text", lambda w: attnctl.control(w.pipe, "PAG(scale=3.0)"), ConfigError, "is not a control"),
    ("a record of one", lambda w: attnctl.control(w.pipe, {"method": "PAG"}), ConfigError, "is not a control"),
    ("a module", lambda w: attnctl.control(w.pipe, processors), ConfigError, "is not a control"),
    ("another part", lambda w: attnctl.control(w.pipe, w.pipe.image_processor), ConfigError, "a VaeImageProcessor is"),
    ("a handle as control", attached(lambda w, h: attnctl.control(w.other, h)), ConfigError, "is not a control"),
    ("attached inside", attached(lambda w, h: attnctl.control(w.pipe, MID)), ConflictError, "under control already"),
    ("inside, its UNet", attached(lambda w, h: attnctl.control(w.pipe.unet, MID)), ConflictError, "under control"),
    ("no kernel", lambda w: attnctl.control(w.pipe, MID, backend=None), BackendError, "Choose auto"),
    ("a list of kernels", lambda w: attnctl.control(w.pipe, MID, backend=["sdpa"]), BackendError, "Choose auto"),
    ("no layout", lambda w: attnctl.control(w.pipe, MID, layout=None), ConfigError, "Choose one of"),
    ("replay in words", lambda w: attnctl.control(w.pipe, MID, replay="no"), ConfigError, "True or False"),
    (
        "modules as sites",
        lambda w: attnctl.control(w.pipe, PAG(sites=w.pipe.unet.mid_block)),
        SiteError,
        "got a UNetMid",
    ),
    ("a dict of sites", lambda w: attnctl.control(w.pipe, PAG(sites={"mid": 1})), SiteError, "name, glob, depth"),
    ("depths of numpy", lambda w: attnctl.control(w.pipe, PAG(sites=np.array([0, 99]))), SiteError, "depth 99"),
    ("an array of scales", lambda w: PAG(scale=np.array([1.0, 2.0])), ConfigError, "finite number"),
    ("steps for fractions", lambda w: PAG(start=5), ConfigError, "from 0 to 1"),
    ("heads as numbers", lambda w: SoftPAG(heads=np.zeros((2, 3))), SiteError, "pairs"),
    ("one word", lambda w: Capture(words="cat"), ConfigError, "tuple of words"),
    ("one point", lambda w: Capture(points=(0.5, 0.5)), ConfigError, "shares of width and height"),
    ("areas in pixels", lambda w: Regions(prompts=("a",), areas=((0, 0, 32, 64),)), ConfigError, "from 0 to 1"),
    ("a class of selectors", lambda w: SparseAttention(plans.Online), ConfigError, "expected Online"),
    ("percent", lambda w: plans.Online(density=40), ConfigError, "up to 1"),
    ("a window in words", lambda w: plans.Neighborhood(window="8"), ConfigError, "whole number"),
]
PLUG: list[Case] = [
    ("no processors", lambda w: attnctl.attn_processors(w.pipe), ConfigError, "Pass one"),
    ("a list of them", lambda w: attnctl.attn_processors(w.pipe, [MID]), ConfigError, "one by one"),
    ("SLG", lambda w: attnctl.attn_processors(w.pipe, SLG(sites="mid")), ConfigError, r"attnctl\.control"),
    ("NAG", lambda w: attnctl.attn_processors(w.pipe, NAG()), ConfigError, r"attnctl\.control"),
]
HANDLES: list[Case] = [
    ("maps before a run", attached(lambda w, h: h.maps, Capture()), NeverApplied, "run the pipeline first"),
    ("maps of no Capture", attached(lambda w, h: h.maps), ConfigError, "Capture"),
    ("a result by name", attached(lambda w, h: h.result("PAG")), ConfigError, "none of the attached controls"),
    ("a result by class", attached(lambda w, h: h.result(PAG)), ConfigError, "the class PAG is none of"),
    ("a result of PAG", attached(lambda w, h: h.result(MID)), ConfigError, "records nothing"),
    ("a result before a run", attached(lambda w, h: h.result(0), Capture()), NeverApplied, "run the pipeline first"),
    ("set by name", attached(lambda w, h: h.set("PAG", scale=1.0)), ConfigError, "none of the attached"),
    ("set another's", attached(lambda w, h: h.set(SEG(sites="mid"), scale=1.0)), ConfigError, "none of the attached"),
    ("set beyond the list", attached(lambda w, h: h.set(3, scale=1.0)), ConfigError, "3 is none of"),
    ("set no field", attached(lambda w, h: h.set(0, weight=1.0)), ConfigError, "no field 'weight'"),
    ("set when detached", detached(lambda h: h.set(0, scale=1.0)), ConflictError, "detached"),
    ("a difference by name", attached(lambda w, h: h.kept("PAG")), NeverApplied, "every > 1"),
    ("a difference too early", attached(lambda w, h: h.kept(MID)), NeverApplied, "every > 1"),
    ("enabled in words", attached(put("enabled", "yes")), ConfigError, "True or False"),
    ("enabled by an array", attached(put("enabled", np.array([1, 0]))), ConfigError, "True or False"),
    ("enabled when detached", detached(lambda h: setattr(h, "enabled", True)), ConflictError, "detached"),
    ("with a detached one", detached(lambda h: h.__enter__()), ConflictError, "write `with"),
    ("attached twice", attached(lambda w, h: h.attach()), ConflictError, "attached already"),
    ("n before i", attached(lambda w, h: h.set_step(4, 2)), ConfigError, "step=4 must be a whole number"),
    ("an array of steps", attached(lambda w, h: h.set_step(np.arange(3), 4)), ConfigError, "must be a whole number"),
    ("a timestep in words", attached(lambda w, h: h.set_step(0, 4, "t")), ConfigError, "timestep"),
    ("all timesteps", attached(lambda w, h: h.set_step(0, 4, torch.arange(3))), ConfigError, "timestep"),
]
RUNS: list[Case] = [
    ("no steps", run_with(MID, num_inference_steps=0), ConfigError, "1 or more"),
    ("negative steps", run_with(MID, num_inference_steps=-1), ConfigError, "1 or more"),
    ("half a step", run_with(MID, num_inference_steps=2.5), ConfigError, "whole number of steps"),
    ("a word that is not there", run_with(Capture(words=("dragon",))), ConfigError, "not in the prompt"),
    ("a noun that is not there", run_with(AttendExcite(concepts=("dragon",))), ConfigError, "not in the prompt"),
]
MODELS: list[Case] = [
    ("a misspelt model", lambda w: attnctl.load_shapes("text2img"), ConfigError, "Did you mean 'text2image'"),
    ("no model", lambda w: attnctl.load_shapes(None), ConfigError, "known: text2image"),
    ("a device in words", lambda w: attnctl.load_shapes(device="gpu"), ConfigError, "such as 'cpu'"),
    ("no device", lambda w: attnctl.load_shapes(device=None), ConfigError, "such as 'cpu'"),
    ("a dtype in words", lambda w: attnctl.load_shapes(dtype="float16"), ConfigError, r"torch\.float16"),
    ("whole numbers", lambda w: attnctl.load_shapes(dtype=torch.int8), ConfigError, r"torch\.float16"),
    ("a misspelt kind", lambda w: attnctl.swap(w.vit, "agnet"), ConfigError, "Did you mean 'agent'"),
    ("the kind first", lambda w: attnctl.swap("agent", w.vit), UnsupportedModelError, "in the first place"),
    ("a name for a backbone", lambda w: attnctl.swap("vit_tiny", "agent"), UnsupportedModelError, "create_model"),
    ("swap a pipeline", lambda w: attnctl.swap(w.pipe, "agent"), UnsupportedModelError, "model of timm"),
    ("swap a UNet", lambda w: attnctl.swap(w.pipe.unet, "agent"), UnsupportedModelError, "swap knows"),
    ("no attention", lambda w: attnctl.swap(w.cnn, "agent"), UnsupportedModelError, "swap knows"),
    ("a number for a kind", lambda w: attnctl.swap(w.vit, 3), ConfigError, "kind by name"),
    ("another option", lambda w: attnctl.swap(w.vit, "agent", agents=4), ConfigError, "'num_agents'"),
    ("negative agents", lambda w: attnctl.swap(w.vit, "agent", num_agents=-4), ConfigError, "square number"),
    ("half a block", lambda w: attnctl.swap(w.vit, "agent", blocks=1.5), SiteError, "index from 0 to 1"),
    ("a grid in words", lambda w: attnctl.swap(w.vit, "agent", grid="2x2"), ConfigError, "height, width"),
    ("unswap at first", lambda w: attnctl.unswap(w.vit), ConfigError, "swap.* first"),
    ("unswap nothing", lambda w: attnctl.unswap(None), UnsupportedModelError, "None was given"),
    ("a report of a name", lambda w: attnctl.swap_report("vit"), UnsupportedModelError, "'vit' was given"),
    ("any size of nothing", lambda w: backbones.any_size(None), UnsupportedModelError, "None was given"),
]
KERNELS: list[Case] = [
    ("arrays", lambda w: kernels.attention(*[Q.numpy()] * 3), ConfigError, "q ndarray.*from_numpy"),
    ("nothing", lambda w: kernels.attention(Q, None, None), ConfigError, "k NoneType"),
    ("whole numbers", lambda w: kernels.attention(*[Q.long()] * 3), ConfigError, "floating point"),
    ("a mask of numpy", lambda w: kernels.attention(Q, Q, Q, mask=np.ones((4, 4))), ConfigError, "mask ndarray"),
    ("a scale in words", lambda w: kernels.attention(Q, Q, Q, scale="auto"), ConfigError, "scale='auto'"),
    ("heads not split", lambda w: kernels.attention(*[Q[0]] * 3), ConfigError, "Split the heads"),
    ("arrays for columns", lambda w: kernels.columns(Q.numpy(), Q.numpy(), Q), ConfigError, "q ndarray"),
    ("a list of weights", lambda w: kernels.columns(Q, Q, [0]), ConfigError, "weights list"),
    ("two kernels", lambda w: kernels.attention(Q, Q, Q, backend=["sdpa"]), BackendError, "expected 'auto'"),
]
FILES: list[Case] = [
    ("no head set", lambda w: attnctl.HeadSet.from_pretrained(None), PlanError, "file or folder of a head set"),
    ("a number of heads", lambda w: attnctl.HeadSet.from_pretrained(3), PlanError, "3 was given"),
    ("no block plan", lambda w: plans.BlockPlan.from_pretrained(None), PlanError, "None was given"),
    ("no plan of a model", lambda w: plans.ModelPlan.from_pretrained(None), PlanError, "None was given"),
]
JOBS: list[Case] = [
    ("one prompt", lambda w: pipelines.calibrate(w.pipe, "a cat"), ConfigError, "list of at least one"),
    ("prompts of nothing", lambda w: pipelines.calibrate(w.pipe, [None]), ConfigError, "each a text"),
    ("prompts first", lambda w: pipelines.calibrate(["a cat"], w.pipe), UnsupportedModelError, "whole pipeline"),
    ("calibrate a UNet", lambda w: pipelines.calibrate(w.pipe.unet, ["a cat"]), UnsupportedModelError, "whole"),
    ("a call of steps", lambda w: pipelines.calibrate(w.pipe, ["a cat"], call=4), ConfigError, "num_inference_steps"),
    (
        "a misspelt argument",
        lambda w: pipelines.calibrate(w.pipe, ["a cat"], call={"num_inference_step": 2}),
        ConfigError,
        "Did you mean 'num_inference_steps'",
    ),
    ("a plan of nothing", lambda w: pipelines.check_plan(w.pipe, None, ["a cat"]), ConfigError, "ModelPlan"),
    ("no report", lambda w: pipelines.write_report(None, "x"), ConfigError, "calibrate"),
    (
        "hunt a UNet",
        lambda w: pipelines.hunt(w.pipe.unet, pipelines.HuntPlan(pairs=(("a", 0),)), len),
        UnsupportedModelError,
        "whole",
    ),
    ("an edit in words", lambda w: pipelines.edit_video(w.pipe, CLIP, "a dog"), ConfigError, "FateZero, Inject"),
    ("an edit by its class", lambda w: pipelines.edit_video(w.pipe, CLIP, FateZero), ConfigError, "FateZero, Inject"),
    ("a clip of fractions", lambda w: pipelines.edit_video(w.pipe, CLIP / 255, EDIT), ConfigError, "uint8 RGB"),
    ("a path to nothing", lambda w: pipelines.edit_video(w.pipe, "no.mp4", EDIT), AttnctlError, "no video"),
    ("negative edits", lambda w: pipelines.edit_video(w.pipe, CLIP, EDIT, steps=-3), ConfigError, "whole number"),
    ("no picture", lambda w: pipelines.image_maps(w.pipe, None, "a cat"), ConfigError, "PIL image"),
    ("a picture's path", lambda w: pipelines.image_maps(w.pipe, "cat.png", "a cat"), ConfigError, "Open the file"),
    ("the prompt first", lambda w: pipelines.image_maps(w.pipe, "a cat", Q), ConfigError, "PIL image"),
    ("no expression", lambda w: pipelines.refer(w.pipe, Q, None), ConfigError, "list of texts"),
    ("no scheduler", lambda w: pipelines.ddim_of(None), UnsupportedModelError, "pipe.scheduler"),
    ("a class to guide", lambda w: pipelines.ControlGuider(PAG), ConfigError, "list of controls"),
    ("no caption", lambda w: shapes.parse(None), JudgeError, "a red circle on gray"),
    ("a caption to draw", lambda w: shapes.render("a red circle on gray"), JudgeError, "parse"),
    ("a path to judge", lambda w: shapes.judge("a.png"), JudgeError, "uint8 RGB"),
]
ALL = [*TARGETS, *CONTROLS, *PLUG, *HANDLES, *RUNS, *MODELS, *KERNELS, *FILES, *JOBS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ALL, ids=lambda c: c[0])
def test_wrong_calls(w: Any, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, call, error, words = case
    monkeypatch.chdir(tmp_path)
    before = snapshot(w.pipe.unet, w.pipe.scheduler)
    with pytest.raises(error, match=words) as caught:
        call(w)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    assert attnctl.handle_of(w.pipe) is None
    assert attnctl.handle_of(w.other) is None
    assert_clean(before, w.pipe.unet, w.pipe.scheduler)
    assert not list(tmp_path.iterdir())


def test_a_handle_is_found_by_place_and_attaches_again(w: Any) -> None:
    with attnctl.control(w.pipe, Capture(words=("cat",)), MID) as handle:
        guided = pipes.run(w.pipe, w.kwargs)
        maps = handle.result(handle.controls[0]).get_map("cat")
        equal = Capture(words=("cat",))  # not the one that is attached, but equal to it
        for control in (0, -2, equal):
            assert torch.equal(handle.result(control).get_map("cat"), maps)
    handle.attach()
    assert torch.equal(pipes.run(w.pipe, w.kwargs), guided)
    handle.detach()
    assert attnctl.handle_of(w.pipe) is None


def test_values_are_shown_on_one_line() -> None:
    assert shown(PAG) == "the class PAG"
    assert shown(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))) == "a Sequential"
    assert shown("x" * 200) == "'" + "x" * 76 + "..."
    assert "\n" not in shown(copy.copy(np.eye(3)))
