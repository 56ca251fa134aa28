"""kdlib: the kernels and the bookkeeping under an executable book on knowledge distillation."""

from kdlib import losses
from kdlib.chains.found import FoundStudent
from kdlib.chains.greedy import GreedySearch
from kdlib.data import load_data
from kdlib.engine import train
from kdlib.errors import KdlibError
from kdlib.methods import (
    FSP,
    KD,
    KDGAN,
    KR,
    NST,
    STC,
    AttentionTransfer,
    CrossEntropy,
    FactorTransfer,
    GateSearch,
    Hint,
    MutualLearning,
    OneStage,
    RocketLaunching,
    multi_stage,
    paraphrase,
)
from kdlib.models import build_model, count_cost
from kdlib.runs import Recipe, Run
from kdlib.store import Trained, measure

__version__ = "0.1.0"
__all__ = [
    "FSP",
    "KD",
    "KDGAN",
    "KR",
    "NST",
    "STC",
    "AttentionTransfer",
    "CrossEntropy",
    "FactorTransfer",
    "FoundStudent",
    "GateSearch",
    "GreedySearch",
    "Hint",
    "KdlibError",
    "MutualLearning",
    "OneStage",
    "Recipe",
    "RocketLaunching",
    "Run",
    "Trained",
    "build_model",
    "count_cost",
    "load_data",
    "losses",
    "measure",
    "multi_stage",
    "paraphrase",
    "train",
]
