"""How far a student is from the checkpoints of its teacher."""

import pandas as pd
import torch
from torch import Tensor, nn

from kdlib import losses, store
from kdlib.data import Images, load_data
from kdlib.engine.device import pick_device
from kdlib.engine.plan import validation
from kdlib.errors import StoreError
from kdlib.runs import Run
from kdlib.store import Trained

CHUNK = 500


def divergence_from_route(trained: Trained, temperature: float = 5.0) -> pd.DataFrame:
    """H of RCO's Eq. 6: KL(teacher after epoch k ‖ student) for all k; columns epoch, kl.

    Over the validation fifth of the training images, both networks in eval mode, no augmentation.
    """
    images = training_images(trained.run)
    index = validation(len(images)).to(images.device)
    student = logits_of(trained.model(), images, index).to(images.device).double()
    teacher = record_of(teacher_of(trained.run))
    if teacher.run.images != trained.run.images:
        raise ValueError(f"{trained.run} and {teacher.run} do not learn from the same images.")
    rows = []
    for epoch in range(1, teacher.run.recipe.epochs + 1):
        taught = store.load_logits(teacher, epoch).to(images.device).double()
        kd = losses.kd(student, taught, temperature)
        rows.append((epoch, kd.item() / temperature**2))
    return pd.DataFrame(rows, columns=["epoch", "kl"])


def teacher_of(run: Run) -> Run | None:
    """The run that labels this one's last epoch."""
    anchor = run.method.teacher_at(run.recipe.epochs - 1)
    return anchor and anchor[0]


def last_model(run: Run) -> nn.Module:
    return record_of(run).model()


def record_of(run: Run) -> Trained:
    if (found := store.find_record(run)) is None:
        raise StoreError(f"There is no record of {run}: `train([run], weights=True)` makes it.")
    return found


def training_images(run: Run) -> Images:
    return load_data(run.data, "train", pick_device()).first(run.images)


@torch.no_grad()
def logits_of(model: nn.Module, images: Images, index: Tensor | None = None) -> Tensor:
    """Float32 logits ``[n, classes]`` on the CPU, of the images themselves."""
    if index is None:
        index = torch.arange(len(images), device=images.device)
    model = model.to(images.device)
    return torch.cat([model(images.batch(chunk)) for chunk in index.split(CHUNK)]).cpu()
