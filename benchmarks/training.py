"""Training: steps of knowledge distillation, in images/s of the student.

- P0: the field's loop. torchvision transforms on PIL images through a DataLoader (2 workers beside
  a CPU, 8 beside a GPU), float32, the live teacher in every step, ``.item()`` in every step;
- K1: a kdlib lane whose label bank knows nothing: the teacher labels the epoch within the time;
- K2: the same lane with every label of the epoch in the bank, which is the state of all later runs
  of a sweep over students, seeds or settings.

Same networks, batch, images, threads and process. Networks are untrained, the pixels random: the
arithmetic does not depend on either. Every contender warms up before its time is taken, so P0 does
not pay for starting its workers; K1 and K2 include what a lane does at the start of an epoch. None
includes evaluation or saving. The speed of a run lies between K1 (first epoch ever) and K2.

"first loss" is the relative difference of P0's and K2's loss in the first step, from the same
weights, on the same crops and flips, P0's made by torchvision: near 1e-6 in float32, near 1e-2
where a GPU lets kdlib compute in half precision. Peak memory is the whole process's on a CPU.
"""

import os
import tempfile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import arguments, compare, report, row, seconds, synchronize
from benchmarks.batches import PilData, by_torchvision
from kdlib import KD, Recipe, Run, build_model, load_data, store
from kdlib.data import Images
from kdlib.engine.bank import Shelf
from kdlib.engine.device import environment
from kdlib.engine.lane import Lane
from kdlib.engine.plan import mix

CLASSES = 100
RECIPE = Recipe(epochs=240, batch=64, lr=0.05)


class Case(NamedTuple):
    """A pair of networks, the least K2 / P0 aimed at, and how much is timed in one round."""

    student: str
    teacher: str
    target: float
    images: int
    warm_up: int  # steps of P0 before its time is taken
    epochs: int  # of K2


CASES = {
    "cpu": [
        Case("mobilenetv2-t6-w0.5", "resnet50", 20, images=256, warm_up=1, epochs=3),
        Case("resnet20", "resnet56", 2, images=512, warm_up=2, epochs=1),
    ],
    "cuda": [
        Case("mobilenetv2-t6-w0.5", "resnet50", 6, images=12_800, warm_up=40, epochs=5),
        Case("resnet20", "resnet56", 6, images=12_800, warm_up=40, epochs=5),
    ],
}


def noise_folder(root: Path, count: int) -> str:
    """Random images in files, the way a reader's own images enter kdlib; returns their name."""
    generator = np.random.default_rng(0)
    for split, size in (("train", count), ("test", CLASSES)):
        for k, pixels in enumerate(generator.integers(256, size=(size, 32, 32, 3), dtype=np.uint8)):
            path = root / split / f"{k % CLASSES:02d}" / f"{k:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return f"folder:{root}"


def save_untrained(teacher: Run, images: Images) -> None:
    """Put a teacher into the store as if trained: random weights, statistics of one batch."""
    model = build_model(teacher.model, images.classes, seed=1).to(images.device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # running statistics become the batch's
    with torch.no_grad():
        model.train()(images.batch(torch.arange(32, device=images.device)))
    store.save_weights(teacher, teacher.recipe.epochs, model.state_dict())


class FieldLoop:
    """The loop that distillation code bases share, in plain PyTorch."""

    def __init__(self, run: Run, images: Images, warm_up: int):
        self.device, self.temperature, self.warm_up = images.device, run.method.temperature, warm_up
        self.student = build_model(run.model, images.classes, seed=mix("weights", run.seed))
        self.student.to(self.device).train()
        self.teacher = store.load_checkpoint(*run.method.labeller(0))[0].to(self.device).eval()
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=RECIPE.lr, momentum=0.9, weight_decay=5e-4
        )
        workers = 8 if self.device.type == "cuda" else 2
        self.loader = DataLoader(PilData(images), RECIPE.batch, shuffle=True, num_workers=workers)

    def step(self, x: Tensor, labels: Tensor) -> float:
        x, labels = x.to(self.device), labels.to(self.device)
        logits = self.student(x)
        with torch.no_grad():
            taught = self.teacher(x)
        student = F.log_softmax(logits / self.temperature, dim=1)
        teacher = F.softmax(taught / self.temperature, dim=1)
        kl = F.kl_div(student, teacher, reduction="batchmean")
        loss = F.cross_entropy(logits, labels) + self.temperature**2 * kl
        value, self.top1 = loss.item(), (logits.argmax(1) == labels).float().mean().item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def steps(self, batches) -> None:
        for x, labels in batches:
            self.step(x, labels)

    def speed(self) -> float:
        torch.backends.cudnn.benchmark = True  # as the field's scripts do
        batches = iter(self.loader)
        count = len(self.loader) - self.warm_up
        self.steps(islice(batches, self.warm_up))
        time = seconds(lambda: self.steps(islice(batches, count)), self.device)
        torch.backends.cudnn.benchmark = False
        return count * RECIPE.batch / time


def epoch(lane: Lane) -> None:
    lane.begin_epoch()
    for _ in range(lane.steps):
        lane.advance()


def lane_speed(lane: Lane, epochs: int, cold: bool) -> float:
    """Images/s of a lane; a cold bank forgets its labels first."""
    lane.begin_epoch()
    lane.advance()
    time = 0.0
    for _ in range(epochs):
        for bank in lane.banks.banks.values() if cold else ():
            bank.known.zero_()
        time += seconds(lambda: epoch(lane), lane.device)
    return epochs * lane.steps * RECIPE.batch / time


def first_losses_differ(lane: Lane, field: FieldLoop) -> float:
    """Relative difference of the two first losses; afterwards the bank is warm."""
    lane.begin_epoch()
    lane.advance()
    synchronize(lane.device)
    index, view = lane.index[0], lane.view[0]
    x = by_torchvision(lane.images, index, view)
    reference = field.step(x, lane.images.labels[index])
    return abs(lane.meter["loss"].item() - reference) / reference


def run_case(case: Case, options) -> list[dict]:
    device, name = options.device, f"{case.student} ← {case.teacher}"
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = f"{root}/runs"
        data = noise_folder(Path(root) / "noise", case.images)
        images, test = (load_data(data, split, device) for split in ("train", "test"))
        teacher = Run(data, case.teacher, RECIPE)
        save_untrained(teacher, images)
        run = Run(data, case.student, RECIPE, KD(teacher))
        field, lane = FieldLoop(run, images, case.warm_up), Lane(run, images, test, Shelf())
        rows = [row(name, "first loss, relative difference", first_losses_differ(lane, field))]
        contenders = {
            "P0": field.speed,
            "K1": lambda: lane_speed(lane, 1, cold=True),
            "K2": lambda: lane_speed(lane, case.epochs, cold=False),
        }
        ratios = {("K1", "P0"): None, ("K2", "P0"): case.target}
        rows += compare(name, contenders, ratios, options.rounds)
        peak = environment(device, lane.dtype)["peak_memory_mb"]
        return [*rows, row(name, "peak memory so far, MB", peak)]


def main() -> None:
    options = arguments(__doc__)
    rows = [line for case in CASES[options.device.type] for line in run_case(case, options)]
    report("training", rows, options)


if __name__ == "__main__":
    main()
