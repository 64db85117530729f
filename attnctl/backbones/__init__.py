"""timm models with controlled attention, and attention modules to reuse.

Importing this package registers the names with timm:

    import timm, attnctl.backbones
    model = timm.create_model("biformer_tiny", num_classes=10)
"""

from attnctl.backbones.models.agent_cswin import AgentCSwin
from attnctl.backbones.models.agent_deit import AgentVisionTransformer
from attnctl.backbones.models.agent_pvt import AgentPVT
from attnctl.backbones.models.agent_swin import AgentSwinTransformer
from attnctl.backbones.models.biformer import BiFormer
from attnctl.backbones.models.crossformer import CrossFormer
from attnctl.backbones.models.emov2 import EMOv2
from attnctl.backbones.models.inline import InLineCSwin, InLinePVT, InLineSwinTransformer, InLineVisionTransformer
from attnctl.backbones.models.l2vit import L2ViT
from attnctl.backbones.models.moat import MOAT
from attnctl.backbones.models.moh_transnext import MoHTransNeXt
from attnctl.backbones.models.nat import NAT
from attnctl.backbones.models.nat_relatives import DiNATs, NATIsotropic
from attnctl.backbones.models.ravlt import RAVLT
from attnctl.backbones.models.soft import SOFT
from attnctl.backbones.models.spectformer import SpectFormer, SpectralVisionTransformer
from attnctl.backbones.modules.agent import AgentAttention2d
from attnctl.backbones.modules.multiaxis import MultiAxisAttention, any_size
from attnctl.backbones.modules.plain import MapAttention
from attnctl.backbones.modules.routing import BiLevelRoutingAttention

__all__ = [
    "MOAT",
    "NAT",
    "RAVLT",
    "SOFT",
    "AgentAttention2d",
    "AgentCSwin",
    "AgentPVT",
    "AgentSwinTransformer",
    "AgentVisionTransformer",
    "BiFormer",
    "BiLevelRoutingAttention",
    "CrossFormer",
    "DiNATs",
    "EMOv2",
    "InLineCSwin",
    "InLinePVT",
    "InLineSwinTransformer",
    "InLineVisionTransformer",
    "L2ViT",
    "MapAttention",
    "MoHTransNeXt",
    "MultiAxisAttention",
    "NATIsotropic",
    "SpectFormer",
    "SpectralVisionTransformer",
    "any_size",
]
