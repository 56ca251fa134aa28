"""The training engine: plans, cached logits of teachers, trainers."""

from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.train import train
