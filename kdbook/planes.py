"""The ways of several runs through the space of weights, and the loss around them."""

import copy
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbook.rco import CHUNK, last_model
from kdlib.chains.divergence import logits_of, training_images
from kdlib.data import Images, load_data
from kdlib.engine.plan import mix
from kdlib.models import build_model
from kdlib.store import Trained


def trajectories(*several: Trained, every: int = 1) -> pd.DataFrame:
    """The weights of several runs along their training, on the two axes of their largest variance.

    The runs have one network and one seed. Weights are those of convolutions and linear layers,
    without biases and batch norm (Li et al. 2018).

    Columns: run (0, 1, …), epoch (0 is the common start, at the origin), pc1, pc2 (principal
    components of the epochs of all runs), share1, share2 (the share of the variance on each axis).

    Args:
        every: read every so-manieth epoch, and the last. These epochs must have been kept.
    """
    plane = _plane(several, every)
    epochs = [_read_epochs(trained, every) for trained in several]
    return pd.DataFrame(
        {
            "run": np.repeat(range(len(several)), [len(e) for e in epochs]),
            "epoch": np.concatenate(epochs),
            "pc1": plane.places[:, 0],
            "pc2": plane.places[:, 1],
            "share1": plane.shares[0],
            "share2": plane.shares[1],
        }
    )


@torch.no_grad()
def landscape(
    *several: Trained, every: int = 1, points: int = 15, count: int | None = None
) -> pd.DataFrame:
    """The cross-entropy on a grid of the plane of ``trajectories``, over training and test images.

    Biases and the factors and shifts of batch norm are not part of the plane: they are the means of
    the runs' last epochs. The statistics of batch norm are computed anew at every point, from the
    training images. No image is augmented.

    Columns: pc1, pc2, train, test.

    Args:
        points: of the grid on each axis; it reaches a fifth beyond the trajectories.
        count: use so many images of each split; None for all.
    """
    plane, run = _plane(several, every), several[0].run
    ends = [trained.model() for trained in several]
    model = copy.deepcopy(ends[0])
    for own, *others in zip(*(m.parameters() for m in [model, *ends]), strict=True):
        own.copy_(torch.stack(others).mean(0))
    learned = training_images(run)
    images = {
        "train": learned.first(count),
        "test": load_data(run.dataset, "test", learned.device).first(count),
    }
    model.to(learned.device)
    axes = []
    for axis in range(2):
        low, high = plane.places[:, axis].min(), plane.places[:, axis].max()
        beyond = 0.2 * (high - low)
        axes.append(np.linspace(low - beyond, high + beyond, points))
    rows = []
    for x, y in itertools.product(*axes):
        _set_weights(model, plane.weights(x, y))
        _renew_statistics(model, images["train"])
        losses_here = [
            F.cross_entropy(logits_of(model, some), some.labels.cpu()).item()
            for some in images.values()
        ]
        rows.append((x, y, *losses_here))
    return pd.DataFrame(rows, columns=["pc1", "pc2", *images])


def displacement_cosines(*several: Trained, epoch: int) -> pd.DataFrame:
    """Cosines between the displacements of several runs from their common start.

    A displacement is the weights after ``epoch`` minus the weights at the start; weights as in
    ``trajectories``. Columns: first, second (numbers of the runs), cosine.
    """
    rows = []
    start = _common_start(several)
    moved = torch.stack([_weights(t.model(epoch)) - start for t in several])
    cosines = F.normalize(moved.double()) @ F.normalize(moved.double()).T
    for i in range(len(several)):
        rows += [(i, j, cosines[i, j].item()) for j in range(i + 1, len(several))]
    return pd.DataFrame(rows, columns=["first", "second", "cosine"])


class _Plane(NamedTuple):
    """The plane of two principal components of several runs' weights.

    Attributes:
        places: ``[rows, 2]``, the components of every epoch read, minus those of the start.
        shares: the share of the variance on each axis.
        origin: weights at the point of the plane that is nearest to the start.
        axes: ``[2, weights]``, orthonormal.
    """

    places: np.ndarray
    shares: np.ndarray
    origin: Tensor
    axes: Tensor

    def weights(self, pc1: float, pc2: float) -> Tensor:
        return self.origin + float(pc1) * self.axes[0] + float(pc2) * self.axes[1]


def _plane(several: tuple[Trained, ...], every: int) -> _Plane:
    from sklearn.decomposition import KernelPCA  # half a second, for one figure of the book

    # The Gram matrix gives the components without a second copy of all weights in memory.
    start = _common_start(several)
    moved = _moved(several, start, every)
    gram = sum(block @ block.T for block in _blocks(moved)).numpy()
    pca = KernelPCA(n_components=2, kernel="precomputed", eigen_solver="dense")
    places = pca.fit_transform(gram)
    centred = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    # The sign of an axis is arbitrary: let the last run end at the right and at the top.
    sign = np.where((places - places[0])[-1] < 0, -1, 1)
    weight = torch.tensor(pca.eigenvectors_ / np.sqrt(pca.eigenvalues_) * sign)
    axes = torch.cat([(weight.T @ block).float() for block in _blocks(moved)], dim=1)
    at_start = torch.tensor(places[0] * sign, dtype=torch.float32)
    origin = start + moved.mean(0) + at_start @ axes
    return _Plane((places - places[0]) * sign, pca.eigenvalues_ / np.trace(centred), origin, axes)


def _blocks(moved: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in moved.split(2**14, dim=1))


def _read_epochs(trained: Trained, every: int) -> list[int]:
    last = trained.run.recipe.epochs
    return sorted({0, *range(every, last + 1, every), last})


def _moved(several: tuple[Trained, ...], start: Tensor, every: int) -> Tensor:
    """The displacements of all epochs from the common start, one row each."""
    read = [(trained, epoch) for trained in several for epoch in _read_epochs(trained, every)]
    moved = torch.zeros(len(read), len(start))
    for row, (trained, epoch) in enumerate(read):
        if epoch:
            moved[row] = _weights(trained.model(epoch)) - start
    return moved


def _set_weights(model: nn.Module, vector: Tensor) -> None:
    """The reverse of ``_weights``."""
    parameters = [p for p in model.parameters() if p.ndim > 1]
    parts = vector.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def _renew_statistics(model: nn.Module, images: Images) -> None:
    """Batch norms get the mean statistics of these images, in batches of ``CHUNK``."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.train()
    for batch, index in enumerate(torch.arange(len(images), device=images.device).split(CHUNK)):
        for norm in norms:
            norm.momentum = 1 / (batch + 1)  # a mean over the batches; the first replaces all
        model(images.batch(index))
    model.eval()


def _common_start(several: tuple[Trained, ...]) -> Tensor:
    """The weights that all these runs start from."""
    run = several[0].run
    if len({(t.run.dataset, t.run.model, t.run.seed, t.run.start) for t in several}) > 1:
        raise ValueError(
            "These runs do not share their data, network, seed and start. Compare runs that do."
        )
    if run.start:
        return _weights(last_model(run.start))
    images = load_data(run.dataset, "test")
    return _weights(
        build_model(run.model, images.classes, images.channels, seed=mix("weights", run.seed))
    )


def _weights(model: nn.Module) -> Tensor:
    """The weights of convolutions and linear layers as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
