"""What compilers make of the block-sparse kernel for cards that this machine need not have."""

from __future__ import annotations

import pretend_card
import pytest
import torch

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.compile,
    pytest.mark.skipif(bool(pretend_card.missing()), reason=pretend_card.missing() or "-"),
]


@pytest.mark.parametrize("width", [40, 64, 72, 96, 128])
@pytest.mark.parametrize("arch", pretend_card.ARCHITECTURES)
def test_no_spills_and_wide_loads(arch: int, width: int) -> None:
    code = pretend_card.block_sparse_code(arch, width)
    assert code.spilled == 0, code
    assert code.narrow_loads == 0, code
    assert code.programs >= 2, code


@pytest.mark.parametrize(("width", "most"), [(64, 330), (128, 410)])
def test_the_main_loop_is_short_on_hopper(width: int, most: int) -> None:
    """Loops over image tiles and over text tiles multiply; the longer of the two, which finds its rows, is the main."""
    code = pretend_card.block_sparse_code(90, width)
    assert len(code.loops) >= 2
    assert max(code.loops[:2]) <= most, (code.loops, code)


@pytest.mark.parametrize("arch", [80, 90])
def test_other_forms_do_not_spill(arch: int) -> None:
    for options in ({"block_q": 128, "block_k": 128}, {"int8": True}, {"ordered": False, "dtype": torch.float16}):
        code = pretend_card.block_sparse_code(arch, 128, **options)  # type: ignore[arg-type]
        assert code.spilled == 0, (options, code)
