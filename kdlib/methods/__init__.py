"""How a student learns: one file per idea."""

from kdlib.methods.distill import KD, CrossEntropy, FromTeacher, Method, Step
from kdlib.methods.hints import Hint
from kdlib.methods.peers import MutualLearning, RocketLaunching
from kdlib.methods.route import OneStage, multi_stage

__all__ = [
    "KD",
    "CrossEntropy",
    "FromTeacher",
    "Hint",
    "Method",
    "MutualLearning",
    "OneStage",
    "RocketLaunching",
    "Step",
    "multi_stage",
]
