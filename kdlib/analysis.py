"""Small tables computed from trained models, for ``measure``."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses, store
from kdlib.data import Images, load_data
from kdlib.engine.device import InFloat32, pick_device
from kdlib.engine.plan import mix, validation
from kdlib.engine.trainee import trained_networks
from kdlib.errors import StoreError
from kdlib.methods import Step
from kdlib.models import build_model
from kdlib.runs import Run
from kdlib.store import Trained

CHUNK = 500


@torch.no_grad()
def logits_on_test(trained: Trained, count: int, epoch: int | None = None) -> pd.DataFrame:
    """Logits of the first ``count`` test images: columns ``label`` and one per class."""
    images = load_data(trained.run.data, "test").first(count)
    logits = trained.model(epoch)(images.batch(torch.arange(len(images))))
    table = pd.DataFrame(logits.tolist(), columns=list(images.class_names))
    table.insert(0, "label", images.labels.tolist())
    return table


def divergence_from_route(trained: Trained, temperature: float = 5.0) -> pd.DataFrame:
    """H of RCO's Eq. 6: KL(teacher after epoch k ‖ student) for all k; columns epoch, kl.

    Over the validation fifth of the training images, both networks in eval mode, no augmentation.
    """
    images = _training_images(trained.run)
    index = validation(len(images)).to(images.device)
    student = _logits(trained.model(), images, index).to(images.device).double()
    teacher = _record(teacher_of(trained.run))
    if teacher.run.images != trained.run.images:
        raise ValueError(f"{trained.run} and {teacher.run} do not learn from the same images.")
    rows = []
    for epoch in range(1, teacher.run.recipe.epochs + 1):
        taught = store.load_logits(teacher, epoch).to(images.device).double()
        kd = losses.kd(student, taught, temperature)
        rows.append((epoch, kd.item() / temperature**2))
    return pd.DataFrame(rows, columns=["epoch", "kl"])


def training_losses(trained: Trained, temperature: float = 5.0) -> pd.DataFrame:
    """Over all training images in eval mode: columns ``ce`` and, given a teacher, ``kd``.

    ``kd`` is τ²·KL to the teacher's last epoch, whichever checkpoints the student learned from.
    """
    images = _training_images(trained.run)
    logits = _logits(trained.model(), images)
    row = {"ce": F.cross_entropy(logits, images.labels.cpu()).item()}
    if teacher := teacher_of(trained.run):
        taught = _logits(_last_model(teacher), images)
        row["kd"] = losses.kd(logits, taught, temperature).item()
    return pd.DataFrame([row])


def trajectories(*several: Trained) -> pd.DataFrame:
    """Where runs of one network and seed went, in the plane of most variance of all their weights.

    Columns: run (0, 1, …), epoch (0 is the common start, at the origin), pc1, pc2, and
    share1, share2, the parts of the variance that the two axes hold. Needs every epoch kept.

    Weights of convolutions and linear layers only, without biases and batch norm (Li et al. 2018).
    The principal components are those of the stacked epochs of all runs; they come from the Gram
    matrix, so that memory holds the trajectories once and nothing of their size beside them.
    """
    from sklearn.decomposition import KernelPCA  # half a second, in one figure of the book

    gram = _gram(several)
    pca = KernelPCA(n_components=2, kernel="precomputed", eigen_solver="dense")
    plane = pca.fit_transform(gram)
    centred = gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()
    shares = pca.eigenvalues_ / np.trace(centred)
    plane = (plane - plane[0]) * np.where(
        plane[-1] < plane[0], -1, 1
    )  # the last run goes up, right
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
    """Cosines between where runs have gone from their common start: columns first, second, cosine.

    Of the same weights as ``trajectories``.
    """
    rows = []
    start = _common_start(several)
    moved = torch.stack([_weights(t.model(epoch)) - start for t in several])
    cosines = F.normalize(moved.double()) @ F.normalize(moved.double()).T
    for i in range(len(several)):
        rows += [(i, j, cosines[i, j].item()) for j in range(i + 1, len(several))]
    return pd.DataFrame(rows, columns=["first", "second", "cosine"])


def gradient_cosines(
    trained: Trained, first: str, second: str, epochs: list[int], count: int = 512
) -> pd.DataFrame:
    """How two terms of a run's loss agree: columns epoch, stage, cosine, ratio.

    The cosine between their gradients with respect to a stage's weights, and the norm of the first
    over that of the second. Stage 0 is the stem; stages that a term does not reach are left out.
    Each on one batch, the first ``count`` training images as they are, batch norm as in training.

    Args:
        first, second: terms of the method, such as ``stc`` and ``ce``.
        epochs: after which; 0 is the start. Their weights must have been kept.
    """
    run, images = trained.run, _training_images(trained.run)
    step, rows = _step(run, images.first(count)), []
    for epoch in epochs:
        expected = trained.closing["weights"].get(str(epoch))
        networks = trained_networks(run, epoch, images, expected).train().requires_grad_(True)
        parts = _called(networks, images.device)
        _, terms = run.method.loss(step._replace(student=parts.pop("student"), parts=parts))
        for stage, part in enumerate([networks["student"].stem, *networks["student"].body]):
            one, other = (_gradient(terms[name], part) for name in (first, second))
            if one.any() and other.any():
                cosine = F.cosine_similarity(one, other, dim=0).item()
                rows.append((epoch, stage, cosine, (one.norm() / other.norm()).item()))
    return pd.DataFrame(rows, columns=["epoch", "stage", "cosine", "ratio"])


def _gradient(term: Tensor, part: nn.Module) -> Tensor:
    """Of a term with respect to a part's weights, as one float64 vector; 0 beyond its reach."""
    weights = list(part.parameters())
    gradients = torch.autograd.grad(
        term, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def _step(run: Run, images: Images) -> Step:
    """All of some images as one batch of a run's last epoch, but for the networks it trains."""
    x = images.batch(torch.arange(len(images), device=images.device))
    frozen, teacher, targets = {}, None, None
    for name, lender in run.method.frozen().items():
        last = lender.recipe.epochs
        expected = _record(lender).closing["weights"][str(last)]
        frozen[name] = trained_networks(lender, last, images, expected)[name]
    if anchor := run.method.labeller(run.recipe.epochs - 1):
        teacher = _record(anchor[0]).model(anchor[1]).to(images.device)
        with torch.no_grad():
            targets = teacher(x)
        teacher = InFloat32(teacher, images.device, torch.float32)
    return Step(
        x=x,
        labels=images.labels,
        targets=targets,
        student=None,
        teacher=teacher,
        parts={},
        frozen=_called(frozen, images.device),
    )


def _called(networks: Mapping[str, nn.Module], device: torch.device) -> dict[str, InFloat32]:
    return {name: InFloat32(net, device, torch.float32) for name, net in networks.items()}


@torch.no_grad()
def noise_losses(
    trained: Trained, deltas: list[float], draws: int, count: int | None = None
) -> pd.DataFrame:
    """Test losses under noise (RCO, Figure 6): columns delta, draw, ce and, given a teacher, kl.

    Noise of deviation δ·σ_in is added to pixels in [0, 1], σ_in being the deviation of all pixels
    of the image. A draw is the same noise for every network, scaled by δ. ``kl`` is to the last
    epoch of the teacher on the same noised images, at τ = 1.
    """
    device = pick_device()
    images = load_data(trained.run.data, "test", device).first(count)
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
    """Standard normal noise ``[b, c, h, w]`` of a draw, the same whichever images stand beside."""
    shape = (images.channels, images.size, images.size)
    seeds = (torch.Generator().manual_seed(mix("noise", draw, i)) for i in index.tolist())
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in seeds])
    return noise.to(images.device)


