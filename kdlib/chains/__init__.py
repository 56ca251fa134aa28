"""Chains of runs: each run is known only when the one before it is trained."""

from kdlib.chains.calibration import Calibration, OnDistorted
from kdlib.chains.found import AlphaStudent, FoundStudent, RandomStudent
from kdlib.chains.greedy import GreedySearch
from kdlib.chains.tuned import Tuned
