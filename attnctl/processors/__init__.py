"""One control a method: what each paper changes in a model's attention."""

from attnctl.processors.base import Control, Guidance
from attnctl.processors.pag import PAG, SoftPAG

__all__ = ["PAG", "Control", "Guidance", "SoftPAG"]
