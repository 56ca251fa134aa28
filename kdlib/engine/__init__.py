"""The training engine: plans, label banks, lanes."""

from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.plan import plan
from kdlib.engine.train import train

__all__ = ["LogitCache", "plan", "train"]