def noised(images: Images, index: Tensor, noise: Tensor, delta: float) -> Tensor:
    """Normalised images ``[b, c, h, w]``, noise of deviation δ·σ_in added to their pixels."""
    x = images.batch(index)
    mean, std = (
        torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (images.mean, images.std)
    )
    sigma = (x * std + mean).flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    return x + delta * sigma * noise / std


def teacher_of(run: Run) -> Run | None:
    """The run that labels this one's last epoch."""
    anchor = run.method.labeller(run.recipe.epochs - 1)
    return anchor and anchor[0]


def _last_model(run: Run) -> nn.Module:
    return _record(run).model()


def _record(run: Run) -> Trained:
    if (found := store.find_record(run)) is None:
        raise StoreError(f"There is no record of {run}: `train([run], weights=True)` makes it.")
    return found


def _training_images(run: Run) -> Images:
    return load_data(run.data, "train", pick_device()).first(run.images)


@torch.no_grad()
def _logits(model: nn.Module, images: Images, index: Tensor | None = None) -> Tensor:
    """Float32 logits ``[n, classes]`` on the CPU, of the images themselves."""
    if index is None:
        index = torch.arange(len(images), device=images.device)
    model = model.to(images.device)
    return torch.cat([model(images.batch(chunk)) for chunk in index.split(CHUNK)]).cpu()


def _gram(several: tuple[Trained, ...]) -> np.ndarray:
    """Inner products of all epochs' displacements from the common start, in float64."""
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
    """The weights that all of these start from."""
    run = several[0].run
    if len({(t.run.data, t.run.model, t.run.seed, t.run.start) for t in several}) > 1:
        raise ValueError("These runs do not share their data, network, seed and start.")
    if run.start:
        return _weights(_last_model(run.start))
    images = load_data(run.data, "test")
    return _weights(
        build_model(run.model, images.classes, images.channels, seed=mix("weights", run.seed))
    )


def _weights(model: nn.Module) -> Tensor:
    """Weights of convolutions and linear layers as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
