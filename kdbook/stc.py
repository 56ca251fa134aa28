"""What is measured for Student-Teacher Collaboration."""

from collections.abc import Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.chains.divergence import record_of, training_images
from kdlib.data import Images
from kdlib.engine.state import trained_networks
from kdlib.methods import Step
from kdlib.models.precision import AutocastNetwork
from kdlib.runs import Run
from kdlib.store import Trained


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
    run, images = trained.run, training_images(trained.run)
    step, rows = _step(run, images.first(count)), []
    for epoch in epochs:
        expected = trained.summary["weights"].get(str(epoch))
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
        expected = record_of(lender).summary["weights"][str(last)]
        frozen[name] = trained_networks(lender, last, images, expected)[name]
    if anchor := run.method.teacher_at(run.recipe.epochs - 1):
        teacher = record_of(anchor[0]).model(anchor[1]).to(images.device)
        with torch.no_grad():
            targets = teacher(x)
        teacher = AutocastNetwork(teacher, images.device, torch.float32)
    return Step(
        x=x,
        labels=images.labels,
        targets=targets,
        student=None,
        teacher=teacher,
        parts={},
        frozen=_called(frozen, images.device),
    )


def _called(networks: Mapping[str, nn.Module], device: torch.device) -> dict[str, AutocastNetwork]:
    return {name: AutocastNetwork(net, device, torch.float32) for name, net in networks.items()}
