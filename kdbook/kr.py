"""Knowledge Representing (KR): the tables that its exhibits measure."""

import pandas as pd
import torch
from torch import Tensor

from kdlib.store import Trained

# A weight is negligible if it is smaller than this share of the largest weight of its layer.
NEGLIGIBLE = 0.01


def training_curve(trained: Trained) -> pd.DataFrame:
    """The loss without penalty along a run of ``Penalised``: columns iteration, and ce or base.

    It is the mean over the iterations after the previous row, up to ``iteration``.
    """
    if "curve" not in trained.summary:
        raise ValueError(f"The record of {trained.run} has no curve. Train with Penalised().")
    curve = trained.summary["curve"]
    every = curve["every"]
    ((term, means),) = ((name, values) for name, values in curve.items() if name != "every")
    return pd.DataFrame({"iteration": range(every, every * len(means) + 1, every), term: means})


def kernel_sparsity(trained: Trained) -> pd.DataFrame:
    """The sparsity of each convolution: columns layer, weights, negligible, hoyer.

    A negligible weight is below a hundredth of the largest magnitude of its layer. Hoyer's measure
    (2004) needs no threshold: (√n - ‖w‖₁/‖w‖₂) / (√n - 1). It is 0 if all weights have one size,
    and 1 if only one weight is not zero.
    """
    rows = []
    for name, weights in _kernels(trained).items():
        size = weights.abs().flatten().double()
        root = len(size) ** 0.5
        hoyer = (root - (size.sum() / size.norm()).item()) / (root - 1)
        small = int((size < NEGLIGIBLE * size.max()).sum())
        rows.append((name, len(size), small, round(hoyer, 6)))
    return pd.DataFrame(rows, columns=["layer", "weights", "negligible", "hoyer"])


def kernels(trained: Trained, layer: int) -> pd.DataFrame:
    """The weights of one convolution: columns output, input, row, column, weight.

    Args:
        layer: number of the convolution, from 0.
    """
    weights = [*_kernels(trained).values()][layer]
    table = pd.DataFrame(torch.cartesian_prod(*map(torch.arange, weights.shape)).tolist())
    table.columns = ["output", "input", "row", "column"]
    return table.assign(weight=[round(w, 5) for w in weights.flatten().tolist()])


def _kernels(trained: Trained) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in trained.model().named_parameters() if p.ndim == 4}
