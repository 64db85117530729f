"""One control a method: what each paper changes in a model's attention; and what a control of your own is made of."""

from attnctl.core.call import AttnCall, Proceed, Wrapper
from attnctl.core.control import Control, Guidance
from attnctl.core.guidance import Branch
from attnctl.processors.agent import AgentAttention
from attnctl.processors.broadway.broadway import BroadWay
from attnctl.processors.capture.capture import Capture
from attnctl.processors.editing.fatezero import FateZero
from attnctl.processors.editing.prompt_to_prompt import PromptToPrompt
from attnctl.processors.enhance_video import EnhanceAVideo
from attnctl.processors.latent.astar import AStar
from attnctl.processors.latent.attend_excite import AttendExcite
from attnctl.processors.latent.guidance import LatentGuidance
from attnctl.processors.nag import NAG
from attnctl.processors.pag import PAG, SoftPAG
from attnctl.processors.paro import PARO
from attnctl.processors.seg import SEG
from attnctl.processors.slg import SLG
from attnctl.processors.tpg import TPG

__all__ = [
    "NAG",
    "PAG",
    "PARO",
    "SEG",
    "SLG",
    "TPG",
    "AStar",
    "AgentAttention",
    "AttendExcite",
    "AttnCall",
    "Branch",
    "BroadWay",
    "Capture",
    "Control",
    "EnhanceAVideo",
    "FateZero",
    "Guidance",
    "LatentGuidance",
    "Proceed",
    "PromptToPrompt",
    "SoftPAG",
    "Wrapper",
]
