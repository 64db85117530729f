"""One control a method: what each paper changes in a model's attention."""

from attnctl.processors.base import Control, Guidance
from attnctl.processors.blocks import SLG, TPG
from attnctl.processors.nag import NAG
from attnctl.processors.pag import PAG, SoftPAG
from attnctl.processors.seg import SEG

__all__ = ["NAG", "PAG", "SEG", "SLG", "TPG", "Control", "Guidance", "SoftPAG"]
