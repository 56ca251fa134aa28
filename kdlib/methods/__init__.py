"""How a student learns: one file per idea."""

from kdlib.methods.aggregating import AggregateKR
from kdlib.methods.collaboration import STC, FreshBack
from kdlib.methods.distill import KD, FromTeacher, OnLogits, Wrapper
from kdlib.methods.gates import GateSearch
from kdlib.methods.hints import (
    FSP,
    NST,
    AttentionTransfer,
    FactorTransfer,
    Hint,
    Paraphrase,
    paraphrase,
)
from kdlib.methods.peers import KDGAN, MutualLearning, RocketLaunching
from kdlib.methods.penalties import Penalised
from kdlib.methods.representing import KR
from kdlib.methods.route import OneStage, multi_stage
from kdlib.runs import CrossEntropy, Method, Step
