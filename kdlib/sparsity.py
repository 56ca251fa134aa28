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
    every, state = trained.run.method.every, _networks(trained)
    sums = state["curve.sums"][:-1]
    bins = min(len(sums), int(state["curve.steps"]) // every)
    iterations = range(every, every * bins + 1, every)
    return pd.DataFrame({"iteration": iterations, "ce": (sums[:bins] / every).tolist()})


def kernel_sparsity(trained: Trained) -> pd.DataFrame:
    """Of each convolution: columns layer, weights, negligible.

    Negligible weights are below a hundredth of the largest magnitude in their layer.
    """
    rows = []
    for name, kernels in _kernels(trained).items():
        small = kernels.abs() < NEGLIGIBLE * kernels.abs().max()
        rows.append((name, kernels.numel(), int(small.sum())))
    return pd.DataFrame(rows, columns=["layer", "weights", "negligible"])


def kernels(trained: Trained, layer: int) -> pd.DataFrame:
    """Weights of one convolution, counted from 0: columns output, input, row, column, weight."""
    weights = [*_kernels(trained).values()][layer]
    table = pd.DataFrame(torch.cartesian_prod(*map(torch.arange, weights.shape)).tolist())
    table.columns = ["output", "input", "row", "column"]
    return table.assign(weight=[round(w, 5) for w in weights.flatten().tolist()])


def _networks(trained: Trained) -> dict[str, Tensor]:
    run, last = trained.run, trained.run.recipe.epochs
    if not isinstance(run.method, Penalised):
        raise ValueError(f"{run} keeps no curve: give it Penalised().")
    return store.load_networks(run, last, trained.closing["weights"][str(last)])


def _kernels(trained: Trained) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in trained.model().named_parameters() if p.ndim == 4}
