"""Denoisers that no table lists, of several makes: controlled where the counts of their calls decide, else refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import distance
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

import attnctl
from attnctl.core.control import Control
from attnctl.errors import AttnctlError
from attnctl.processors import NAG, PAG, SEG, Capture, SoftPAG

DIM, HEADS, TEXT, GRID = 16, 2, 7, (6, 4)
IMAGE = GRID[0] * GRID[1]

pytestmark = pytest.mark.usefixtures("no_grad")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with two heads, [B, N, C]."""
    q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TextFirst:
    """Text in front of the image, both projected alike."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        x = attn.to_out(attend(attn.to_q(x), attn.to_k(x), attn.to_v(x)))
        n = encoder_hidden_states.shape[1]
        return x[:, n:], x[:, :n]


class TextLast:
    """The image, four registers, the text, in one packed sequence."""

    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        return attn.to_out(attend(*(p(hidden_states) for p in (attn.to_q, attn.to_k, attn.to_v))))


class Read:
    """Cross-attention whose arguments and projections have other names than diffusers'."""

    def __call__(self, attn: Any, x: Tensor, context: Tensor) -> Tensor:
        return attn.out(attend(attn.query(x), attn.key(context), attn.value(context)))


class Look:
    """Self-attention of the same kind."""

    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        return attn.out(attend(attn.query(x), attn.key(x), attn.value(x)))


class LookThenRead:
    """Self-attention, then attention to the text, in one module."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        x = x + attend(attn.to_q(x), attn.to_k(x), attn.to_v(x))
        return attn.to_out(attend(attn.to_q(x), attn.to_k(text), attn.to_v(text)))


class ReadThenLook:
    """The same in the other order."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        x = x + attend(attn.to_q(x), attn.to_k(text), attn.to_v(text))
        return attn.to_out(attend(attn.to_q(x), attn.to_k(x), attn.to_v(x)))


class Attn(nn.Module):
    """An attention module with a processor, and projections by any name."""

    def __init__(self, processor: Any, *names: str) -> None:
        super().__init__()
        self.heads, self.processor = HEADS, processor
        for name in names:
            setattr(self, name, nn.Linear(DIM, DIM))

    def set_processor(self, processor: Any) -> None:
        """Put another processor in."""
        self.processor = processor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend."""
        return self.processor(self, *args, **kwargs)


OWN = ("to_q", "to_k", "to_v", "to_out")
OTHER = ("query", "key", "value", "out")
SHORT = ("wq", "wk", "wv", "wo")


class Short:
    """Self-attention by projections whose names tell nothing."""

    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        return attn.wo(attend(attn.wq(x), attn.wk(x), attn.wv(x)))


class Block(nn.Module):
    """One block of a make."""

    def __init__(self, make: str) -> None:
        super().__init__()
        self.make = make
        if make in ("text_first", "registers"):
            self.attn = Attn(TextFirst() if make == "text_first" else TextLast(), *OWN)
        elif make == "names":
            self.look, self.read = Attn(Look(), *OTHER), Attn(Read(), *OTHER)
        elif make == "short":
            self.mix, self.read = Attn(Short(), *SHORT), Attn(Read(), *OTHER)
        elif make in ("look_read", "read_look"):
            self.attn = Attn(LookThenRead() if make == "look_read" else ReadThenLook(), *OWN)
        else:
            self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor, text: Tensor, registers: Tensor) -> tuple[Tensor, Tensor]:
        """Run the block."""
        if self.make == "text_first":
            dx, dt = self.attn(x, text)
            return x + dx, text + dt
        if self.make == "registers":
            n = x.shape[1]
            whole = self.attn(torch.cat([x, registers.expand(x.shape[0], -1, -1), text], 1))
            return x + whole[:, :n], text + whole[:, -TEXT:]
        if self.make == "names":
            x = x + self.look(x)
            return x + self.read(x, context=text), text
        if self.make == "short":
            x = x + self.mix(x)
            return x + self.read(x, context=text), text
        if self.make in ("look_read", "read_look"):
            return x + self.attn(x, text), text
        return x + attend(*self.qkv(x).chunk(3, -1)), text


class Invented(ModelMixin, ConfigMixin):
    """A denoiser of tomorrow."""

    @register_to_config
    def __init__(self, make: str = "text_first", in_channels: int = 4, patch_size: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, DIM, patch_size, patch_size)
        self.registers = nn.Parameter(torch.randn(1, 4, DIM))
        self.blocks = nn.ModuleList(Block(make) for _ in range(3))
        self.out = nn.Linear(DIM, in_channels * patch_size**2)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Any = None) -> Tensor:
        """Predict [B, C, H, W]."""
        b, _, h, w = hidden_states.shape
        x, text = self.embed(hidden_states).flatten(2).transpose(1, 2), encoder_hidden_states
        for block in self.blocks:
            x, text = block(x, text, self.registers)
        x = self.out(x).unflatten(1, (h // 2, w // 2)).unflatten(-1, (4, 2, 2))
        return x.permute(0, 3, 1, 4, 2, 5).reshape(b, 4, h, w)


def invented(make: str) -> tuple[Invented, dict[str, Tensor]]:
    """Build one, and the inputs of a call."""
    torch.manual_seed(0)
    model = Invented(make).eval()
    inputs = {"hidden_states": torch.randn(2, 4, 12, 8), "encoder_hidden_states": torch.randn(2, TEXT, DIM)}
    return model, inputs | {"timestep": torch.full((2,), 500.0)}


CONTROLS = {
    "pag": PAG(scale=2.0, sites="*"),
    "pag_self": PAG(scale=2.0, sites="self"),
    "pag_joint": PAG(scale=2.0, sites="joint", scope="all"),
    "soft": SoftPAG(scale=2.0, sites="self"),
    "seg": SEG(scale=2.0, sites="self"),
    "capture": Capture(words=(1, 3)),
    "capture_cross": Capture(words=(1, 3), sites="cross"),
    "nag": NAG(negative_embeds={"encoder_hidden_states": torch.ones(1, TEXT, DIM)}),
}
MAKES = ("text_first", "registers", "names", "short", "look_read", "read_look", "raw")


def outcome(make: str, control: Any) -> tuple[str, str]:
    """Run one control on one make: what came of it, and what was said."""
    model, inputs = invented(make)
    plain = model(**inputs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with attnctl.control(model, control, layout="cond") as handle:
                handle.set_step(1, 3, 500.0)
                out = model(**inputs)
                if isinstance(control, Capture):
                    return "recorded", f"{[tuple(m.shape) for m in handle.result(control).values()]}"
        except AttnctlError as error:
            return "refused", f"{type(error).__name__}: {error}"
    words = [str(w.message) for w in said if str(w.message).startswith("attnctl")]
    return ("acts" if not torch.equal(out, plain) else "nothing"), " ".join(words)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("make", MAKES)
def test_nothing_is_silent(make: str, name: str) -> None:
    state, words = outcome(make, CONTROLS[name])
    assert state != "nothing" or words, (make, name)
    if make in ("text_first", "registers") and name in ("pag", "pag_self", "seg"):
        assert state == "refused"
        assert "text tokens" in words or "told apart" in words
    if name.startswith("capture") or name == "nag":
        assert state == "refused"
        assert "--probe" in words or "no attention module" in words


def by_hand(model: Invented, inputs: dict[str, Tensor], patched: Any) -> Tensor:
    """Perturb by another processor's class at every block."""
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        patched(block)
    plain = model(**inputs)
    return plain + 2.0 * (plain - twin(**inputs))


