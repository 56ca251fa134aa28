"""How a student learns: one file per idea."""

from kdlib.methods.collaboration import STC
from kdlib.methods.distill import KD, CrossEntropy, FromTeacher, Method, OnLogits, Step
from kdlib.methods.gates import GateSearch
from kdlib.methods.hints import AttentionTransfer, FactorTransfer, Hint, Paraphrase, paraphrase
from kdlib.methods.peers import MutualLearning, RocketLaunching
from kdlib.methods.route import OneStage, multi_stage

__all__ = [
    "KD",
    "STC",
    "AttentionTransfer",
    "CrossEntropy",
    "FactorTransfer",
    "FromTeacher",
    "GateSearch",
    "Hint",
    "Method",
    "MutualLearning",
    "OnLogits",
    "OneStage",
    "Paraphrase",
    "RocketLaunching",
    "Step",
    "multi_stage",
    "paraphrase",
]
