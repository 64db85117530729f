"""A prompt for a region on every host: over all of the picture, it is the prompt; or it is refused in words."""

from __future__ import annotations

import pytest
import zoo
from contract import Precise

import attnctl
from attnctl.core.hosts.ghost import text_arguments
from attnctl.errors import UnsupportedModelError
from attnctl.processors import Regions

pytestmark = pytest.mark.usefixtures("no_grad")

OTHERWISE = (  # the text is not only attended to: it is pooled into the time embedding, or heard as well
    *("hunyuandit", "mochi", "lumina_next", "kandinsky3", "kandinsky6", "ltx2", "longcat_audio"),
    *("zimage", "hidream"),  # padding beside the image keeps the prompt of the call
    "qwen21",  # the output holds the text, which keeps the prompt of the call
)
REFUSED = (  # in words: nothing tells how the image's tokens lie, or no call takes a line of the image alone
    *("svd", "bria_fibo2", "sana_wm_refiner", "stable_audio", "stable_audio3"),
    *("hunyuan15", "framepack", "consisid", "ideogram4", "omnigen", "joyimage_plus", "minimax_h3"),
    *("anyflow_far", "prior"),
)
NO_TEXT = ("dit", "unet2d", "minimax_music3", "kandinsky6_sr")


@pytest.mark.parametrize("name", [n for n in zoo.EVERY if n not in (*OTHERWISE, *REFUSED, *NO_TEXT)])
def test_on_every_host_a_region_over_all_is_its_text(name: str, precise: Precise) -> None:
    model, inputs = precise(name)
    other = text_arguments(precise(name, seed=1)[1], inputs)
    other = {k: v for k, v in other.items() if k in inputs and "pooled" not in k}
    kind = "cross" if any(s.kind == "cross" for s in attnctl.find_sites(model)) else "joint"
    everywhere = Regions(embeds=(other,), areas=((0, 0, 1, 1),), base=0.0, stop=1.0, sites=kind)
    with attnctl.control(model, everywhere, layout="cond"):
        out = zoo.call(model, inputs)
    expected = zoo.call(model, {**inputs, **other})
    assert (out - expected).norm() / expected.norm() < 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_on_other_hosts_regions_are_refused_in_words(name: str) -> None:
    model, inputs = zoo.build(name)
    other = text_arguments(zoo.build(name, seed=1)[1], inputs)
    other = {k: v for k, v in other.items() if k in inputs}
    everywhere = Regions(embeds=(other,), areas=((0, 0, 1, 1),), base=0.0, stop=1.0)
    words = "nothing tells how|cannot be controlled|takes no text"
    with pytest.raises(UnsupportedModelError, match=words), attnctl.control(model, everywhere, layout="cond"):
        zoo.call(model, inputs)
