"""What penalties leave behind, for ``measure``: curves of a loss, kernels, how sparse they are."""

import pandas as pd
import torch
from torch import Tensor

from kdlib import store
from kdlib.methods.penalties import Penalised
from kdlib.store import Trained

# A weight this much smaller than the largest of its layer counts as none.
NEGLIGIBLE = 0.01


def training_curve(trained: Trained) -> pd.DataFrame:
    """The label term along a run of ``Penalised``: columns iteration, ce.

    ``ce`` is the mean over the iterations up to this one and after the row before; rows are whole
    bins alone.
    """
    if not isinstance(trained.run.method, Penalised):
        raise ValueError(f"{trained.run} keeps no curve: give it Penalised().")
    run, last = trained.run, trained.run.recipe.epochs
    state = store.load_networks(run, last, trained.summary["weights"][str(last)])
    every, sums = run.method.every, state["curve.sums"][:-1]
    bins = min(len(sums), int(state["curve.steps"]) // every)
    iterations = range(every, every * bins + 1, every)
    return pd.DataFrame({"iteration": iterations, "ce": (sums[:bins] / every).tolist()})


def kernel_sparsity(trained: Trained) -> pd.DataFrame:
    """Of each convolution: columns layer, weights, negligible, hoyer.

    Negligible weights are below a hundredth of the largest magnitude in their layer. Hoyer's
    measure (2004) needs no such border: (√n - ‖w‖₁/‖w‖₂) / (√n - 1), from 0 where all weights are
    of one size to 1 where one alone is left.
    """
    rows = []
    for name, kernels in _kernels(trained).items():
        size = kernels.abs().flatten().double()
        root = len(size) ** 0.5
        hoyer = (root - (size.sum() / size.norm()).item()) / (root - 1)
        small = int((size < NEGLIGIBLE * size.max()).sum())
        rows.append((name, len(size), small, round(hoyer, 6)))
    return pd.DataFrame(rows, columns=["layer", "weights", "negligible", "hoyer"])


def kernels(trained: Trained, layer: int) -> pd.DataFrame:
    """Weights of one convolution, counted from 0: columns output, input, row, column, weight."""
    weights = [*_kernels(trained).values()][layer]
    table = pd.DataFrame(torch.cartesian_prod(*map(torch.arange, weights.shape)).tolist())
    table.columns = ["output", "input", "row", "column"]
    return table.assign(weight=[round(w, 5) for w in weights.flatten().tolist()])


def _kernels(trained: Trained) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in trained.model().named_parameters() if p.ndim == 4}
