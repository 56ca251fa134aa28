"""The training engine: plans, label banks, lanes."""

from kdlib.engine.bank import LabelBank
from kdlib.engine.plan import plan
from kdlib.engine.train import train

__all__ = ["LabelBank", "plan", "train"]