class Identity(Look):
    """Self-attention where every token attends to itself."""

    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        return attn.out(attn.value(x))


class IdentityThenRead(LookThenRead):
    """The same, then attention to the text."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        x = x + attn.to_v(x)
        return attn.to_out(attend(attn.to_q(x), attn.to_k(text), attn.to_v(text)))


class ReadThenIdentity(ReadThenLook):
    """The same in the other order."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        x = x + attend(attn.to_q(x), attn.to_k(text), attn.to_v(text))
        return attn.to_out(attn.to_v(x))


@pytest.mark.parametrize(
    ("make", "at", "processor"),
    [("names", "look", Identity), ("look_read", "attn", IdentityThenRead), ("read_look", "attn", ReadThenIdentity)],
)
@pytest.mark.filterwarnings("ignore:attnctl")
def test_what_the_counts_decide_is_guided_by_the_definition(make: str, at: str, processor: Any) -> None:
    model, inputs = invented(make)
    wanted = by_hand(model, inputs, lambda block: getattr(block, at).set_processor(processor()))
    with attnctl.control(model, PAG(scale=2.0, sites="self"), layout="cond"):
        for _ in range(2):  # what the first call has shown stays
            assert distance(model(**inputs), wanted) < 1e-5
    assert distance(model(**inputs), wanted) > 1e-3


def test_attention_to_text_in_the_same_module_is_left_alone() -> None:
    model, inputs = invented("look_read")
    seen: list[tuple[str, int, int]] = []

    @dataclass(frozen=True, kw_only=True)
    class Watch(Control):
        sites: Any = "self"
        kinds = ("self",)

        def wrapper(self, sites: Any) -> Any:
            def watch(call: Any, proceed: Any) -> Tensor:
                seen.append((call.site.kind, call.q.shape[-2], call.k.shape[-2]))
                return proceed(call)

            return watch

    with pytest.warns(UserWarning, match="computes cross attention"), attnctl.control(model, Watch(), layout="cond"):
        model(**inputs)
    assert seen == [("self", IMAGE, IMAGE)] * 3
