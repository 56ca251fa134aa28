"""Networks by name, in stages, and their costs."""

from kdlib.models.cost import Cost, count_cost
from kdlib.models.names import build_model
from kdlib.models.staged import Staged, load_weights
