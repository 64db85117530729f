"""The panels of `attnctl demo`: what each shows, and what a recorded study says about how often it happens.

The figures are those of the files in `benchmarks/results`, which the tests compare them with; an installed package has
no such files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["PANELS", "Case", "Panel", "Recorded"]

_LEFT = ((1,) * 4 + (0,) * 4,) * 8
_RIGHT = ((0,) * 4 + (1,) * 4,) * 8
_HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Hold what a study has measured on other prompts and seeds than it was tuned on.

    Attributes:
        mark: What was counted, in words.
        plain: Percent of the plain pictures.
        control: Percent of those under control.
        gain: Points between the two, and the bounds of its 95 % interval.
        n: Pictures, clips or answers.
        file: The result in `benchmarks/results`.
        places: Where in its JSON plain, control, gain and n stand: keys and indices joined by "/".
        command: What measures it.
    """

    mark: str
    plain: float
    control: float
    gain: tuple[float, float, float]
    n: int
    file: str
    places: tuple[str, str, str, str]
    command: str


@dataclass(frozen=True)
class Case:
    """Describe one pair of pictures: prompt, seed, what the control needs besides, and words under the prompt."""

    prompt: str
    seed: int
    more: Any = ""
    says: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Describe one panel: two pairs of pictures under a title.

    Attributes:
        title: What it shows.
        kind: How it is made: "pictures", "words", "clip" or "vision".
        model: The shipped model, or what is trained on the spot.
        control: The control as a text of `--control`; NOUNS stands for the nouns of a prompt, OBJECTS for a prompt for
            each of its objects, SOURCE for the prompt, and MORE for what the case holds besides.
        tiles: Names of the two pictures of a pair.
        mark: What the judge asks of a picture: "right", "half", "halves" or "gone".
        cases: The pairs.
        steps: Denoising steps, or epochs.
        guidance: Classifier-free guidance scale; 1 is off.
        options: Further arguments of the pipeline call.
        seconds: Seconds that it takes on one core, roughly, for the bar.
        recorded: What a study says.
    """

    title: str
    kind: str = "pictures"
    model: str
    control: str
    tiles: tuple[str, str]
    mark: str = "right"
    cases: tuple[Case, ...]
    steps: int = 20
    guidance: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 5.0
    recorded: Recorded


_NO_PADDING = {"max_sequence_length": 0}  # in the place of T5: half the time

PANELS: tuple[Panel, ...] = (
    Panel(
        title="SoftPAG without classifier-free guidance",
        model="shapes:mmdit",
        control="SoftPAG(sites=6, scale=2.0)",
        tiles=("plain", "SoftPAG"),
        cases=(
            Case("a purple ring and a blue cross on brown", 710_013),
            Case("a white square and a yellow ring on gray", 710_021),
        ),
        steps=10,
        options=_NO_PADDING,
        seconds=2.0,
        recorded=Recorded(
            mark="all right",
            plain=27.1,
            control=55.7,
            gain=(28.6, 22.4, 34.9),
            n=192,
            file="no_guidance.json",
            places=(
                "without/shares_percent/plain/right",
                "without/shares_percent/SoftPAG/right",
                "without/gain_right_points/SoftPAG",
                "pictures",
            ),
            command="python benchmarks/no_guidance.py --parts heads",
        ),
    ),
    Panel(
        title="Attend-and-Excite: no object is forgotten",
        model="shapes:text2image",
        control="AttendExcite(concepts=NOUNS, grad_transform='l2', step_size=0.5, stop=0.2, thresholds=())",
        tiles=("plain", "Attend-and-Excite"),
        cases=(
            Case("a red triangle and a white circle on gray", 700_004),
            Case("a green circle and a purple cross on gray", 700_006),
        ),
        guidance=1.5,
        recorded=Recorded(
            mark="all right",
            plain=60.9,
            control=70.3,
            gain=(9.4, 5.1, 13.7),
            n=512,
            file="astar_effects.json",
            places=(
                "rows/plain/right",
                "rows/AttendExcite/right",
                "rows/AttendExcite/gain_right_points",
                "prompts * seeds",
            ),
            command="python benchmarks/astar_effects.py",
        ),
    ),
    Panel(
        title="A-STAR with masks: an object where you ask for it",
        model="shapes:text2image",
        control="AStar(concepts=NOUNS, masks=MORE, seg=0.0, grad_transform='l2', step_size=1.0)",
        tiles=("plain", "A-STAR, mask"),
        mark="half",
        cases=(
            Case("a red square on teal", 800_001, (_LEFT,), "in the left half"),
            Case("a blue triangle on gray", 800_024, (_RIGHT,), "in the right half"),
        ),
        guidance=1.5,
        recorded=Recorded(
            mark="in the half asked for",
            plain=49.0,
            control=97.9,
            gain=(49.0, 38.5, 59.4),
            n=96,
            file="astar_effects.json",
            places=("layouts/plain", "layouts/masks", "layouts/gain_points", "layouts/pictures"),
            command="python benchmarks/astar_effects.py",
        ),
    ),
    Panel(
        title="Regions: a prompt for each half of the picture",
        model="shapes:mmdit",
        control=f"Regions(prompts=OBJECTS, areas={_HALVES!r}, stop=0.25, base=0.1)",
        tiles=("plain", "Regions"),
        mark="halves",
        cases=(
            Case("a blue circle and a white ring on gray", 620_005, says="the first left, the second right"),
            Case("a green circle and a purple cross on gray", 620_006, says="the first left, the second right"),
        ),
        guidance=3.0,
        options=_NO_PADDING,
        seconds=7.0,
        recorded=Recorded(
            mark="both in their halves",
            plain=23.4,
            control=56.2,
            gain=(32.8, 20.3, 45.3),
            n=64,
            file="effects_regions.json",
            places=("plain_percent/in place", "regions_percent/in place", "gain_points/in place", "pictures"),
            command="python benchmarks/regions_effects.py",
        ),
    ),
    Panel(
        title="NAG: a negative prompt without guidance",
        model="shapes:text2image",
        control="NAG(scale=10.0, tau=3.5)",
        tiles=("plain", "NAG"),
        mark="gone",
        cases=(
            Case("a white ring and a green circle on gray", 700_021, "a white ring on gray", "not: a white ring"),
            Case("a green ring and a white triangle on teal", 700_011, "a green ring on teal", "not: a green ring"),
        ),
        steps=10,
        seconds=1.5,
        recorded=Recorded(
            mark="negative object there",
            plain=75.0,
            control=9.4,
            gain=(-65.6, -76.6, -53.1),
            n=64,
            file="nag_effects.json",
            places=(
                "object/negative object/plain/0",
                "object/negative object/NAG/0",
                "object/negative object/difference",
                "object/pictures",
            ),
            command="python benchmarks/nag_effects.py",
        ),
    ),
    Panel(
        title="Capture: where the picture attends to a word",
        kind="words",
        model="shapes:text2image",
        control="Capture(words=(MORE,), sites='up_blocks', start=0.5)",
        tiles=("picture", "word map, its mask"),
        cases=(
            Case("a purple triangle and a green cross on black", 730_001, "cross", "the word: cross"),
            Case("a purple triangle and a red square on black", 730_002, "triangle", "the word: triangle"),
        ),
        guidance=1.5,
        seconds=2.0,
        recorded=Recorded(
            mark="mask's IoU (plain: other object)",
            plain=0.9,
            control=66.3,
            gain=(65.4, 62.2, 68.4),
            n=130,
            file="word_masks.json",
            places=("iou_percent/other object", "iou_percent/own object", "gain_points", "nouns"),
            command="python benchmarks/word_masks.py",
        ),
    ),
    Panel(
        title="FateZero: a clip edited with a prompt",
        kind="clip",
        model="shapes:text2image",
        control="FateZero(source=SOURCE, target=MORE, blend_words=NOUNS, cross_replace=0.8, self_replace=0.5, "
        "blend_attention=False, blend_latents=True, blend_window=(0.0, 1.0))",
        tiles=("source", "edited"),
        cases=(Case("a blue square on teal", 720_000, "a red square on teal"),),
        guidance=5.0,
        seconds=16.0,
        recorded=Recorded(
            mark="frames recoloured (plain: SDEdit)",
            plain=72.7,
            control=100.0,
            gain=(27.3, 8.6, 50.0),
            n=16,
            file="effects_fatezero.json",
            places=(
                "kinds/colour/methods/SDEdit/success/0",
                "kinds/colour/methods/FateZero/success/0",
                "kinds/colour/methods/SDEdit/FateZero_minus_this/success",
                "clips",
            ),
            command="python benchmarks/fatezero_effects.py -n 16 --tune 2 --tries 6",
        ),
    ),
    Panel(
        title="A vision transformer with swapped attention",
        kind="vision",
        model="timm's vit_tiny, 2 blocks of 64",
        control="attnctl.swap(model, 'agent', num_agents=4)",
        tiles=("picture", "where it looks"),
        cases=(Case("", 0), Case("", 1)),
        steps=8,
        seconds=8.0,
        recorded=Recorded(
            mark="looks at the object (plain: own)",
            plain=26.8,
            control=66.3,
            gain=(39.5, 36.5, 42.4),
            n=256,
            file="vision_maps.json",
            places=("on_object_percent/own", "on_object_percent/agent", "gain_points", "scenes"),
            command="python benchmarks/vision_maps.py",
        ),
    ),
)
