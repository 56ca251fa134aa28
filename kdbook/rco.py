"""Route Constrained Optimization (RCO): the tables that its exhibits measure."""

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses, store
from kdlib.chains import greedy
from kdlib.chains.divergence import logits_of, teacher_of, training_images
from kdlib.data import Images, load_data
from kdlib.engine.device import pick_device
from kdlib.engine.plan import mix
from kdlib.methods import RocketLaunching
from kdlib.runs import Run
from kdlib.store import Trained

CHUNK = 500  # images in one forward pass
TAU = 5.0  # the temperature of RCO's divergences


def epochs_spent(trained: Trained) -> float:
    """The epochs of all stages of a chain, as they were trained."""
    return sum(stage.epochs_used for stage in greedy.stages(trained))


def repeated(run: Run, times: int) -> Run:
    """The last of several stages that all learn as ``run``, which is the first of them."""
    for _ in range(times - 1):
        run = replace(run, start=run, keep=())
    return run


def at_equal_cost(
    chain: Iterable[Trained | None], others: Iterable[Trained | None]
) -> list[Trained]:
    """For each seed the stage of ``chain`` after as many stages as another chain has."""
    pairs = [(one, other) for one, other in zip(chain, others, strict=True) if one and other]
    return [greedy.stages(one)[len(greedy.stages(other)) - 1] for one, other in pairs]


def searches(
    several: Iterable[greedy.GreedySearch], found: Iterable[Trained | None]
) -> pd.DataFrame:
    """What greedy searches found: by seed their anchors, and what chose the last of them."""
    rows = {
        trained.run.seed: {
            "anchors": ", ".join(map(str, greedy.anchors(trained))),
            "ended by": f"the limit of {search.most}" if search.was_cut(trained) else "Algorithm 2",
        }
        for search, trained in zip(several, found, strict=True)
        if trained
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("seed")


def target_count(trained: Trained) -> int:
    """The number of targets that taught a run: of checkpoints; of steps where the teacher learns
    beside it."""
    run = trained.run
    if isinstance(run.method, RocketLaunching):
        return trained.epochs * len(training_images(run)) // run.recipe.batch
    return len(run.method.checkpoints(trained.epochs))


def stage_log(trained: Trained, *columns: str) -> pd.DataFrame:
    """These columns of the logs of all stages of a chain, by the epoch since the first stage."""
    table = pd.concat([stage.log[[*columns]] for stage in greedy.stages(trained)])
    table.insert(0, "epoch", range(1, len(table) + 1))
    return table.reset_index(drop=True)


def divergences_on_test(
    trained: Trained, epochs: list[int], count: int | None = None
) -> pd.DataFrame:
    """H of Eq. 6 over test images, at some epochs of the teacher; columns epoch, kl.

    The greedy search itself uses ``divergence_from_route``, over images that the student knows.

    Args:
        epochs: of the teacher, whose weights were kept.
        count: use the first ``count`` test images; None for all.
    """
    images = load_data(trained.run.dataset, "test", pick_device()).first(count)
    teacher = store.require_record(teacher_of(trained.run))
    student = logits_of(trained.model(), images)
    rows = []
    for epoch in epochs:
        taught = logits_of(teacher.model(epoch), images)
        rows.append((epoch, losses.kd(student, taught, TAU).item() / TAU**2))
    return pd.DataFrame(rows, columns=["epoch", "kl"])


def training_losses(trained: Trained, temperature: float = 5.0) -> pd.DataFrame:
    """The losses over all training images in eval mode: columns ``ce`` and, with a teacher, ``kd``.

    ``kd`` is τ²·KL to the teacher's last epoch, also for a student of earlier checkpoints.
    """
    images = training_images(trained.run)
    logits = logits_of(trained.model(), images)
    row = {"ce": F.cross_entropy(logits, images.labels.cpu()).item()}
    if teacher := teacher_of(trained.run):
        teacher_logits = logits_of(last_model(teacher), images)
        row["kd"] = losses.kd(logits, teacher_logits, temperature).item()
    return pd.DataFrame([row])


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
        models.append(last_model(teacher).to(device))
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


def last_model(run: Run) -> nn.Module:
    return store.require_record(run).model()
