"""One control a method: what each paper changes in a model's attention; and what a control of your own is made of.

Names are looked up on first use, so that one method does not import all others.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

from attnctl.core.registry import HOMES

if TYPE_CHECKING:
    from attnctl.core.call import AttnCall as AttnCall
    from attnctl.core.call import Proceed as Proceed
    from attnctl.core.call import Wrapper as Wrapper
    from attnctl.core.control import Control as Control
    from attnctl.core.control import Guidance as Guidance
    from attnctl.core.guidance import Branch as Branch
    from attnctl.processors.agent import AgentAttention as AgentAttention
    from attnctl.processors.auto_guidance import AutoGuidance as AutoGuidance
    from attnctl.processors.broadway.broadway import BroadWay as BroadWay
    from attnctl.processors.capture.capture import Capture as Capture
    from attnctl.processors.combining.apg import APG as APG
    from attnctl.processors.combining.cfg_plus_plus import CFGPlusPlus as CFGPlusPlus
    from attnctl.processors.combining.fdg import FDG as FDG
    from attnctl.processors.combining.interval import GuidanceInterval as GuidanceInterval
    from attnctl.processors.combining.mag import MaG as MaG
    from attnctl.processors.combining.rescale import Rescale as Rescale
    from attnctl.processors.combining.tcfg import TCFG as TCFG
    from attnctl.processors.combining.zero_star import CFGZeroStar as CFGZeroStar
    from attnctl.processors.editing.fatezero import FateZero as FateZero
    from attnctl.processors.editing.flow_edit import FlowEdit as FlowEdit
    from attnctl.processors.editing.inject import Inject as Inject
    from attnctl.processors.editing.prompt_to_prompt import PromptToPrompt as PromptToPrompt
    from attnctl.processors.enhance_video import EnhanceAVideo as EnhanceAVideo
    from attnctl.processors.latent.astar import AStar as AStar
    from attnctl.processors.latent.attend_excite import AttendExcite as AttendExcite
    from attnctl.processors.latent.guidance import LatentGuidance as LatentGuidance
    from attnctl.processors.latent.textcengen import TextCenGen as TextCenGen
    from attnctl.processors.nag import NAG as NAG
    from attnctl.processors.pag import PAG as PAG
    from attnctl.processors.pag import SoftPAG as SoftPAG
    from attnctl.processors.paro import PARO as PARO
    from attnctl.processors.regions.regions import Regions as Regions
    from attnctl.processors.regions.textcengen_maps import TextCenGenMaps as TextCenGenMaps
    from attnctl.processors.seg import SEG as SEG
    from attnctl.processors.sharing.bank import IdentityBank as IdentityBank
    from attnctl.processors.sharing.consistent import Consistent as Consistent
    from attnctl.processors.sharing.ir_diffusion import IRDiffusion as IRDiffusion
    from attnctl.processors.sharing.masactrl import MasaCtrl as MasaCtrl
    from attnctl.processors.sharing.reference_only import ReferenceOnly as ReferenceOnly
    from attnctl.processors.sharing.share_attention import ShareAttention as ShareAttention
    from attnctl.processors.sharing.style_aligned import StyleAligned as StyleAligned
    from attnctl.processors.slg import SLG as SLG
    from attnctl.processors.sparse.attention import SparseAttention as SparseAttention
    from attnctl.processors.tpg import TPG as TPG

# The imports above are the table of names: each is read as one name and its module.
_IMPORTS = re.findall(r"^    from (\S+) import (\w+) as \2$", inspect.getsource(sys.modules[__name__]), re.MULTILINE)
_HOMES: dict[str, str] = {name: module for module, name in _IMPORTS}
HOMES.update({name: module for name, module in _HOMES.items() if module.startswith(f"{__name__}.")})

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
