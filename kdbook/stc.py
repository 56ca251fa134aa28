"""Student-Teacher Collaboration (STC): the table that its exhibits measure."""

from collections.abc import Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import store
from kdlib.chains.divergence import training_images
from kdlib.data import Images
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
