"""How far a student is from the checkpoints of its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdlib import losses, store
from kdlib.data import Images, load_data
from kdlib.engine.device import pick_device
from kdlib.engine.plan import validation
from kdlib.runs import Run
from kdlib.store import Trained

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 500


def divergence_from_route(trained: Trained, temperature: float = 5.0) -> pd.DataFrame:
    """H of RCO's Eq. 6: KL(teacher after epoch k ‖ student) for all k; columns epoch, kl.

    Over the validation fifth of the training images, both networks in eval mode, no augmentation.

    Raises ValueError where teacher and student do not learn from the same images, StoreError where
    weights or logits are missing.
    """
    import pandas as pd  # `import kdlib` needs no pandas

    images = training_images(trained.run)
    index = validation(len(images)).to(images.device)
    student = logits_of(trained.model(), images, index).to(images.device).double()
    teacher = store.require_record(teacher_of(trained.run))
    if teacher.run.images != trained.run.images:
        raise ValueError(f"{trained.run} and {teacher.run} do not learn from the same images.")
    rows = []
    for epoch in range(1, teacher.run.recipe.epochs + 1):
        taught = store.load_logits(teacher, epoch).to(images.device).double()
        kd = losses.kd(student, taught, temperature)
        rows.append((epoch, kd.item() / temperature**2))
    return pd.DataFrame(rows, columns=["epoch", "kl"])


def teacher_of(run: Run) -> Run | None:
    """The teacher of a run's last epoch; None without one."""
    checkpoint = run.method.teacher_at(run.recipe.epochs - 1)
    return checkpoint and checkpoint.run


def training_images(run: Run) -> Images:
    """The images that a run learns from, on the device that ``train`` would choose."""
    return load_data(run.dataset, "train", pick_device()).first(run.images)


@torch.no_grad()
def logits_of(model: nn.Module, images: Images, index: Tensor | None = None) -> Tensor:
    """Float32 logits ``[n, classes]`` on the CPU, of the images without augmentation."""
    if index is None:
        index = torch.arange(len(images), device=images.device)
    model = model.to(images.device)
    return torch.cat([model(images.batch(chunk)) for chunk in index.split(CHUNK)]).cpu()
