"""timm models with controlled attention, and attention modules to reuse.

Importing this package registers the names with timm:

    import timm, attnctl.backbones
    model = timm.create_model("biformer_tiny", num_classes=10)
"""

from attnctl.backbones.agent import AgentAttention2d
from attnctl.backbones.agent_cswin import AgentCSwin
from attnctl.backbones.agent_deit import AgentVisionTransformer
from attnctl.backbones.agent_pvt import AgentPVT
from attnctl.backbones.agent_swin import AgentSwinTransformer
from attnctl.backbones.biformer import BiFormer
from attnctl.backbones.multiaxis import MultiAxisAttention, any_size
from attnctl.backbones.plain import MapAttention
from attnctl.backbones.routing import BiLevelRoutingAttention

__all__ = [
    "AgentAttention2d",
    "AgentCSwin",
    "AgentPVT",
    "AgentSwinTransformer",
    "AgentVisionTransformer",
    "BiFormer",
    "BiLevelRoutingAttention",
    "MapAttention",
    "MultiAxisAttention",
    "any_size",
]
