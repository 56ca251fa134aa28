"""Route Constrained Optimization (RCO): the tables that its exhibits measure."""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses, store
from kdlib.chains.divergence import logits_of, teacher_of, training_images
from kdlib.data import Images, load_data
from kdlib.engine.device import pick_device
from kdlib.engine.plan import mix
from kdlib.models import build_model
from kdlib.runs import Run
from kdlib.store import Trained

CHUNK = 500  # images in one forward pass


def training_losses(trained: Trained, temperature: float = 5.0) -> pd.DataFrame:
    """The losses over all training images in eval mode: columns ``ce`` and, with a teacher, ``kd``.

    ``kd`` is τ²·KL to the teacher's last epoch, also for a student of earlier checkpoints.
    """
    images = training_images(trained.run)
    logits = logits_of(trained.model(), images)
    row = {"ce": F.cross_entropy(logits, images.labels.cpu()).item()}
    if teacher := teacher_of(trained.run):
        teacher_logits = logits_of(_last_model(teacher), images)
        row["kd"] = losses.kd(logits, teacher_logits, temperature).item()
    return pd.DataFrame([row])


def trajectories(*several: Trained) -> pd.DataFrame:
    """The weights of several runs after every epoch, on the two axes of their largest variance.

    The runs have one network and one seed. All their epochs must have been kept. Weights are those
    of convolutions and linear layers, without biases and batch norm (Li et al. 2018).

    Columns: run (0, 1, …), epoch (0 is the common start, at the origin), pc1, pc2 (principal
    components of the epochs of all runs), share1, share2 (the share of the variance on each axis).
    """
    from sklearn.decomposition import KernelPCA  # half a second, for one figure of the book

    # The Gram matrix gives the components without a second copy of all weights in memory.
    gram = _gram(several)
    pca = KernelPCA(n_components=2, kernel="precomputed", eigen_solver="dense")
    plane = pca.fit_transform(gram)
    centred = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    shares = pca.eigenvalues_ / np.trace(centred)
    # The sign of an axis is arbitrary: let the last run end at the right and at the top.
    plane = (plane - plane[0]) * np.where(plane[-1] < plane[0], -1, 1)
    epochs = [range(trained.run.recipe.epochs + 1) for trained in several]
    return pd.DataFrame(
        {
            "run": np.repeat(range(len(several)), [len(e) for e in epochs]),
            "epoch": np.concatenate(epochs),
            "pc1": plane[:, 0],
            "pc2": plane[:, 1],
            "share1": shares[0],
            "share2": shares[1],
        }
    )


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


@torch.no_grad()
def noise_losses(
    trained: Trained, deltas: list[float], draws: int, count: int | None = None
) -> pd.DataFrame:
    """Losses on test images with noise (RCO, Figure 6).

    The noise has the deviation δ·σ_in on pixels in [0, 1]; σ_in is the deviation of all pixels of
    the image. A draw gives every network the same noise, scaled by δ.

    Columns: delta, draw, ce and, with a teacher, kl: the divergence from the teacher's last epoch
    on the same images, at τ = 1.

    Args:
        count: use the first ``count`` test images; None for all.
    """
    device = pick_device()
    images = load_data(trained.run.dataset, "test", device).first(count)
    models = [trained.model().to(device)]
    if teacher := teacher_of(trained.run):
        models.append(_last_model(teacher).to(device))
    sums = {
        (draw, delta): torch.zeros(2, device=device) for draw in range(draws) for delta in deltas
    }
    for index in torch.arange(len(images), device=device).split(CHUNK):
        labels = images.labels[index]
        for draw in range(draws):
            noise = noise_of(images, index, draw)
            for delta in deltas:
                logits = [model(noised(images, index, noise, delta)) for model in models]
                sums[draw, delta][0] += F.cross_entropy(logits[0], labels, reduction="sum")
                if teacher:
                    sums[draw, delta][1] += len(index) * losses.kd(*logits, temperature=1)
    columns = ["ce", "kl"] if teacher else ["ce"]
    table = pd.DataFrame(
        [(total / len(images)).tolist()[: len(columns)] for total in sums.values()], columns=columns
    )
    table.insert(0, "delta", [delta for _, delta in sums])
    table.insert(1, "draw", [draw for draw, _ in sums])
    return table


def noise_of(images: Images, index: Tensor, draw: int) -> Tensor:
    """Standard normal noise ``[b, c, h, w]`` of a draw.

    The noise of an image depends on its index and the draw alone, not on the rest of the batch.
    """
    shape = (images.channels, images.size, images.size)
    seeds = (torch.Generator().manual_seed(mix("noise", draw, i)) for i in index.tolist())
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in seeds])
    return noise.to(images.device)


def noised(images: Images, index: Tensor, noise: Tensor, delta: float) -> Tensor:
    """Normalised images ``[b, c, h, w]`` with noise of the deviation δ·σ_in on their pixels."""
    x = images.batch(index)
    mean, std = (
        torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (images.mean, images.std)
    )
    sigma = (x * std + mean).flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    return x + delta * sigma * noise / std


def _gram(several: tuple[Trained, ...]) -> np.ndarray:
    """Inner products of the displacements of all epochs from the common start, in float64."""
    start = _common_start(several)
    rows = sum(t.run.recipe.epochs + 1 for t in several)
    moved, row = torch.zeros(rows, len(start)), 0
    for trained in several:
        for epoch in range(1, trained.run.recipe.epochs + 1):
            moved[row + epoch] = _weights(trained.model(epoch)) - start
        row += trained.run.recipe.epochs + 1
    blocks = (block.double() for block in moved.split(2**14, dim=1))
    return sum(block @ block.T for block in blocks).numpy()


def _common_start(several: tuple[Trained, ...]) -> Tensor:
    """The weights that all these runs start from."""
    run = several[0].run
    if len({(t.run.dataset, t.run.model, t.run.seed, t.run.start) for t in several}) > 1:
        raise ValueError(
            "These runs do not share their data, network, seed and start. Compare runs that do."
        )
    if run.start:
        return _weights(_last_model(run.start))
    images = load_data(run.dataset, "test")
    return _weights(
        build_model(run.model, images.classes, images.channels, seed=mix("weights", run.seed))
    )


def _weights(model: nn.Module) -> Tensor:
    """The weights of convolutions and linear layers as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])


def _last_model(run: Run) -> nn.Module:
    return store.require_record(run).model()
