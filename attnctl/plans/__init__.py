"""What was found out about a model, as data: head selections and block plans, saved without pickles."""

from attnctl.plans.blocks import BlockPlan
from attnctl.plans.heads import HeadSet
from attnctl.plans.model import ModelPlan

__all__ = ["BlockPlan", "HeadSet", "ModelPlan"]
