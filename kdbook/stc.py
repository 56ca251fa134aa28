"""Student-Teacher Collaboration (STC): the tables and the diagram of its exhibits."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

from kdbook import figures
from kdlib import losses, store
from kdlib.chains.divergence import training_images
from kdlib.data import Images, load_data
from kdlib.engine.state import lent_module, trained_modules
from kdlib.methods import Step
from kdlib.models.precision import AutocastNetwork, InFloat32
from kdlib.runs import Run
from kdlib.store import Trained


def gradient_cosines(
    trained: Trained, first: str, second: str, epochs: list[int], count: int = 512
) -> pd.DataFrame:
    """The agreement of the gradients of two terms of a run's loss, for each stage of the student.

    Columns: epoch, stage (0 is the stem), cosine (between the two gradients of the stage's
    weights), ratio (norm of the first gradient over the norm of the second). A stage without a
    gradient of both terms has no row. Both gradients come from one batch, the first ``count``
    training images without augmentation, with batch norm in training mode.

    Args:
        first, second: terms of the method's loss, such as ``stc`` and ``ce``.
        epochs: the epochs after which to measure; 0 is the start. The run must have kept them.
    """
    run, images = trained.run, training_images(trained.run)
    step, rows = _step(run, images.first(count)), []
    for epoch in epochs:
        expected = trained.summary["weights"].get(str(epoch))
        modules = trained_modules(run, epoch, images, expected).train().requires_grad_(True)
        aux = _autocast(modules, images.device)
        _, terms = run.method.loss(step._replace(student=aux.pop("student"), aux=aux))
        for stage, part in enumerate([modules["student"].stem, *modules["student"].body]):
            one, other = (_gradient(terms[name], part) for name in (first, second))
            if one.any() and other.any():
                cosine = F.cosine_similarity(one, other, dim=0).item()
                rows.append((epoch, stage, cosine, (one.norm() / other.norm()).item()))
    return pd.DataFrame(rows, columns=["epoch", "stage", "cosine", "ratio"])


def _gradient(term: Tensor, part: nn.Module) -> Tensor:
    """The gradient of a term for the weights of a part, as one float64 vector."""
    weights = list(part.parameters())
    gradients = torch.autograd.grad(
        term, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def _step(run: Run, images: Images) -> Step:
    """All these images as one batch of the run's last epoch, still without trained networks."""
    x = images.batch(torch.arange(len(images), device=images.device))
    pretrained, teacher, teacher_logits = {}, None, None
    for name, other in run.method.pretrained().items():
        expected = store.require_record(other).summary["weights"][str(other.recipe.epochs)]
        pretrained[name] = lent_module(other, name, images, expected)
    if checkpoint := run.method.teacher_at(run.recipe.epochs - 1):
        network = store.require_record(checkpoint.run).model(checkpoint.epoch).to(images.device)
        with torch.no_grad():
            teacher_logits = network(x)
        teacher = AutocastNetwork(network, images.device, torch.float32)
    return Step(
        x=x,
        labels=images.labels,
        teacher_logits=teacher_logits,
        student=None,
        teacher=teacher,
        aux={},
        pretrained=_autocast(pretrained, images.device),
    )


def _autocast(
    modules: Mapping[str, nn.Module], device: torch.device
) -> dict[str, AutocastNetwork | InFloat32]:
    """The modules in the form in which a step holds them, in float32 on every device."""
    return {
        name: module
        if isinstance(module, InFloat32)
        else AutocastNetwork(module, device, torch.float32)
        for name, module in modules.items()
    }


@torch.no_grad()
def collaboration(student: Trained, teacher: Trained, cut: int) -> pd.DataFrame:
    """How well a student's front suits its teacher's back, on the test images.

    For any student, also one that was trained without this back. Columns: distance, the mean over
    images of |f_s - f_t|² / |f_t|² of the features after stage ``cut``; attention, AT's loss of
    these features; collaboration_error, of the teacher's back on the student's feature, in %.

    Raises ValueError where the two features differ in shape, so that an adapter would be needed.
    """
    front, back = student.model(), teacher.model()
    images, sums = load_data(student.run.dataset, "test"), np.zeros(3)
    for index in torch.arange(len(images)).split(500):
        ours, theirs = (network.until(cut, images.batch(index)) for network in (front, back))
        if ours.shape != theirs.shape:
            raise ValueError(f"{student.run} and {teacher.run} need an adapter after stage {cut}.")
        apart = (ours - theirs).flatten(1).square().sum(1) / theirs.flatten(1).square().sum(1)
        wrong = back.resume(cut, ours).argmax(1) != images.labels[index]
        attention = losses.attention(ours, theirs).item() * len(index)
        sums += (apart.sum().item(), attention, 100 * wrong.sum().item())
    return pd.DataFrame(
        [sums / len(images)], columns=["distance", "attention", "collaboration_error"]
    )


def early_error(trained: Trained) -> float:
    """The mean test error, in %, over the epochs before the learning rate falls."""
    before = trained.log.epoch <= trained.run.recipe.milestones[0]
    return 100 - trained.log.test_top1[before].mean()


def pair_name(row: str) -> str:
    """The papers' names of a pair: ``resnet20<-wrn40-1`` is "ResNet-20 ← WRN-40-1"."""
    for code, name in {"resnet": "ResNet-", "wrn": "WRN-", "vgg": "VGG-", "<-": " ← "}.items():
        row = row.replace(code, name)
    return row


def draw_collaboration(axes: Axes) -> None:
    """The two networks of STC, the path through both, and where the gradient goes."""
    axes.set(xlim=(0, 10), ylim=(0, 4))
    axes.set_axis_off()
    boxes = {
        (2.6, 3.1): ("teacher's front", figures.BLUE),
        (6.2, 3.1): ("teacher's back", figures.BLUE),
        (2.6, 0.9): ("student's front", figures.VERMILION),
        (6.2, 0.9): ("student's back", figures.VERMILION),
    }
    for place, (name, color) in boxes.items():
        look = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": color}
        axes.text(*place, name, ha="center", va="center", color=color, bbox=look)
    texts = {(0.5, 2): "image", (9, 3.4): "$O_t$ (target)", (9, 2.6): "$O_c$", (9, 0.9): "logits"}
    for place, text in texts.items():
        axes.text(*place, text, ha="center", va="center")
    arrows = [
        ((0.7, 2.2), (1.75, 2.9), figures.BLACK, "-"),
        ((0.7, 1.8), (1.75, 1.1), figures.BLACK, "-"),
        ((3.4, 3.1), (5.45, 3.1), figures.BLUE, "-"),
        ((6.95, 3.2), (8.4, 3.4), figures.BLUE, "-"),
        ((3.4, 0.9), (5.45, 0.9), figures.VERMILION, "-"),
        ((6.95, 0.9), (8.6, 0.9), figures.VERMILION, "-"),
        ((3.3, 1.25), (5.45, 2.8), figures.GREEN, "-"),
        ((6.95, 3.0), (8.7, 2.6), figures.GREEN, "-"),
        ((5.8, 2.6), (3.6, 1.1), figures.PURPLE, "--"),
    ]
    for begin, end, color, line in arrows:
        look = {"arrowstyle": "->", "color": color, "ls": line, "lw": 1.3}
        axes.annotate("", end, begin, arrowprops=look)
    axes.text(2.6, 2.05, "collaboration", color=figures.GREEN, fontsize=8)
    label = r"gradient $\partial O_c / \partial x_s$"
    axes.text(5.1, 1.75, label, color=figures.PURPLE, fontsize=8)
