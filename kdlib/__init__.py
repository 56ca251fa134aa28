"""kdlib: training code for knowledge distillation, and the records of its runs."""

from kdlib import chains, data, engine, losses, methods, models, store
from kdlib.chains import (
    AlphaStudent,
    Calibration,
    FoundStudent,
    GreedySearch,
    OnDistorted,
    RandomStudent,
    Tuned,
)
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
    AggregateKR,
    AttentionTransfer,
    FactorTransfer,
    FreshBack,
    GateSearch,
    Hint,
    MutualLearning,
    OneStage,
    Penalised,
    RocketLaunching,
    multi_stage,
    paraphrase,
)
from kdlib.models import build_model, count_cost
from kdlib.runs import Checkpoint, CrossEntropy, Method, Recipe, Run
from kdlib.store import Trained, measure

__version__ = "0.1.0"
