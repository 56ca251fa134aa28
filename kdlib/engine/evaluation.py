"""Evaluation of networks on test images, and their logits on validation images."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib import losses
from kdlib.data import Images
from kdlib.engine.deadline import check_time
from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.plan import validation
from kdlib.runs import Run

# Images in one chunk: as many as fit the cache of a CPU, or fill a GPU.
CHUNK = {"cpu": 128, "cuda": 2000}

# A run on a part of the training images, n of them, is tested on n / TESTED images after each epoch
# but its last. The test of all images would take a quarter of its time. A teacher with a route is
# always tested on all: its earlier epochs are teachers.
TESTED = 10

Classifier = Callable[[Tensor], Tensor]


def tested_images(run: Run) -> int | None:
    """How many test images a run is tested on after an epoch that is not its last; None for all."""
    return max(1, run.images // TESTED) if run.images and not run.save_logits else None


@torch.no_grad()
def evaluate(
    classifiers: Mapping[str, Classifier],
    images: Images,
    cache: LogitCache | None,
    count: int | None = None,
) -> dict[str, float]:
    """Test accuracy in %, mean cross-entropy and, given a teacher's logits, mean KL to it at τ = 1.

    Names are ``test_top1``, ``test_ce`` and ``test_kl`` for the classifier ``student``, and
    ``test_<name>_top1`` and so on for the others. Raises OutOfTime at the deadline.

    Args:
        count: test on so many images only, classes in turn; None for all.
    """
    device, count = images.device, min(count or len(images), len(images))
    sums = torch.zeros(len(classifiers), 3, device=device)
    chunk = CHUNK[device.type]
    # The logit cache looks up its images on the host.
    chosen = images.first_index(count) if count < len(images) else torch.arange(count)
    everywhere = (chosen.to(place) for place in (device, "cpu"))
    for index, on_host in zip(*(i.split(chunk) for i in everywhere), strict=True):
        check_time()
        x, labels = images.batch(index), images.labels[index]
        for total, classifier in zip(sums, classifiers.values(), strict=True):
            logits = classifier(x)
            total[0] += (logits.argmax(1) == labels).sum()
            total[1] += F.cross_entropy(logits, labels, reduction="sum")
            if cache:
                taught = cache.logits(on_host, torch.full_like(on_host, images.centre))
                total[2] += len(index) * losses.kd(logits, taught.float(), temperature=1)
    row = {}
    for name, (top1, ce, kl) in zip(classifiers, (sums / count).tolist(), strict=True):
        prefix = "test" if name == "student" else f"test_{name}"
        row |= {f"{prefix}_top1": 100 * top1, f"{prefix}_ce": ce}
        row |= {f"{prefix}_kl": kl} if cache else {}
    return row


@torch.no_grad()
def validation_logits(student: Classifier, images: Images) -> Tensor:
    """Logits ``[validation images, classes]`` of the fixed fifth of the training images."""
    index = validation(len(images)).to(images.device)
    chunks = index.split(CHUNK[images.device.type])
    return torch.cat([student(images.batch(i)) for i in chunks])
